"""Phased consistency distillation: PCM (2405.18407), jumps to the end of a phase, and a critic of the consistency."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.adversarial import AdversarialConfig, Adversary, check_choices
from cm_diffusers.diffusion.distances import DISTANCES
from cm_diffusers.diffusion.process import as_like, diffuse, diffuse_further
from cm_diffusers.diffusion.rng import rewind_rng
from cm_diffusers.diffusion.solvers import SOLVERS
from cm_diffusers.diffusion.teaching import Teaching
from cm_diffusers.diffusion.times import Phases
from cm_diffusers.types import Batch, Loss, Networks, Progress


@dataclass
class PCMConfig(AdversarialConfig):
    """How many phases there are, and how the target is formed."""

    gamma: ClassVar[float] = 0.0  # of its sampling
    phases: int = HfArg(default=4, help="Jumps from noise to data, and the steps of its sampling.")
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
        super().__post_init__()
        check_choices(self, solver=SOLVERS, loss_type=DISTANCES)


class Drawn(NamedTuple):
    """A batch of starts.

    Attributes:
        x_t: Noisy data `(B, ...)`.
        t, s: Neighbours on the grid `(B,)`.
        number: Of t on the grid `(B,)`.
        w: Guidance `(B,)`.
    """

    x_t: Tensor
    t: Tensor
    s: Tensor
    number: Tensor
    w: Tensor


class PCMObjective:
    """The jump from t to the end of its phase agrees with the target's, from where the guided teacher gets in one solver step.

    With one phase it is LCM with the scalings of DDIM's jump to 0, with as many as the grid has points the teacher's own step.

    Args:
        config: See `PCMConfig`.
        teaching: Of the teacher, on the grid of the config.
        critic: Whether there is one, in `Networks.critic`: (x `(B, ...)`, t `(B,)`, cond) -> logits `(B, N)`.
    """

    def __init__(self, config: PCMConfig, teaching: Teaching, critic: bool) -> None:
        teaching.check_start(config.solver == "ddim", "--solver ddim", config.solver)
        self.config, self.teaching = config, teaching
        self.phases = Phases.of(teaching.grid, teaching.before, config.phases)
        self.adversary = Adversary(config, critic)
        self.players = {"student": self} | ({"critic": self.judge} if critic else {})

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        drawn = self.draw(batch)
        target = self.target(nets, batch, drawn)  # first: its activations are gone before the student's are kept
        end = self.phases.end[drawn.number]
        online = self.teaching.jump_to(nets.student, drawn.x_t, drawn.t, end, batch.cond, drawn.w)
        value = DISTANCES[self.config.loss_type](online, target).mean()
        logs = {"w": drawn.w.mean(), "consistency": value.detach()}

        def logits(fake: Tensor) -> Tensor:
            x, times = self.shown([fake], drawn.number)
            return nets.critic(x, times, batch.cond)

        value, more = self.adversary.join(value, online, logits, progress)
        return Loss(value, logs | more)

    def judge(self, nets: Networks, batch: Batch, progress: Progress) -> Loss | None:
        """The critic's turn: real is the target, so that consistency is where both rest."""
        if not self.adversary.plays(progress):
            return None
        drawn = self.draw(batch)
        target, end = self.target(nets, batch, drawn), self.phases.end[drawn.number]
        with torch.no_grad():
            online = self.teaching.jump_to(nets.student, drawn.x_t, drawn.t, end, batch.cond, drawn.w)
        return self.adversary.judge(nets.critic, *self.shown([target, online], drawn.number), batch.cond)

    def draw(self, batch: Batch) -> Drawn:
        """Starts on the grid, uniformly."""
        x0, teaching = batch.x0, self.teaching
        number = torch.randint(len(teaching.grid), (len(x0),))
        w = torch.empty(len(x0), device=x0.device).uniform_(self.config.w_min, self.config.w_max)
        t = teaching.grid[number]
        return Drawn(diffuse(teaching.process, x0, torch.randn_like(x0), t), t, teaching.before[number], number, w)

    @torch.no_grad()
    def target(self, nets: Networks, batch: Batch, drawn: Drawn) -> Tensor:
        """The target's jump to the end of the phase of t, `(B, ...)`; the teacher's step itself where that ends there."""
        teaching = self.teaching
        guided = teaching.guided(nets.teacher, batch, drawn.w)
        x_s = SOLVERS[self.config.solver](guided, teaching.process, drawn.x_t, drawn.t, drawn.s)
        end = self.phases.end[drawn.number]
        with rewind_rng(x_s.device):  # the student draws the same dropout masks
            return teaching.jump_to(nets.target or nets.student, x_s, drawn.s, end, batch.cond, drawn.w)

    def shown(self, samples: list[Tensor], number: Tensor) -> tuple[Tensor, Tensor]:
        """What the critic sees `(N B, ...)` and is told `(N B,)` of N times B samples at the ends of their phases.

        All get the same noise, up to one random time of the phase each.
        """
        times, end, start = self.teaching.times, self.phases.end[number], self.phases.start[number]
        low = torch.searchsorted(times, end)
        above = torch.searchsorted(times, start, right=True) - low
        u = times[low + (torch.rand(len(end)) * above).long()]
        noise = torch.randn_like(samples[0])
        noised = [diffuse_further(self.teaching.process, x, noise, end, u) for x in samples]
        told = as_like(u, noise) if u.is_floating_point() else u.to(noise.device)
        return torch.cat(noised), told.repeat(len(samples))
