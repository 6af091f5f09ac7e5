"""`train_flow.py` as a process of several: `flow_worker.py FOLDER FLAGS`; writes the weights to `rank-<n>.safetensors`."""

import os
import sys
from pathlib import Path
from unittest import mock

from processes import together
from safetensors.torch import save_file
from scripts import script

from cm_diffusers.engine.trainer import Trainer


def main() -> None:
    folder, rank, end = Path(sys.argv.pop(1)), os.environ["RANK"], Trainer.end

    def save(trainer: Trainer) -> None:
        save_file(trainer.student.state_dict(), folder / f"rank-{rank}.safetensors")
        end(trainer)

    with mock.patch.object(Trainer, "end", save):
        script("train_flow").main()


if __name__ == "__main__":
    together(2, main)
