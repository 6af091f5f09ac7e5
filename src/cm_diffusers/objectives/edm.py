"""Diffusion in EDM's coordinates (2206.00364): what a model without prompts is pre-trained with."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.preconditioning import edm_scalings
from cm_diffusers.diffusion.process import append_dims, as_like
from cm_diffusers.diffusion.times import sample_lognormal
from cm_diffusers.diffusion.views import View, check_sigmas
from cm_diffusers.ranges import check_ranges
from cm_diffusers.types import Batch, Loss, Networks, Progress


@dataclass
class EDMConfig:
    """At which noise the denoiser is trained; Table 1 of the paper."""

    sigma_min: float = HfArg(default=0.002, help="Least noise of training and sampling.")
    sigma_max: float = HfArg(default=80.0, help="Most noise, where sampling starts.")
    rho: float = HfArg(
        default=7.0, help="Curvature of the sampling grid: the greater, the more of it at little noise."
    )
    p_mean: float = HfArg(default=-1.2, help="Mean of ln sigma in training.")
    p_std: float = HfArg(default=1.2, help="Standard deviation of ln sigma in training.")

    def __post_init__(self) -> None:
        check_ranges(self)


class EDMObjective:
    """The denoiser's squared error, weighted so that the network's own error counts alike at every noise level.

    Args:
        config: See `EDMConfig`.
        view: How the network is called.
    """

    def __init__(self, config: EDMConfig, view: View) -> None:
        check_sigmas(view, config.sigma_min, config.sigma_max)
        self.config, self.view = config, view
        self.players = {"student": self}

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        config, x0 = self.config, batch.x0
        sigma = sample_lognormal(len(x0), config.p_mean, config.p_std, config.sigma_min, config.sigma_max)
        x = x0 + append_dims(sigma, x0) * torch.randn_like(x0)
        error = (self.denoise(nets.student, x, sigma, batch.cond) - x0).square().flatten(1).mean(1)
        weight = 1 / edm_scalings(sigma, self.view.sigma_data)[1].square()  # Eq. 8 with lambda = 1 / c_out^2
        return Loss((as_like(weight, error) * error).mean(), {"error": error.mean().detach()})

    def denoise(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """D(x, sigma) = c_skip x + c_out F (Eq. 7), `(B, ...)`."""
        c_skip, c_out = edm_scalings(sigma, self.view.sigma_data)
        return append_dims(c_skip, x) * x + append_dims(c_out, x) * self.view(network, x, sigma, cond)
