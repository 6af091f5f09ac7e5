"""Mean flows (2505.13447): the average velocity between two times of a flow, whose product with their distance is the jump.

In rectified flow, x_t = (1 - t) x0 + t e with sigma = t / (1 - t), the jump x_t - (t - r) u ends where (s / sigma) x +
(1 - s / sigma) g ends in EDM's coordinates, s = r / (1 - r), with u = n - g and n = (x - g) / sigma. So the network is that
of a consistency trajectory model, g(x, sigma, s), and is sampled as one.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.guidance import Conditions
from cm_diffusers.diffusion.process import append_dims, as_like
from cm_diffusers.diffusion.rng import rewind_rng
from cm_diffusers.diffusion.tangent import TANGENTS, derivative
from cm_diffusers.diffusion.views import View, check_sigmas, edm_denoiser
from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError
from cm_diffusers.ranges import check_ranges
from cm_diffusers.types import Batch, Loss, Networks, Progress


@dataclass
class MeanFlowConfig:
    """Which times are drawn, what the error is weighted by, and guidance. Defaults are those of ImageNet."""

    sigma_min: float = HfArg(default=0.002, help="Least noise; a jump to the data is told it.")
    sigma_max: float = HfArg(default=80.0, help="Most noise, where sampling starts.")
    time_mean: float = HfArg(default=-0.4, help="Mean of logit t in training; sigma = t / (1 - t).")
    time_std: float = HfArg(default=1.0, help="Standard deviation of logit t in training.")
    instant_share: float = HfArg(
        default=0.75, help="Share of samples whose two times are one: flow matching, which anchors the rest."
    )
    adaptive_power: float = HfArg(
        default=1.0,
        help="p of the weight 1 / (squared error + c)^p of each sample: 0 is none, 0.5 about pseudo-Huber.",
    )
    adaptive_c: float = HfArg(default=0.01, help="c of that weight.")
    condition_dropout: float = HfArg(
        default=0.0,
        help="Share of images whose class is hidden; the network then knows one class more, the last: any.",
    )
    w: float = HfArg(
        default=0.0,
        help="Guidance in the weights; w = guidance_scale - 1, so 0 means none. It needs --condition_dropout.",
    )
    guidance_mix: float = HfArg(
        default=0.0,
        help="kappa: so much of the velocity is the network's own with the class, in the place of that without; below 1. The "
        "guidance scale that results is (w + 1) / (1 - kappa).",
    )
    tangent: Literal["jvp", "central", "one_sided", "semi"] = HfArg(
        default="jvp",
        help="Derivative of the network along the flow: exact, by differences of three or two passes, or exact in x alone.",
    )
    tangent_step: float = HfArg(
        default=0.01, help="Step of a difference, in units of ln sigma; without effect on --tangent jvp."
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.tangent not in TANGENTS:
            raise UserError(f"Unknown --tangent {self.tangent!r}; one of {', '.join(TANGENTS)}.")
        if self.tangent == "jvp":
            refuse_changed(self, "tangent_step", "with --tangent jvp")
        if self.w != 0 and self.condition_dropout == 0:
            raise UserError(
                f"--w {self.w} needs a network that knows images of any class: give --condition_dropout 0.1."
            )
        if self.w == 0:
            refuse_changed(self, "guidance_mix", "without guidance, --w 0")


class MeanFlowObjective:
    """The average velocity u agrees with what its own derivative along the flow says it must be.

    Args:
        config: See `MeanFlowConfig`.
        view: How the network is called, which is told the end of the jump, `target_timestep`, too.
        any_class: What it is told of an image whose class is hidden.
    """

    takes_derivatives = True

    def __init__(self, config: MeanFlowConfig, view: View, any_class: int | None = None) -> None:
        check_sigmas(view, config.sigma_min, config.sigma_max)
        self.config, self.view, self.any_class = config, view, any_class
        self.players = {"student": self}

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        x0, noise = batch.x0, torch.randn_like(batch.x0)
        sigma, s = self.times(len(x0))
        x = x0 + append_dims(sigma, x0) * noise
        cond, v = self.guided(nets.student, x, sigma, noise - x0, batch.cond)
        along = append_dims(1 / (1 + sigma), x) * (
            x + v
        )  # dx / dsigma where x / (1 + sigma) moves with v: noise, unguided
        with rewind_rng(x0.device):  # the pass that learns draws the same dropout masks
            slope = self.slope(nets.student, x, sigma, s, along, cond)
        # Eq. 6: u = v - (t - r) du / dt, where dt = d(ln sigma) sigma / (1 + sigma)^2
        span = (sigma / (1 + sigma) - s / (1 + s)) * (1 + sigma) ** 2 / sigma
        goal = v - append_dims(span, x0) * slope
        error = (self.velocity(nets.student, x, sigma, s, cond) - goal).square().flatten(1).sum(1)
        weight = (error.detach() + self.config.adaptive_c) ** -self.config.adaptive_power
        apart = as_like(sigma > s, error)
        logs = {
            "error": error.detach().mean(),
            "error_apart": (apart * error.detach()).sum() / apart.sum().clamp(min=1),
        }
        return Loss((weight * error).mean(), logs)

    def guided(
        self, network: nn.Module, x: Tensor, sigma: Tensor, v: Tensor, cond: Conditions
    ) -> tuple[Conditions, Tensor]:
        """Conditions, of which some are hidden, and the velocity `(B, ...)` that the flow has there (Sec. 4.2).

        (1 + w) v - (w + kappa) u_any + kappa u_class, with the network's own at r = t; v where the class is hidden.
        """
        if self.any_class is None:
            return cond, v
        labels = cond["class_labels"]
        anything = torch.full_like(labels, self.any_class)
        hidden = torch.rand(len(labels), device=labels.device) < self.config.condition_dropout
        told, w, mix = (
            cond | {"class_labels": torch.where(hidden, anything, labels)},
            self.config.w,
            self.config.guidance_mix,
        )
        if w == 0:
            return told, v
        with torch.no_grad(), rewind_rng(x.device):
            unknown = self.velocity(network, x, sigma, sigma, cond | {"class_labels": anything})
            known = self.velocity(network, x, sigma, sigma, cond) if mix else 0.0
        guided = (1 + w) * v - (w + mix) * unknown + mix * known
        return told, torch.where(append_dims(hidden, v).bool(), v, guided)

    def times(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """sigma and s at most it, each `(B,)`: of two logit-normal times the later and the earlier, or the later twice."""
        c = self.config
        pair = torch.exp(c.time_mean + c.time_std * torch.randn(2, batch_size, dtype=torch.float64))
        pair = pair.clamp(c.sigma_min, c.sigma_max).sort(0).values  # t / (1 - t) of a logit-normal t is lognormal
        instant = torch.rand(batch_size) < c.instant_share
        return pair[1], torch.where(instant, pair[1], pair[0])

    @torch.no_grad()
    def slope(
        self, network: nn.Module, x: Tensor, sigma: Tensor, s: Tensor, along: Tensor, cond: Conditions
    ) -> Tensor:
        """du / d(ln sigma) along dx / dsigma, `along`, with s held, `(B, ...)`."""
        if not (sigma > s).any():
            return torch.zeros_like(x)

        def function(x: Tensor, sigma: Tensor) -> Tensor:
            return self.velocity(network, x, sigma, s, cond)

        h, dx = torch.full_like(sigma, self.config.tangent_step), append_dims(sigma, x) * along
        return derivative(self.config.tangent, network, function, x, sigma, dx, sigma, h)[1]

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, s: Tensor, cond: Conditions) -> Tensor:
        """u = n - g, `(B, ...)`."""
        end = as_like(self.view.told(s.clamp(min=self.config.sigma_min)), x)
        g, n = edm_denoiser(self.view, network)(x, sigma, cond | {"target_timestep": end})
        return n - g
