"""Trajectory consistency distillation: TCD (2402.19159), jumps from any time of the grid to any time below."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.adversarial import check_choices
from cm_diffusers.diffusion.distances import DISTANCES
from cm_diffusers.diffusion.process import RectifiedFlow, as_like, diffuse, exact
from cm_diffusers.diffusion.rng import rewind_rng
from cm_diffusers.diffusion.solvers import SOLVERS
from cm_diffusers.diffusion.teaching import Teaching
from cm_diffusers.diffusion.times import Phases
from cm_diffusers.ranges import check_ranges
from cm_diffusers.types import Batch, Loss, Networks, Progress


GAMMA = 0.3  # share of fresh noise in its sampling (Sec. 4.3)


@dataclass
class TCDConfig:
    """Where jumps end, what the student is told of that, and how the target is formed."""

    order: Literal[1, 2] = HfArg(
        default=1,
        help="Of the trajectory function: 1 is DDIM's step, as in sampling; 2 a second-order one of two passes, which no "
        "sampler takes.",
    )
    phases: int | None = HfArg(
        default=None, help="Jumps end where phases do, so many on the grid; at any time below if not given."
    )
    target_time: Literal["none", "embedded"] = HfArg(
        default="none",
        help="none: the student is not told where its jump ends (the paper). embedded: it is, by an input of a UNet, which "
        "diffusers alone does not give.",
    )
    num_ddim_timesteps: int = HfArg(default=50, help="Points of the time grid; the sampler must know them.")
    w_min: float = HfArg(default=2.0, help="Least guidance w; w = guidance_scale - 1, so 0 means none.")
    w_max: float = HfArg(default=14.0, help="Greatest guidance w.")
    solver: Literal["ddim", "heun", "dpm_2s"] = HfArg(
        default="ddim", help="The teacher's ODE step; heun and dpm_2s cost two."
    )
    loss_type: Literal["huber", "l2"] = HfArg(default="huber", help="Distance between student and target.")
    shift: float | None = HfArg(
        default=None, help="Teachers of a flow: shift of the time grid; that of the teacher's scheduler if not given."
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        check_choices(self, order=(1, 2), target_time=("none", "embedded"), solver=SOLVERS, loss_type=DISTANCES)

    @property
    def gamma(self) -> float:
        """Of its sampling: with phases the jumps to their ends are what was learnt."""
        return GAMMA if self.phases is None else 0.0


class TCDObjective:
    """The jump from t to s agrees with the target's, from where the guided teacher gets in one solver step (Sec. 4.2).

    With s = 0 it is consistency distillation without scalings. At the second order the trajectory function is
    DPM-Solver++'s, for rectified flow Heun's: at s = 0 the other's middle would be s itself.

    Args:
        config: See `TCDConfig`.
        teaching: Of the teacher, on the grid of the config.
    """

    def __init__(self, config: TCDConfig, teaching: Teaching) -> None:
        first = config.solver == "ddim" and config.order == 1
        teaching.check_start(first, "--solver ddim --order 1", f"{config.solver} and order {config.order}")
        self.config, self.teaching = config, teaching
        second = "heun" if isinstance(teaching.process, RectifiedFlow) else "dpm_2s"
        self.step = "ddim" if config.order == 1 else second
        self.phases = config.phases and Phases.of(teaching.grid, teaching.before, config.phases)
        self.players = {"student": self}

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        config, teaching, x0, device = self.config, self.teaching, batch.x0, batch.x0.device
        number = torch.randint(len(teaching.grid), (len(x0),))
        t, before = teaching.grid[number], teaching.before[number]
        w = torch.empty(len(x0), device=device).uniform_(config.w_min, config.w_max)
        x_t = diffuse(teaching.process, x0, torch.randn_like(x0), t)
        s = self.ends(number)
        with torch.no_grad():  # first, so that its activations are gone before the student's are kept
            guided = teaching.guided(nets.teacher, batch, w)
            x_before = SOLVERS[config.solver](guided, teaching.process, x_t, t, before)
            with rewind_rng(device):  # the student draws the same dropout masks
                target = teaching.jump_to(nets.target or nets.student, x_before, before, s, batch.cond, w, self.step)
        online = teaching.jump_to(nets.student, x_t, t, s, batch.cond, w, self.step)
        return Loss(
            DISTANCES[config.loss_type](online, target).mean(), {"w": w.mean(), "s": as_like(exact(s).mean(), x0)}
        )

    def ends(self, number: Tensor) -> Tensor:
        """Where jumps from these times of the grid end `(B,)`: at most where the teacher's step does, uniformly."""
        if self.phases:
            return self.phases.end[number]
        before = self.teaching.before[number]
        share = torch.rand(len(before), dtype=torch.float64)
        return share * before if before.is_floating_point() else (share * (before + 1)).long()
