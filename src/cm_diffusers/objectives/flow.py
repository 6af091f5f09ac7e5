"""Flow matching: the velocity that carries data to noise in straight lines.

x_t = (1 - t) x0 + t noise and the target noise - x0 (2209.03003, Eq. 1); times as in Stable Diffusion 3 (2403.03206, Sec. 3.1);
conditions are dropped at random for classifier-free guidance (2207.12598, Alg. 1).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.denoisers import Call
from cm_diffusers.diffusion.process import RectifiedFlow, as_like, diffuse
from cm_diffusers.diffusion.times import shifted
from cm_diffusers.ranges import check_ranges
from cm_diffusers.types import Batch, Loss, Networks, Progress


@dataclass
class FlowConfig:
    """How the flow-matching loss is formed."""

    time_sampling: Literal["logit_normal", "uniform"] = HfArg(
        default="logit_normal", help="Times of training: mostly in the middle, or all alike."
    )
    logit_mean: float = HfArg(default=0.0, help="Mean of log(t / (1 - t)), for logit_normal; more is more noise.")
    logit_std: float = HfArg(default=1.0, help="Standard deviation of log(t / (1 - t)), for logit_normal.")
    shift: float = HfArg(
        default=1.0,
        help="Of the times, t -> k t / (1 + (k - 1) t): above 1 for large images; 1 leaves them as they are.",
    )
    condition_dropout: float = HfArg(default=0.1, help="Share of conditions replaced by the unconditional ones.")

    def __post_init__(self) -> None:
        check_ranges(self)


class FlowObjective:
    """Mean squared error of a network's velocity.

    Args:
        config: See `FlowConfig`.
        call: How the network is called, see `Family`.
    """

    def __init__(self, config: FlowConfig, call: Call) -> None:
        self.config, self.call, self.process = config, call, RectifiedFlow()
        self.players = {"student": self}

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        x0 = batch.x0
        t, noise = self.times(len(x0)), torch.randn_like(x0)
        dropped = torch.rand(len(x0), device=x0.device) < self.config.condition_dropout
        cond = {name: torch.where(_mask(dropped, told), batch.uncond[name], told) for name, told in batch.cond.items()}
        x_t = diffuse(self.process, x0, noise, t)
        velocity = self.call(nets.student, x_t, as_like(t, x_t), cond).float()
        return Loss((velocity - (noise - x0)).square().mean(), {})

    def times(self, batch_size: int) -> Tensor:
        """`(B,)` in float64: logit-normal (2403.03206, Eq. 19) or uniform, then shifted (Eq. 23)."""
        config = self.config
        if config.time_sampling == "uniform":
            t = torch.rand(batch_size, dtype=torch.float64)
        else:
            normal = torch.randn(batch_size, dtype=torch.float64)
            t = torch.sigmoid(config.logit_mean + config.logit_std * normal)
        return shifted(t, config.shift)


def _mask(dropped: Tensor, like: Tensor) -> Tensor:
    return dropped.reshape(-1, *[1] * (like.ndim - 1))
