"""LCM on a tiny Qwen-Image in each of two processes: `qwen_worker.py FOLDER`; writes `rank-<n>.safetensors`."""

import os
import sys
from itertools import count
from pathlib import Path

import torch
from processes import together
from safetensors.torch import save_file
from tiny_flow_b import tiny_qwen_image
from toys import toy_trainer

from cm_diffusers.diffusion.teaching import flow_teaching
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.models.families.qwen_image import FAMILY
from cm_diffusers.models.students import StudentConfig, make_networks
from cm_diffusers.objectives.lcm import LCMConfig, LCMObjective
from cm_diffusers.types import Batch


SETTINGS = {"max_train_steps": 3, "checkpointing_steps": 3}
KINDS = {"lora": StudentConfig(lora=True, lora_rank=2), "full": StudentConfig()}


def batches(rank: int):
    def source(start: int):
        for k in count(start):
            generator = torch.Generator().manual_seed(2 * k + rank)
            x0, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 2, 5, 16, generator=generator)
            mask = torch.ones(2, 5, dtype=torch.bool)
            cond, uncond = ({"prompt_embeds": each, "prompt_embeds_mask": mask} for each in states)
            yield Batch(x0, cond, uncond)

    return source


def main() -> None:
    folder, rank, found = Path(sys.argv[1]), int(os.environ["RANK"]), {}
    for kind, student in KINDS.items():
        torch.manual_seed(0)
        nets = make_networks(tiny_qwen_image().transformer, student)
        objective = LCMObjective(LCMConfig(w_min=1.0, w_max=3.0), flow_teaching(FAMILY.call, 3.0))
        before = {name: p.detach().clone() for name, p in nets.student.named_parameters() if p.requires_grad}
        trainer = toy_trainer(folder / kind, nets, objective, OptimConfig(learning_rate=1e-2), **SETTINGS)
        trainer.fit(batches(rank))
        after = dict(trainer.student.named_parameters())
        found |= {f"{kind}/{name}": after[name].detach() - value for name, value in before.items()}
    save_file(found, folder / f"rank-{rank}.safetensors")


if __name__ == "__main__":
    together(2, main)
