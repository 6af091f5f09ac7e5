"""Diffusion: the denoising loss a teacher trains with.

DDPM (2006.11239, Eq. 14) for "epsilon", 2202.00512 Appendix D for "v_prediction"; conditions are dropped at random
for classifier-free guidance (2207.12598, Alg. 1).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.denoisers import for_frames
from cm_diffusers.diffusion.process import Process, append_dims, diffuse, moved_to
from cm_diffusers.errors import UserError
from cm_diffusers.types import Batch, Loss, Networks, Progress


@dataclass
class DiffusionConfig:
    """How the denoising loss is formed."""

    prediction_type: Literal["epsilon", "v_prediction", "sample"] = HfArg(
        default="epsilon", help="What the network predicts."
    )
    condition_dropout: float = HfArg(default=0.1, help="Share of conditions replaced by the unconditional ones.")


class DiffusionObjective:
    """Mean squared error of the network's prediction at uniform times 0..T-1."""

    def __init__(self, config: DiffusionConfig, process: Process) -> None:
        if not 0 <= config.condition_dropout <= 1:
            raise UserError(f"--condition_dropout is {config.condition_dropout}; give a share between 0 and 1.")
        self.config, self.process = config, process
        self.players = {"student": self}

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        x0, device = batch.x0, batch.x0.device
        t = torch.randint(self.process.num_train_timesteps, (len(x0),))
        noise = torch.randn_like(x0)
        dropped = torch.rand(len(x0), device=device) < self.config.condition_dropout
        cond = {k: torch.where(_mask(dropped, v), batch.uncond[k], v) for k, v in batch.cond.items()}
        x_t = diffuse(self.process, x0, noise, t)
        output = nets.student(x_t, moved_to(t, x0), **for_frames(cond, x_t), return_dict=False)[0].float()
        value = (output - self.target(x0, noise, t)).square().mean()
        return Loss(value, {})

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = append_dims(self.process.alpha(t), x0), append_dims(self.process.sigma(t), x0)
        return {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[
            self.config.prediction_type
        ]


def _mask(dropped: Tensor, like: Tensor) -> Tensor:
    return dropped.reshape(-1, *[1] * (like.ndim - 1))
