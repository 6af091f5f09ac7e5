"""Time rescaling (SANA-Sprint, 2503.09641, Sec. 3): a diffusion model learns to be told the time that sCM needs.

Networks of diffusers are told 0 to 1000 or 250 ln(sigma): their answer changes a thousand times faster with what they are
told than with x, and the derivative in time of a continuous-time consistency model is as noisy. The student is the same
network, told atan(sigma / sigma_data) instead, from 0 to pi / 2; first the embedding of its time, then all of it learns to answer
as the teacher does.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.process import append_dims
from cm_diffusers.diffusion.times import sample_lognormal
from cm_diffusers.diffusion.views import FlowView, View, check_sigmas
from cm_diffusers.errors import UserError
from cm_diffusers.models.time_embedding import teach_time
from cm_diffusers.ranges import check_ranges
from cm_diffusers.types import Batch, Loss, Networks, Progress


@dataclass
class TimeRescalingConfig:
    """At which noise the two are compared, and the result is sampled."""

    sigma_min: float = HfArg(default=0.002, help="Least noise of training and sampling.")
    sigma_max: float = HfArg(default=80.0, help="Most noise, where sampling starts.")
    rho: float = HfArg(
        default=7.0, help="Curvature of the sampling grid: the greater, the more of it at little noise."
    )
    p_mean: float = HfArg(default=-0.8, help="Mean of ln sigma in training.")
    p_std: float = HfArg(default=1.6, help="Standard deviation of ln sigma in training.")

    def __post_init__(self) -> None:
        check_ranges(self)


class TimeRescalingObjective:
    """mean (F(x, sigma) - F_teacher(x, sigma))^2 with EDM's F, so that errors of the denoiser count alike at all noise.

    Args:
        config: See `TimeRescalingConfig`.
        view: How the teacher is called.
    """

    def __init__(self, config: TimeRescalingConfig, view: View) -> None:
        if isinstance(view, FlowView):
            raise UserError(
                "Time rescaling is for UNets, but this is the network of a flow-matching teacher: distil it as it is."
            )
        if view.noise_conditioning == "trigflow":
            raise UserError("This model is told TrigFlow's time already: it needs no rescaling, distil it as it is.")
        check_sigmas(view, config.sigma_min, config.sigma_max)
        self.config, self.view, self.rescaled = config, view, replace(view, noise_conditioning="trigflow")
        self.players = {"student": self}

    def prepare(self, student: nn.Module) -> None:
        """Teaches the embedding of its time, in place: most of the way, in seconds."""
        low, high = math.log(self.config.sigma_min), math.log(self.config.sigma_max)
        sigmas = torch.linspace(low, high, 512, dtype=torch.float64).exp()
        teach_time(student, self.view.told(sigmas), self.rescaled.told(sigmas))

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        config, x0 = self.config, batch.x0
        sigma = sample_lognormal(len(x0), config.p_mean, config.p_std, config.sigma_min, config.sigma_max)
        x = x0 + append_dims(sigma, x0) * torch.randn_like(x0)
        with torch.no_grad():
            wanted = self.view(nets.teacher, x, sigma, batch.cond)
        error = (self.rescaled(nets.student, x, sigma, batch.cond) - wanted).square()
        return Loss(error.mean(), {"relative_error": (error.mean() / wanted.square().mean()).detach()})
