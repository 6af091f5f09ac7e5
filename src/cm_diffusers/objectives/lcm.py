"""Latent consistency distillation: LCM (2310.04378, Alg. 1) and LCM-LoRA (2311.05556)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.distances import DISTANCES
from cm_diffusers.diffusion.process import diffuse
from cm_diffusers.diffusion.rng import rewind_rng
from cm_diffusers.diffusion.solvers import SOLVERS
from cm_diffusers.diffusion.teaching import Teaching
from cm_diffusers.errors import UserError
from cm_diffusers.types import Batch, Loss, Networks, Progress


@dataclass
class LCMConfig:
    """How the consistency target is formed."""

    num_ddim_timesteps: int = HfArg(
        default=25,
        help="Points of the time grid; the sampler must know them. The paper's are 50; 25 were better in trainings of some hundred "
        "updates (docs/results/defaults.md).",
    )
    w_min: float = HfArg(default=2.0, help="Least guidance w; w = guidance_scale - 1, so 0 means none.")
    w_max: float = HfArg(default=14.0, help="Greatest guidance w.")
    solver: Literal["ddim", "heun", "dpm_2s"] = HfArg(
        default="ddim", help="The teacher's ODE step; heun and dpm_2s cost two."
    )
    loss_type: Literal["huber", "l2"] = HfArg(default="huber", help="Distance between student and target.")
    timestep_scaling_factor: float = HfArg(default=10.0, help="Scale of t in the boundary scalings.")
    time_power: float = HfArg(
        default=1.0,
        help="The k-th time of the grid is drawn with a chance proportional to k to this power: 0, all alike, is the paper's; 1 "
        "draws noisy ones more often, which was better (docs/results/defaults.md).",
    )
    shift: float | None = HfArg(
        default=None, help="Teachers of a flow: shift of the time grid; that of the teacher's scheduler if not given."
    )


class LCMObjective:
    """A jump from t agrees with the target's jump from where the guided teacher gets in one solver step.

    Args:
        config: See `LCMConfig`.
        teaching: Of the teacher, on the grid of the config.
    """

    def __init__(self, config: LCMConfig, teaching: Teaching) -> None:
        if config.w_min > config.w_max:
            raise UserError(f"--w_min {config.w_min} is above --w_max {config.w_max}; swap them.")
        for kind, choice, known in (("solver", config.solver, SOLVERS), ("loss_type", config.loss_type, DISTANCES)):
            if choice not in known:
                raise UserError(f"Unknown --{kind} {choice!r}; one of {', '.join(known)}.")
        teaching.check_start(config.solver == "ddim", "--solver ddim", config.solver)
        self.config, self.teaching = config, teaching
        self.players = {"student": self}

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        online, target, w = self.pair(nets, batch)
        return Loss(self.distance(online, target), {"w": w.mean()})

    def distance(self, online: Tensor, target: Tensor) -> Tensor:
        return DISTANCES[self.config.loss_type](online, target).mean()  # Algorithm 1

    def pair(self, nets: Networks, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The student's jump from t, with a gradient, the target's from s, each `(B, ...)`, and the guidance w `(B,)`."""
        config, teaching, x0, device = self.config, self.teaching, batch.x0, batch.x0.device
        t, s = teaching.pairs(len(x0), config.time_power)
        w = torch.empty(len(x0), device=device).uniform_(config.w_min, config.w_max)
        x_t = diffuse(teaching.process, x0, torch.randn_like(x0), t)
        with torch.no_grad():  # first, so that its activations are gone before the student's are kept
            guided = teaching.guided(nets.teacher, batch, w)
            x_s = SOLVERS[config.solver](guided, teaching.process, x_t, t, s)  # Sec. 4.2 and 4.3
            with rewind_rng(device):  # the student draws the same dropout masks
                target = teaching.jump(nets.target or nets.student, x_s, s, batch.cond, w)
        return teaching.jump(nets.student, x_t, t, batch.cond, w), target, w
