"""Consistency distillation of a diffusion teacher in EDM's coordinates (2303.01469, Alg. 2)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.distances import l1, l2, load_lpips, perceptual
from cm_diffusers.diffusion.guidance import Denoiser
from cm_diffusers.diffusion.preconditioning import BOUNDARY_SCALINGS
from cm_diffusers.diffusion.process import EDM, append_dims
from cm_diffusers.diffusion.rng import rewind_rng
from cm_diffusers.diffusion.solvers import heun_step
from cm_diffusers.diffusion.teaching import Guiding
from cm_diffusers.diffusion.times import karras_grid, sample_neighbours
from cm_diffusers.diffusion.views import View, check_sigmas, edm_denoiser
from cm_diffusers.errors import UserError
from cm_diffusers.ranges import check_ranges
from cm_diffusers.types import Batch, Loss, Networks, Progress


@dataclass
class CDConfig:
    """How the consistency target is formed. Defaults are those of CIFAR-10."""

    sigma_min: float = HfArg(default=0.002, help="Least noise, where the student is the identity.")
    sigma_max: float = HfArg(default=80.0, help="Most noise, where sampling starts.")
    rho: float = HfArg(default=7.0, help="Curvature of the grid: the greater, the more of it at little noise.")
    num_scales: int = HfArg(default=18, help="Points N of the grid, both ends included.")
    loss_type: Literal["l2", "l1", "lpips"] = HfArg(
        default="l2", help="Distance between student and target; lpips is for images."
    )
    w: float = HfArg(default=0.0, help="Guidance of the teacher; w = guidance_scale - 1, so 0 means none.")

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.loss_type not in ("l2", "l1", "lpips"):
            raise UserError(f"Unknown --loss_type {self.loss_type!r}; one of l2, l1, lpips.")


class CDObjective:
    """A jump from t agrees with the target's jump from where the teacher gets in one Heun step.

    Args:
        config: See `CDConfig`.
        view: How student and teacher are called.
        lpips: For lpips, what compares images, see `perceptual`; the package lpips if None.
        guiding: How guidance reaches the teacher, and a student that is told it.
        boundary: "cm", f = x at sigma_min, or "edm", f = x at 0, where the jump is the denoised sample itself.
    """

    def __init__(
        self,
        config: CDConfig,
        view: View,
        lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
        guiding: Guiding = Guiding(),  # noqa: B008 (frozen)
        boundary: str = "cm",
    ) -> None:
        check_sigmas(view, config.sigma_min, config.sigma_max)
        self.config, self.view, self.guiding, self.scalings = config, view, guiding, BOUNDARY_SCALINGS[boundary]
        self.grid = karras_grid(config.num_scales, config.sigma_min, config.sigma_max, config.rho)
        plain = {"l2": l2, "l1": l1}
        self.distance = plain.get(config.loss_type) or perceptual(lpips or load_lpips())
        self.players = {"student": self}

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        x0, device = batch.x0, batch.x0.device
        t, s = sample_neighbours(len(x0), self.grid)
        x_t = x0 + append_dims(t, x0) * torch.randn_like(x0)
        cond = self.guiding.student(batch.cond, self.w(batch))
        with torch.no_grad():  # first, so that its activations are gone before the student's are kept
            x_s = heun_step(self.teacher(nets, batch), EDM(), x_t, t, s)
            with rewind_rng(device):  # the student draws the same dropout masks
                target = self.consistency(nets.target or nets.student, x_s, s, cond)
        online = self.consistency(nets.student, x_t, t, cond)
        return Loss(self.distance(online, target).mean(), {})  # Eq. 7 with weight 1

    def teacher(self, nets: Networks, batch: Batch) -> Denoiser:
        """The denoiser that is distilled; of a guided one that needs two, both branches are one batch."""
        denoise = edm_denoiser(self.view, nets.teacher)
        if self.guiding.kind == "cfg" and self.config.w == 0:
            return lambda x, t: denoise(x, t, batch.cond)
        if self.guiding.kind == "cfg" and not batch.uncond:
            raise UserError(
                f"--w {self.config.w} guides the teacher, but the data has no unconditional branch; give --w 0."
            )
        return self.guiding.teacher(denoise, batch, self.w(batch))

    def w(self, batch: Batch) -> Tensor:
        """Guidance `(B,)`, the same for all."""
        return batch.x0.new_full((len(batch.x0),), self.config.w)

    def consistency(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """f(x, sigma) = c_skip x + c_out F (Eq. 5), `(B, ...)`."""
        c_skip, c_out = self.scalings(sigma, self.config.sigma_min, self.view.sigma_data)
        return append_dims(c_skip, x) * x + append_dims(c_out, x) * self.view(network, x, sigma, cond)
