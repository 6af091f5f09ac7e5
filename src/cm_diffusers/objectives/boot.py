"""Distillation without data: BOOT (2306.05544), a student of pure noise that learns the signal on its teacher's way."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.guidance import Conditions, Denoiser
from cm_diffusers.diffusion.process import append_dims, as_like
from cm_diffusers.diffusion.rng import rewind_rng
from cm_diffusers.diffusion.solvers import SOLVERS
from cm_diffusers.diffusion.teaching import Teaching
from cm_diffusers.errors import UserError
from cm_diffusers.ranges import check_ranges
from cm_diffusers.types import Batch, Loss, Networks, Progress


TOLD_SPAN = 0.1  # share of all times that the student is told
BOUNDARY_EVERY = 4  # one of so many samples is held to the teacher at T, too


@dataclass
class BOOTConfig:
    """How far the teacher leads, and how the student is held at the start."""

    timestep_scaling_factor: ClassVar[float] = 10.0  # of the boundary scalings, which at the last time are 0 and 1

    num_ddim_timesteps: int = HfArg(
        default=50, help="Steps of the teacher from noise to data, each of which is learnt from the one before."
    )
    w_min: float = HfArg(default=2.0, help="Least guidance w; w = guidance_scale - 1, so 0 means none.")
    w_max: float = HfArg(default=14.0, help="Greatest guidance w.")
    solver: Literal["ddim", "heun", "dpm_2s"] = HfArg(
        default="ddim", help="The teacher's ODE step; heun and dpm_2s cost two."
    )
    boundary_weight: float = HfArg(
        default=1.0, help="Weight of the loss at pure noise, where the teacher's way begins."
    )
    shift: float | None = HfArg(
        default=None, help="Teachers of a flow: shift of the time grid; that of the teacher's scheduler if not given."
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.solver not in SOLVERS:
            raise UserError(f"Unknown --solver {self.solver!r}; one of {', '.join(SOLVERS)}.")


class BOOTObjective:
    """Of noise e the student answers y(e, t), where x_t = alpha_t y + sigma_t e is the teacher's way from there.

    The way begins with the teacher's own answer to pure noise, y(e, T) = D(e, T), and a step of its ODE takes y(e, t) to
    y(e, s) (the paper's Signal-ODE; with DDIM y_s = (1 - r) D(x_t, t) + r y_t with r = e^(lam_t - lam_s), between 0 and 1,
    lam = log(alpha / sigma)). Left alone, each equation has the solutions of all beginnings: the loss at T chooses.

    The student's network is shown the same noise at every t. Told t, as in the paper, it would have its answer ready at t = 0,
    where no sampler begins. Here it is told a time that ends at T where t ends at 0: its answer to pure noise at T is the
    data, as a sampler of one step asks. The times told before lie close to T, for there the network that it is made from
    knows pure noise.

    Args:
        config: See `BOOTConfig`.
        teaching: Of the teacher, on the grid of the config.
        shape: Of a sample, (C, h, w): no data say it.
    """

    def __init__(self, config: BOOTConfig, teaching: Teaching, shape: tuple[int, ...]) -> None:
        teaching.check_start(config.solver == "ddim", "--solver ddim", config.solver)
        if not (teaching.grid > teaching.before).all():
            raise UserError(
                f"--num_ddim_timesteps {config.num_ddim_timesteps} makes a first step of the grid that goes nowhere; give at most half "
                "as many as the teacher has."
            )
        self.config, self.teaching, self.shape = config, teaching, shape
        self.players = {"student": self}

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        t, s = self.teaching.pairs(batch.size)
        like = next(iter(batch.cond.values()))
        noise = torch.randn(batch.size, *self.shape, device=like.device)
        w = torch.empty(batch.size, device=like.device).uniform_(self.config.w_min, self.config.w_max)
        with torch.no_grad(), rewind_rng(like.device):  # y_s has the dropout masks of y_t
            y_t = self.signal(nets.student, noise, t, batch.cond, w)
            target = self.along(self.teaching.guided(nets.teacher, batch, w), y_t, noise, t, s)
        y_s = self.signal(nets.student, noise, s, batch.cond, w)
        share = append_dims((t - s) / self.teaching.grid[-1], noise)  # delta, where all of time is 1
        way = ((y_s - target) / share).square().mean()  # its bootstrapping loss
        boundary = self.boundary(nets, batch, noise, w)
        logs = {"w": w.mean(), "way": way.detach(), "boundary": boundary.detach()}
        return Loss(way + self.config.boundary_weight * boundary, logs)

    def boundary(self, nets: Networks, batch: Batch, noise: Tensor, w: Tensor) -> Tensor:
        """How far the signal of some of the batch is at T from the teacher's answer to pure noise."""
        some = slice(-(-batch.size // BOUNDARY_EVERY))
        cond, uncond = ({name: value[some] for name, value in each.items()} for each in (batch.cond, batch.uncond))
        noise, w = noise[some], w[some]
        last = self.teaching.grid[-1].expand(len(noise))
        with torch.no_grad():
            guided = self.teaching.guided(nets.teacher, Batch(None, cond, uncond), w)
            beginning = guided(self.start(noise), last).x0
        return (self.signal(nets.student, noise, last, cond, w) - beginning).square().mean()

    def along(self, denoise: Denoiser, y_t: Tensor, noise: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Where a step of the teacher's ODE takes the signal y_t of this noise, `(B, ...)`."""
        process = self.teaching.process
        x_t = append_dims(process.alpha(t), noise) * y_t + append_dims(process.sigma(t), noise) * noise
        x_s = SOLVERS[self.config.solver](denoise, process, x_t, t, s)
        return (x_s - append_dims(process.sigma(s), noise) * noise) / append_dims(process.alpha(s), noise)

    def signal(self, network: nn.Module, noise: Tensor, t: Tensor, cond: Conditions, w: Tensor) -> Tensor:
        """y(noise, t) `(B, ...)`: the jump from pure noise of a network that is told near T how far t is from the end."""
        teaching, last = self.teaching, self.teaching.grid[-1]
        told = as_like(last - (t - teaching.before[0]) * TOLD_SPAN, noise)

        def call(network: nn.Module, x: Tensor, _: Tensor, cond: Conditions) -> Tensor:
            return teaching.call(network, x, told, cond)

        return replace(teaching, call=call).jump(network, self.start(noise), last.expand(len(t)), cond, w)

    def start(self, noise: Tensor) -> Tensor:
        """Where sampling starts: at T, noise of the spread that data of unit variance have there."""
        process, last = self.teaching.process, self.teaching.grid[-1:]
        return append_dims(torch.hypot(process.alpha(last), process.sigma(last)), noise) * noise
