"""Stochastic consistency distillation: SCott (2403.01505), a student of stochastic teacher steps with a critic."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.adversarial import AdversarialConfig, Adversary, check_choices
from cm_diffusers.diffusion.distances import DISTANCES
from cm_diffusers.diffusion.process import as_like, diffuse, moved_to
from cm_diffusers.diffusion.rng import rewind_rng
from cm_diffusers.diffusion.solvers import NOISE_SCALES, ddim_sde, er_sde
from cm_diffusers.diffusion.teaching import Teaching
from cm_diffusers.errors import UserError
from cm_diffusers.types import Batch, Loss, Networks, Progress


@dataclass
class SCottConfig(AdversarialConfig):
    """How the consistency target is formed, and what the critic does. Sec. 4 of the paper and its Tables 5 to 7."""

    num_ddim_timesteps: int = HfArg(default=50, help="Points of the sampler's time grid; trained is every time.")
    solver_interval: int = HfArg(default=24, help="Timesteps from t to s, which the teacher crosses for each target.")
    solver_steps: int = HfArg(default=3, help="Its steps h on the way, two passes each.")
    sde: Literal["er_sde", "ddim"] = HfArg(default="er_sde", help="Family of the stochastic steps.")
    noise_scale: Literal["ode", "sde", "sde_5"] = HfArg(default="sde_5", help="Noise of er_sde; ode adds none.")
    solver_order: Literal[1, 2] = HfArg(default=2, help="Order of er_sde.")
    eta: float = HfArg(default=0.2, help="Noise of ddim: 0 is the ODE, 1 DDPM; more noise, less variety.")
    w_min: float = HfArg(default=2.0, help="Least guidance w; w = guidance_scale - 1, so 0 means none.")
    w_max: float = HfArg(default=14.0, help="Greatest guidance w.")
    loss_type: Literal["l2", "huber"] = HfArg(default="l2", help="Distance between student and target.")
    timestep_scaling_factor: float = HfArg(default=10.0, help="Scale of t in the boundary scalings.")
    shift: float | None = HfArg(
        default=None, help="Teachers of a flow: shift of the times; that of the teacher's scheduler if not given."
    )
    critic_inputs: Literal["renoised", "clean"] = HfArg(
        default="renoised",
        help="renoised: real and fake with one random amount of noise. clean: as they are (the paper); the time that the "
        "critic is told then gives them away.",
    )
    renoise_below: int = HfArg(
        default=1000,
        help="Real and fake are re-noised to times below it. The smaller the latents, the less noise it takes to hide all "
        "difference: watch critic/accuracy.",
    )
    real_source: Literal["data", "target"] = HfArg(
        default="data", help="What is real: the data, or the student's own target, at the price of another one."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(
            self,
            noise_scale=NOISE_SCALES,
            sde=("er_sde", "ddim"),
            solver_order=(1, 2),
            loss_type=DISTANCES,
            critic_inputs=("renoised", "clean"),
            real_source=("data", "target"),
        )


class SCottObjective:
    """A jump from t agrees with the target's jump from where stochastic, guided teacher steps get; a critic judges it.

    With squared loss the student learns the mean of what the noise makes of x_t: a floor of the loss, and less variance
    the more noise there is. The critic is what brings it back.

    Args:
        config: See `SCottConfig`.
        teaching: Of the teacher, on the sampler's grid; trained is every time.
        critic: Whether there is one, in `Networks.critic`: (x `(B, ...)`, t `(B,)`, cond) -> logits `(B, N)`.
    """

    def __init__(self, config: SCottConfig, teaching: Teaching, critic: bool) -> None:
        teaching.check_start(config.sde == "ddim", "--sde ddim", config.sde)
        if config.renoise_below > (most := len(teaching.times)):
            raise UserError(f"--renoise_below is {config.renoise_below}, but the teacher has {most} timesteps.")
        self.config, self.teaching = config, teaching
        self.adversary = Adversary(config, critic)
        self.players = {"student": self} | ({"critic": self.judge} if critic else {})

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        x_t, number, w = self.draw(batch)
        t = self.teaching.times[number]
        target = self.target(
            nets, batch, x_t, number, w
        )  # first: its activations are gone before the student's are kept
        online = self.teaching.jump(nets.student, x_t, t, batch.cond, w)
        value = DISTANCES[self.config.loss_type](online, target).mean()  # Eq. 1 with weight 1
        logs = {"w": w.mean(), "consistency": value.detach()}

        def logits(fake: Tensor) -> Tensor:
            x, times = self.shown([fake], [t])
            return nets.critic(x, times, batch.cond)

        value, more = self.adversary.join(value, online, logits, progress)
        return Loss(value, logs | more)

    def judge(self, nets: Networks, batch: Batch, progress: Progress) -> Loss | None:
        """The critic's turn (Eq. 6): it does not move before its term counts."""
        if not self.adversary.plays(progress):
            return None
        x_t, number, w = self.draw(batch)
        t = self.teaching.times[number]
        with torch.no_grad():
            fake = self.teaching.jump(nets.student, x_t, t, batch.cond, w)
        real = batch.x0 if self.config.real_source == "data" else self.target(nets, batch, x_t, number, w)
        x, times = self.shown([real, fake], [torch.zeros_like(t), t])
        return self.adversary.judge(nets.critic, x, times, batch.cond)

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy data `(B, ...)`, the numbers of its times `(B,)`, any but the first, and guidance strengths `(B,)`."""
        size, device = len(batch.x0), batch.x0.device
        number = torch.randint(1, len(self.teaching.times), (size,))
        w = torch.empty(size, device=device).uniform_(self.config.w_min, self.config.w_max)
        noise = torch.randn_like(batch.x0)
        return diffuse(self.teaching.process, batch.x0, noise, self.teaching.times[number]), number, w

    @torch.no_grad()
    def target(self, nets: Networks, batch: Batch, x_t: Tensor, number: Tensor, w: Tensor) -> Tensor:
        """The target's jump from where the guided teacher gets in h stochastic steps (Eq. 2 to 5), `(B, ...)`."""
        config, teaching = self.config, self.teaching
        t, s = teaching.times[number], teaching.times[(number - config.solver_interval).clamp(min=0)]
        way = teaching.guided(nets.teacher, batch, w), teaching.process, x_t, t, s, config.solver_steps
        x_s = (
            ddim_sde(*way, config.eta)
            if config.sde == "ddim"
            else er_sde(*way, config.noise_scale, config.solver_order)
        )
        with rewind_rng(x_t.device):  # the student draws the same dropout masks
            return teaching.jump(nets.target or nets.student, x_s, s, batch.cond, w)

    def shown(self, samples: list[Tensor], times: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What the critic sees `(N B, ...)` and the times `(N B,)` it is told, of N times B samples."""
        if self.config.critic_inputs == "clean":
            return torch.cat(samples), self.told(torch.cat(times), samples[0])
        s = self.teaching.times[torch.randint(self.config.renoise_below, (len(times[0]),))]
        noise = torch.randn_like(samples[0])
        renoised = torch.cat([diffuse(self.teaching.process, x, noise, s) for x in samples])
        return renoised, self.told(s.repeat(len(samples)), noise)

    @staticmethod
    def told(times: Tensor, like: Tensor) -> Tensor:
        """Where the critic is; not every device has the float64 of a flow's times."""
        return as_like(times, like) if times.is_floating_point() else moved_to(times, like)
