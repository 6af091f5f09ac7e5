"""SCott on tiny UNets in each of two processes: `scott_worker.py FOLDER`; writes `rank-<n>.safetensors`."""

import os
import sys
from itertools import count
from pathlib import Path

import torch
from latent_objectives import scott_of
from processes import together
from safetensors.torch import save_file
from tiny import tiny_scheduler, tiny_unet
from toys import toy_trainer

from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.models.critics import CriticConfig, make_critic
from cm_diffusers.models.students import StudentConfig, make_networks
from cm_diffusers.objectives.scott import SCottConfig
from cm_diffusers.types import Batch


SETTINGS = {"max_train_steps": 4, "checkpointing_steps": 2, "gradient_accumulation_steps": 2}
KINDS = {"heads": False, "lora_decoder": True}  # critic -> whether the student is a LoRA


def trainer(folder, kind, **config):
    torch.manual_seed(0)
    lora = KINDS[kind]
    student = StudentConfig(lora=lora, lora_rank=2, unet_time_cond_proj_dim=16)
    nets = make_networks(tiny_unet(dropout=0.1).requires_grad_(False), student)
    nets.critic = make_critic(nets, CriticConfig(kind, critic_channels=16, critic_lora_rank=2))
    process = DiscreteVP.from_scheduler(tiny_scheduler())
    method = SCottConfig(adversarial_start=1, adversarial_ramp=1, r1_weight=1.0)
    objective = scott_of(method, process, "epsilon", None if lora else 16, critic=True)
    optim = OptimConfig(learning_rate=1e-3)
    return toy_trainer(folder, nets, objective, optim, **SETTINGS | config)


def latents(rank=0):
    def batches(start):
        for k in count(start):
            generator = torch.Generator().manual_seed(2 * k + rank)
            x0, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 2, 5, 32, generator=generator)
            yield Batch(x0, {"encoder_hidden_states": states[0]}, {"encoder_hidden_states": states[1]})

    return batches


def main() -> None:
    folder, rank, found = Path(sys.argv[1]), int(os.environ["RANK"]), {}
    for kind in KINDS:
        trainer(folder / kind, kind).fit(latents(rank))
        start = str(folder / kind / "checkpoint-2")
        resumed = trainer(folder / f"{kind}-resumed", kind, resume_from_checkpoint=start)
        resumed.fit(latents(rank))
        for name in ("student", "critic"):
            network = resumed.accelerator.unwrap_model(getattr(resumed.nets, name))
            found |= {
                f"{kind}/{name}/{key}": p.detach().clone() for key, p in network.named_parameters() if p.requires_grad
            }
    save_file(found, folder / f"rank-{rank}.safetensors")


if __name__ == "__main__":
    together(2, main)
