"""AnimateLCM's stages in each of two processes: `video_worker.py FOLDER`; writes `rank-<n>.safetensors`."""

import os
import sys
from itertools import count
from pathlib import Path

import torch
from processes import together
from safetensors.torch import save_file
from tasks.test_animatelcm import lora_folder, randomised_parts
from toys import toy_trainer

from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.objectives.lcm import LCMConfig
from cm_diffusers.tasks.animatelcm import StageConfig, make_stage
from cm_diffusers.types import Batch


SETTINGS = {"max_train_steps": 4, "checkpointing_steps": 2, "gradient_accumulation_steps": 2}
KINDS = {"motion": {}, "joint": {"lora_rank": 2, "lora_alpha": 2.0}, "adapter": {"condition": "image"}}


def stage(kind, home):
    parts = randomised_parts()
    values = {} if kind == "joint" else {"spatial_lora": lora_folder(home, parts.scheduler)}
    method = LCMConfig() if kind == "adapter" else LCMConfig(w_min=1.0, w_max=3.0)
    return make_stage(StageConfig(kind, **KINDS[kind], **values), method, parts)


def trainer(folder, kind, home, **config):
    made = stage(kind, home)
    return toy_trainer(folder, made.nets, made.objective, OptimConfig(learning_rate=1e-3), **SETTINGS | config)


def clips(kind, rank=0):
    def batches(start):
        for k in count(start):
            generator = torch.Generator().manual_seed(2 * k + rank)
            x0, states = torch.randn(2, 4, 3, 8, 8, generator=generator), torch.randn(2, 2, 5, 32, generator=generator)
            seen = {"image_latents": x0[:, :, 0]} if kind == "adapter" else {}
            yield Batch(x0, {"encoder_hidden_states": states[0]} | seen, {"encoder_hidden_states": states[1]} | seen)

    return batches


def main() -> None:
    folder, rank, found = Path(sys.argv[1]), int(os.environ["RANK"]), {}
    for kind in KINDS:
        home = folder / f"lora-{rank}"
        trainer(folder / kind, kind, home).fit(clips(kind, rank))
        start = str(folder / kind / "checkpoint-2")
        resumed = trainer(folder / f"{kind}-resumed", kind, home, resume_from_checkpoint=start)
        resumed.fit(clips(kind, rank))
        network = resumed.accelerator.unwrap_model(resumed.nets.student)
        found |= {f"{kind}/{key}": p.detach().clone() for key, p in network.named_parameters() if p.requires_grad}
    save_file(found, folder / f"rank-{rank}.safetensors")


if __name__ == "__main__":
    together(2, main)
