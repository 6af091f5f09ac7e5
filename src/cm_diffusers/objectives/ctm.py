"""Consistency trajectory models (2310.02279): jumps from any noise level to any lower one, in EDM's coordinates."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.adversarial import (
    AdversarialConfig,
    Adversary,
    adaptive_weight,
    check_choices,
    gradient_at,
)
from cm_diffusers.diffusion.distances import huber_c, l2, load_lpips, perceptual, pseudo_huber
from cm_diffusers.diffusion.guidance import Conditions
from cm_diffusers.diffusion.preconditioning import edm_scalings
from cm_diffusers.diffusion.process import EDM, append_dims, as_like
from cm_diffusers.diffusion.rng import rewind_rng
from cm_diffusers.diffusion.solvers import heun_step
from cm_diffusers.diffusion.times import karras_grid, sample_lognormal
from cm_diffusers.diffusion.views import View, check_sigmas, edm_denoiser
from cm_diffusers.errors import UserError
from cm_diffusers.types import Batch, Loss, Networks, Progress


DSM_MEAN, DSM_STD = -1.2, 1.2  # of ln sigma in half of the draws of denoising, as in the authors' code
DSM_SHARE = 0.7  # of the grid, from its upper end: where the other half lies, evenly
MOST_DSM = 1e4  # of the adaptive weight of denoising


@dataclass
class CTMConfig(AdversarialConfig):
    """Where jumps begin and end, and what they are compared with. Defaults are those of CIFAR-10."""

    sigma_min: float = HfArg(default=0.002, help="Least noise of the grid; a jump to the data is told it.")
    sigma_max: float = HfArg(default=80.0, help="Most noise, where sampling starts.")
    rho: float = HfArg(default=7.0, help="Curvature of the grid: the greater, the more of it at little noise.")
    num_scales: int = HfArg(default=18, help="Points N of the grid, both ends included.")
    teacher_intervals: int = HfArg(
        default=17,
        help="Most intervals m of the grid that the teacher crosses, two passes each; each step of training draws its own, with "
        "P(m) proportional to m.",
    )
    loss_type: Literal["l2", "huber", "lpips"] = HfArg(
        default="l2", help="Distance between the ends of the jumps; huber is pseudo-Huber, lpips is for images."
    )
    dsm_weight: float = HfArg(
        default=1.0,
        help="Weight of denoising score matching, in units of the jumps' gradient over its own; 0 is none, and the jump from a "
        "level to itself is learned from those to its neighbours alone.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, loss_type=("l2", "huber", "lpips"))
        if self.teacher_intervals >= self.num_scales:
            raise UserError(
                f"--teacher_intervals is {self.teacher_intervals}, but a grid of --num_scales {self.num_scales} has "
                f"{self.num_scales - 1}; give at most that."
            )


class CTMObjective:
    """The student's jump to s ends where its jump from further down the teacher's trajectory ends; both are compared as data.

    Args:
        config: See `CTMConfig`.
        view: How student and teacher are called; the student is told the end of a jump, `target_timestep`, too.
        lpips: For lpips, what compares images, see `perceptual`; the package lpips if None.
        critic: Whether there is one, in `Networks.critic`: (x `(B, ...)`, sigma `(B,)`, cond) -> logits `(B, N)`.
    """

    def __init__(
        self,
        config: CTMConfig,
        view: View,
        lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
        critic: bool = False,
    ) -> None:
        check_sigmas(view, config.sigma_min, config.sigma_max)
        self.config, self.view = config, view
        self.grid = karras_grid(config.num_scales, config.sigma_min, config.sigma_max, config.rho)
        plain = {"l2": l2, "huber": lambda x, y: pseudo_huber(x, y, huber_c(x[0].numel()))}
        self.distance = plain.get(config.loss_type) or perceptual(lpips or load_lpips())
        self.adversary = Adversary(config, critic)
        self.players = {"student": self} | ({"critic": self.judge} if critic else {})

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        x0, cond = batch.x0, batch.cond
        t, u, s, between = self.times(len(x0), self.intervals(progress))
        x_t = x0 + append_dims(t, x0) * torch.randn_like(x0)
        with torch.no_grad():  # first, so that its activations are gone before the student's are kept
            denoise, x_u = edm_denoiser(self.view, nets.teacher), x_t
            for start, end in pairwise(between):
                x_u = heun_step(lambda x, t: denoise(x, t, cond), EDM(), x_u, start, end)
            with rewind_rng(x0.device):  # both jumps on the other side draw the same dropout masks
                goal = self.data(nets.target, self.jump(nets.student, x_u, u, s, cond), s, cond)
        output = self.view(nets.student, x_t, t, self.told(cond, s, x_t))
        fake = self.data(nets.target, self.landed(output, x_t, t, s), s, cond)
        value = self.distance(fake, goal).mean()  # soft matching
        logs = {"consistency": value.detach(), "teacher_intervals": x0.new_full((), len(between) - 1)}
        total, more = self.adversary.join(value, fake, lambda fake: nets.critic(*self.shown([fake]), cond), progress)
        if self.config.dsm_weight > 0:
            matching, pull = self.matching(nets.student, batch)
            hold = gradient_at(output, value, retain_graph=True)
            balance = self.config.dsm_weight * adaptive_weight(hold, pull, 0.0, MOST_DSM)  # 2012.09841, Eq. 7
            total, more = total + balance * matching, more | {"dsm": matching.detach(), "dsm_weight": balance}
        return Loss(total, logs | more)

    def matching(self, student: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Denoising score matching (2206.00364, Eq. 8), a scalar, and its gradient at the network's output `(B, ...)`."""
        x0, sigma = batch.x0, self.denoising_times(len(batch.x0))
        x = x0 + append_dims(sigma, x0) * torch.randn_like(x0)
        output = self.view(student, x, sigma, self.told(batch.cond, sigma, x))
        weight = as_like(1 / edm_scalings(sigma, self.view.sigma_data)[1].square(), x0)
        value = (weight * (self.denoised(output, x, sigma) - x0).square().flatten(1).mean(1)).mean()
        return value, gradient_at(output, value, retain_graph=True)

    @torch.no_grad()
    def judge(self, nets: Networks, batch: Batch, progress: Progress) -> Loss | None:
        """The critic's turn: fake is what the student makes of the data's own trajectories, by two jumps."""
        if not self.adversary.plays(progress):
            return None
        t, _, s, _ = self.times(len(batch.x0), 1)
        x_t = batch.x0 + append_dims(t, batch.x0) * torch.randn_like(batch.x0)
        fake = self.data(nets.target, self.jump(nets.student, x_t, t, s, batch.cond), s, batch.cond)
        with torch.enable_grad():
            return self.adversary.judge(nets.critic, *self.shown([batch.x0, fake]), batch.cond)

    def shown(self, samples: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What the critic sees `(N B, ...)` of N times B samples, and the noise `(N B,)` that it is told: alike for all N."""
        sigma, noise = self.denoising_times(len(samples[0])), torch.randn_like(samples[0])
        return torch.cat([x + append_dims(sigma, x) * noise for x in samples]), sigma.repeat(len(samples))

    def intervals(self, progress: Progress) -> int:
        """m, with P(m) proportional to m, as in the authors' code; the same in all processes, which call the teacher equally often."""
        weights = torch.arange(1, self.config.teacher_intervals + 1, dtype=torch.float64)
        return 1 + int(torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(progress.step)))

    def times(self, batch_size: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """t, u m intervals below it and s below that, 0 in the place of sigma_min, each `(B,)`; and t to u `(m + 1, B)`."""
        start = torch.randint(m, len(self.grid), (batch_size,))
        end = (torch.rand(batch_size, dtype=torch.float64) * (start - m + 1)).long()
        between = self.grid[start - torch.arange(m + 1)[:, None]]
        return between[0], between[-1], torch.where(end > 0, self.grid[end], 0.0), between

    def denoising_times(self, batch_size: int) -> Tensor:
        """sigma `(B,)`: one half lognormal, the other even on the grid's upper end."""
        c = self.config
        drawn = sample_lognormal(batch_size, DSM_MEAN, DSM_STD, c.sigma_min, c.sigma_max)
        low, high = c.sigma_min ** (1 / c.rho), c.sigma_max ** (1 / c.rho)
        upper = (high + DSM_SHARE * torch.rand(batch_size, dtype=torch.float64) * (low - high)) ** c.rho
        return torch.where(torch.rand(batch_size) < 0.5, drawn, upper)

    def jump(self, network: nn.Module, x: Tensor, t: Tensor, s: Tensor, cond: Conditions) -> Tensor:
        """G(x, t, s), `(B, ...)`; x itself where t = s."""
        apart = t > s
        t = torch.where(apart, t, self.config.sigma_min)
        landed = self.landed(self.view(network, x, t, self.told(cond, s, x)), x, t, s)
        return torch.where(append_dims(apart, x).bool(), landed, x)

    def data(self, average: nn.Module, x: Tensor, s: Tensor, cond: Conditions) -> Tensor:
        """From s to the data by the averaged student, through which the gradient goes on to x."""
        return self.jump(average, x, s, torch.zeros_like(s), cond)

    def landed(self, output: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """G = s / t x + (1 - s / t) g of the network's F."""
        return append_dims(s / t, x) * x + append_dims(1 - s / t, x) * self.denoised(output, x, t)

    def denoised(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """g = c_skip x + c_out F with EDM's scalings (2206.00364, Eq. 7): the denoised sample where t = s."""
        c_skip, c_out = edm_scalings(t, self.view.sigma_data)
        return append_dims(c_skip, x) * x + append_dims(c_out, x) * output

    def told(self, cond: Conditions, s: Tensor, x: Tensor) -> Conditions:
        """What a student is told whose jump ends at s; at the data, sigma_min."""
        end = as_like(self.view.told(s.clamp(min=self.config.sigma_min)), x)
        return cond | {"target_timestep": end}
