"""Consistency training without a teacher, with the curriculum of its first paper (2303.01469, Alg. 3)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.distances import l1, l2, load_lpips, perceptual
from cm_diffusers.diffusion.preconditioning import cm_scalings
from cm_diffusers.diffusion.process import append_dims
from cm_diffusers.diffusion.rng import rewind_rng
from cm_diffusers.diffusion.times import karras_grid, sample_neighbours, square_root_decay, square_root_intervals
from cm_diffusers.diffusion.views import View, check_sigmas
from cm_diffusers.errors import UserError
from cm_diffusers.ranges import check_ranges
from cm_diffusers.types import Batch, Loss, Networks, Progress


@dataclass
class CTConfig:
    """How the student is compared with itself. Defaults are those of CIFAR-10, but for the distance (LPIPS there)."""

    sigma_min: float = HfArg(default=0.002, help="Least noise, where the student is the identity.")
    sigma_max: float = HfArg(default=80.0, help="Most noise, where sampling starts.")
    rho: float = HfArg(default=7.0, help="Curvature of the grid: the greater, the more of it at little noise.")
    discretization_s_0: int = HfArg(default=2, help="s0: about how many intervals the grid has at first.")
    discretization_s_1: int = HfArg(default=150, help="s1: how many it has at the end.")
    target_decay_0: float = HfArg(default=0.9, help="mu0: its square is the rate of the EMA target at first.")
    loss_type: Literal["l2", "l1", "lpips"] = HfArg(
        default="l2", help="Distance between student and target; lpips is for images."
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.loss_type not in ("l2", "l1", "lpips"):
            raise UserError(f"Unknown --loss_type {self.loss_type!r}; one of l2, l1, lpips.")


class CTObjective:
    """A jump from t agrees with the target's jump from s, both from the same data and the same noise.

    Args:
        config: See `CTConfig`.
        view: How the student is called.
        lpips: For lpips, what compares images, see `perceptual`; the package lpips if None.
    """

    spans_training = True

    def __init__(self, config: CTConfig, view: View, lpips: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        check_sigmas(view, config.sigma_min, config.sigma_max)
        self.config, self.view = config, view
        plain = {"l2": l2, "l1": l1}
        self.distance = plain.get(config.loss_type) or perceptual(lpips or load_lpips())
        self.players = {"student": self}

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        x0, device = batch.x0, batch.x0.device
        grid = self.grid(progress)
        t, s = sample_neighbours(len(x0), grid)
        noise = torch.randn_like(x0)
        with torch.no_grad(), rewind_rng(device):  # the student draws the same dropout masks
            x_s = x0 + append_dims(s, x0) * noise
            target = self.consistency(nets.target or nets.student, x_s, s, batch.cond)
        online = self.consistency(nets.student, x0 + append_dims(t, x0) * noise, t, batch.cond)
        value = self.distance(online, target).mean()  # Eq. 10 with weight 1
        return Loss(value, {"num_scales": x0.new_full((), len(grid))})

    def grid(self, progress: Progress) -> Tensor:
        """The ascending sigmas trained at."""
        config = self.config
        intervals = square_root_intervals(progress, config.discretization_s_0, config.discretization_s_1)
        return karras_grid(intervals + 1, config.sigma_min, config.sigma_max, config.rho)

    def target_decay(self, progress: Progress) -> float:
        """Rate of the EMA target."""
        config = self.config
        return square_root_decay(progress, config.discretization_s_0, config.discretization_s_1, config.target_decay_0)

    def consistency(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """f(x, sigma) = c_skip x + c_out F (Eq. 5), `(B, ...)`."""
        c_skip, c_out = cm_scalings(sigma, self.config.sigma_min, self.view.sigma_data)
        return append_dims(c_skip, x) * x + append_dims(c_out, x) * self.view(network, x, sigma, cond)
