"""Encodings shared between two processes: `kept_worker.py FOLDER`; writes `rank-<n>.json`, what each encoded and found."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from processes import together

from cm_diffusers.data.kept import Wanted, keep
from cm_diffusers.data.keys import keys_of
from cm_diffusers.data.shards import shard_key
from cm_diffusers.data.sources import DataConfig


def main() -> None:
    folder, seen, names = Path(sys.argv[1]), [], [f"row {i}" for i in range(20)]

    def encode(rows):
        for row in rows:
            seen.append(row)
            yield {"x": torch.tensor([[row, os.getpid()]])}

    wanted = Wanted(shard_key("numbers"), keys_of(names), encode)
    (kept,) = keep([wanted], DataConfig(latent_cache_dir=str(folder / "cache")), "rows", 4)
    found = kept.fill("x", np.zeros((len(names), 2), np.int64))
    told = {"pid": os.getpid(), "seen": seen, "found": found.tolist()}
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    together(2, main)
