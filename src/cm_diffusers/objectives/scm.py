"""Continuous-time consistency models: sCM (2410.11081), from data alone (sCT) or from a diffusion model (sCD)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.distribution_matching import DistributionMatching
from cm_diffusers.diffusion.guidance import Conditions, Denoiser
from cm_diffusers.diffusion.process import Prediction, TrigFlow, append_dims, as_like, diffuse
from cm_diffusers.diffusion.rng import rewind_rng
from cm_diffusers.diffusion.tangent import TANGENTS, derivative, step_of
from cm_diffusers.diffusion.teaching import Guiding
from cm_diffusers.diffusion.times import sample_lognormal
from cm_diffusers.diffusion.trigflow import TrigFlowView, trigflow_denoiser, velocity
from cm_diffusers.diffusion.views import check_sigmas
from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError
from cm_diffusers.ranges import check_ranges
from cm_diffusers.types import Batch, Loss, Networks, Progress


NORMALIZATIONS = {  # of a tangent `(B, ...)` with the norms `(B, 1, ...)` per sample; c is added to them
    "l2": lambda g, c: g / (_norm(g) + c),
    "rms": lambda g, c: g / (_norm(g) / math.sqrt(g[0].numel()) + c),
    "clip": lambda g, c: g.clamp(-1, 1),
    "none": lambda g, c: g,
}


@dataclass
class SCMConfig:
    """Where and how the tangent is taken. Defaults are those of CIFAR-10."""

    sigma_min: float = HfArg(
        default=0.002, help="Least noise of training, as EDM counts it: t = atan(sigma / sigma_data)."
    )
    sigma_max: float = HfArg(default=80.0, help="Most noise, where sampling starts.")
    p_mean: float = HfArg(default=-1.0, help="Mean of ln sigma in training.")
    p_std: float = HfArg(default=1.4, help="Standard deviation of ln sigma in training.")
    tangent: Literal["jvp", "central", "one_sided", "semi"] = HfArg(
        default="jvp",
        help="Derivative of the network along the flow: exact, by differences of three or two passes, or exact in x alone.",
    )
    tangent_step: float | None = HfArg(
        default=None,
        help="Step of a difference, in the time that the network is told; if not given, where differences in float32 err least.",
    )
    tangent_warmup_steps: int = HfArg(
        default=10_000, help="Optimizer steps in which the derivative comes in, linearly."
    )
    tangent_normalization: Literal["l2", "rms", "clip", "none"] = HfArg(
        default="l2",
        help="Divide a sample's tangent by its norm, or by its root mean square, plus c; or clip it to [-1, 1].",
    )
    tangent_c: float = HfArg(default=0.1, help="c of the normalization.")
    learned_weight: bool = HfArg(
        default=True, help="Weight times by w_phi(t), a head that learns to make them count alike."
    )
    prior_weight: bool = HfArg(default=False, help="Weight times by 1 / sigma besides, as some published code does.")
    segments: int = HfArg(
        default=1, help="Train for so many steps, one in each segment of [0, t_max]; 1 is a consistency model."
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        for name, known in (("tangent", TANGENTS), ("tangent_normalization", NORMALIZATIONS)):
            if getattr(self, name) not in known:
                raise UserError(f"Unknown --{name} {getattr(self, name)!r}; one of {', '.join(known)}.")
        if self.tangent == "jvp":
            refuse_changed(self, "tangent_step", "with --tangent jvp")
        if self.tangent_normalization in ("clip", "none"):
            refuse_changed(self, "tangent_c", f"with --tangent_normalization {self.tangent_normalization}")


@dataclass
class SCDConfig:
    """What the teacher tells."""

    w_min: float = HfArg(default=0.0, help="Least guidance of the teacher; w = guidance_scale - 1, so 0 means none.")
    w_max: float = HfArg(
        default=0.0,
        help="Greatest guidance: each sample draws its own, which a full student is told; the same as --w_min goes into "
        "the weights.",
    )
    dmd_weight: float = HfArg(
        default=0.0,
        help="Weight of distribution matching, which rCM adds, with 0.01: once the tangent is warm, a second network "
        "learns what the student's samples are like, and they move to where the teacher finds them likelier. 0 is none.",
    )

    def __post_init__(self) -> None:
        check_ranges(self)


class SCMObjective:
    """The student's jump does not change along the flow, whose direction the teacher tells, or a sample of data and noise.

    There is no averaged target: leave `Networks.target` None. With a learned weight the student is a `WithTimeWeight`.

    Args:
        config: See `SCMConfig`.
        view: How student and teacher are called.
        w: Least and greatest guidance of the teacher, drawn for each sample.
        guiding: How it reaches the teacher, and a student that is told it.
        dmd_weight: Of the regulariser of rCM (2510.08431); above 0, `Networks.critic` is the fake score.
    """

    takes_derivatives = True

    def __init__(
        self,
        config: SCMConfig,
        view: TrigFlowView,
        w: tuple[float, float] = (0.0, 0.0),
        guiding: Guiding = Guiding(),  # noqa: B008 (frozen)
        dmd_weight: float = 0.0,
    ) -> None:
        check_sigmas(view, config.sigma_min, config.sigma_max)
        self.config, self.view, self.w, self.guiding = config, view, w, guiding
        self.process, self.t_max = TrigFlow(view.sigma_data), math.atan(config.sigma_max / view.sigma_data)
        most = int(self.t_max / math.atan(config.sigma_min / view.sigma_data))
        if config.segments > most:
            raise UserError(
                f"--segments {config.segments} would have some below --sigma_min {config.sigma_min}, where nothing is trained; "
                f"give at most {most}."
            )
        self.dmd_weight = dmd_weight
        self.matching = DistributionMatching(self.process, config.sigma_min, config.sigma_max)
        self.players = {"student": self} | ({"critic": self.score} if dmd_weight else {})

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        x0, d = batch.x0, self.view.sigma_data
        t, noise = self.times(len(x0)), torch.randn_like(x0)
        x_t = diffuse(self.process, x0, noise, t)
        cond, teach = self.guided(batch, nets)
        with torch.no_grad():
            data = Prediction(x0, noise) if nets.teacher is None else teach(x_t, t)
            dx = velocity(data, t, d)
            with rewind_rng(x0.device):  # the pass that learns draws the same dropout masks
                tangent = self.tangent(nets.student, cond, x_t, t, dx, self.warmup(progress))
        usable = tangent.isfinite().flatten(1).all(1)
        g = NORMALIZATIONS[self.config.tangent_normalization](tangent, self.config.tangent_c)
        g = torch.where(append_dims(usable, g).bool(), g, 0)
        online, w = self.weighted(nets.student, x_t, t, cond)
        error = (online - online.detach() - g).square().flatten(1).mean(1)  # Eq. 8
        weight = w.exp() * as_like(1 / (d * torch.tan(t)), w) if self.config.prior_weight else w.exp()
        value = torch.where(usable, weight * error - w, 0).mean()
        logs = self.logs(progress, t, tangent, usable, weight.detach() * error.detach())
        if self.matches(progress):
            denoisers = (self.denoiser(nets.student, cond), teach, self.denoiser(nets.critic, cond))
            matching = self.matching.student_loss(*denoisers, x0, progress.step).mean()
            # a learned weight makes a sum over the values of Eq. 8's mean, and the published weight is of two sums
            values = x0[0].numel() if self.config.learned_weight else 1
            value, logs["matching"] = value + self.dmd_weight * values * matching, matching.detach()
        return Loss(value, logs)

    def score(self, nets: Networks, batch: Batch, progress: Progress) -> Loss | None:
        """The fake score's turn: it is told what the student is told, and has no guidance."""
        if not self.matches(progress):
            return None
        cond, _ = self.guided(batch, nets)
        denoisers = self.denoiser(nets.student, cond), self.denoiser(nets.critic, cond)
        value = self.matching.fake_loss(*denoisers, batch.x0, progress.step).mean()
        return Loss(value, {"critic/loss": value.detach()})

    def matches(self, progress: Progress) -> bool:
        return self.dmd_weight > 0 and progress.step >= self.config.tangent_warmup_steps

    def denoiser(self, network: nn.Module, cond: Conditions) -> Denoiser:
        denoise = trigflow_denoiser(self.view, network)
        return lambda x, t: denoise(x, t, cond)

    def tangent(
        self, student: nn.Module, cond: dict[str, Tensor], x: Tensor, t: Tensor, dx: Tensor, r: float
    ) -> Tensor:
        """g = cos(u) df / dt (Alg. 1) with u = t - s, of f = cos(u) x - sin(u) sigma_data F, the jump to s, `(B, ...)`.

        cos(u) sin(u) goes into the directions of the derivative, where half precision bears it (Sec. 5.1).
        """
        u, d = t - self.lower(t), self.view.sigma_data
        cos, sin = torch.cos(u), torch.sin(u)
        share = cos * sin
        h = step_of(self.view.told, t, share, self.config.tangent_step or self.view.difference_step)
        h = torch.minimum(h, torch.minimum(t, math.pi / 2 - t) / 2 / share)  # beyond 0 and pi / 2 there is no sigma

        def function(x: Tensor, t: Tensor) -> Tensor:
            return self.view(student, x, t, cond)

        kind, moved = self.config.tangent, append_dims(share, x) * dx
        output, slope = derivative(kind, student, function, x, t, moved, share, h)
        return -append_dims(cos**2, x) * (d * output - dx) - r * (append_dims(share, x) * x + d * slope)

    def guided(self, batch: Batch, nets: Networks) -> tuple:
        """The student's conditions, and the teacher's denoiser."""
        if nets.teacher is None:
            return batch.cond, None
        low, high = self.w
        w = low + (high - low) * torch.rand(len(batch.x0), device=batch.x0.device)
        cond = self.guiding.student(batch.cond, w)
        if self.guiding.kind == "cfg" and low == high == 0:
            return cond, self.denoiser(nets.teacher, batch.cond)
        if self.guiding.kind == "cfg" and not batch.uncond:
            raise UserError(
                "Guidance needs a teacher with a null condition, but the data has no unconditional branch; give --w_min 0 "
                "--w_max 0."
            )
        return cond, self.guiding.teacher(trigflow_denoiser(self.view, nets.teacher), batch, w)

    def weighted(self, student: nn.Module, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """F `(B, ...)` and w_phi `(B,)`, which is 0 where it is not learned."""
        answers = [x.new_zeros(len(x))]
        with student.register_forward_hook(lambda network, given, output: answers.extend(output[1:])):
            return self.view(student, x, t, cond), answers[-1]

    def times(self, batch_size: int) -> Tensor:
        """t `(B,)` (Alg. 1): ln(sigma_data tan(t)) is normal."""
        c = self.config
        sigma = sample_lognormal(batch_size, c.p_mean, c.p_std, c.sigma_min, c.sigma_max)
        return torch.atan(sigma / self.view.sigma_data)

    def lower(self, t: Tensor) -> Tensor:
        """Where the segment of t `(B,)` ends, towards the data."""
        length = self.t_max / self.config.segments
        return (t / length).floor().clamp(max=self.config.segments - 1) * length

    def warmup(self, progress: Progress) -> float:
        """r, the share of the derivative (Alg. 1)."""
        steps = self.config.tangent_warmup_steps
        return min(1.0, progress.step / steps) if steps else 1.0

    def logs(self, progress: Progress, t: Tensor, g: Tensor, usable: Tensor, residual: Tensor) -> dict[str, Tensor]:
        """The residual of the weighted loss is 1 at all times once w_phi is right; here of the lower and upper half of t."""
        order = t.argsort().to(residual.device)
        low, high = residual[order].tensor_split(2) if len(t) > 1 else (residual, residual)
        norms = torch.where(usable, _norm(g).flatten(), 0)
        return {
            "tangent_norm": norms.mean(),
            "tangent_max": norms.max(),
            "warmup": g.new_full((), self.warmup(progress)),
            "residual_low": low.mean(),
            "residual_high": high.mean(),
            "left_out": 1 - usable.float().mean(),
        }


def _norm(g: Tensor) -> Tensor:
    """The L2 norm of each sample, `(B, 1, ...)`."""
    return torch.linalg.vector_norm(g.flatten(1), dim=1).reshape(-1, *[1] * (g.ndim - 1))
