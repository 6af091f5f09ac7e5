"""Losses between a critic and what it judges, on its logits `(B, N)`: pure functions, one scalar each.

Every logit counts the same: those of all places of a map, and of all maps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.functional import relu
from transformers.hf_argparser import HfArg

from cm_diffusers.errors import UserError
from cm_diffusers.ranges import check_ranges
from cm_diffusers.types import Loss, Progress


R1_NOISE = 0.1  # standard deviation of the disturbance, in units of the latents
FP16_SCALE = 2.0**12  # the gradient of a mean over many logits would vanish in float16


class AdversarialLoss(NamedTuple):
    """
    Attributes:
        critic: (real logits, fake logits) -> what the critic minimises.
        generator: fake logits -> what the generator minimises.
        boundary: Logits above it say "real".
    """

    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]
    boundary: float


def hinge_critic(real: Tensor, fake: Tensor) -> Tensor:
    """1705.02894, Eq. 3; exactly 2 where all logits are 0."""
    return relu(1 - real).mean() + relu(1 + fake).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    return -fake.mean()


def lsgan_critic(real: Tensor, fake: Tensor) -> Tensor:
    """1611.04076, Eq. 2 with labels 0 and 1."""
    return ((real - 1).square().mean() + fake.square().mean()) / 2


def lsgan_generator(fake: Tensor) -> Tensor:
    return (fake - 1).square().mean() / 2


ADVERSARIAL_LOSSES = {
    "hinge": AdversarialLoss(hinge_critic, hinge_generator, 0.0),
    "lsgan": AdversarialLoss(lsgan_critic, lsgan_generator, 0.5),
}


def accuracy(real: Tensor, fake: Tensor, boundary: float) -> Tensor:
    """Share of right answers; a logit on the boundary is half right."""
    return 0.5 + ((real - boundary).sign().mean() - (fake - boundary).sign().mean()) / 4


def approximate_r1(logits: Tensor, disturbed: Tensor) -> Tensor:
    """Mean squared change of the logits under a little noise on the input: R1 without a second backward pass."""
    return (logits - disturbed).square().mean()


def adaptive_weight(hold: Tensor, pull: Tensor, least: float = 0.01, most: float = 10.0) -> Tensor:
    """How much stronger the gradient `hold` is than `pull`: the weight that makes them equal, within bounds.

    2012.09841, Eq. 7, with the bounds that 2310.02279 has for its critic; here of gradients at the sample `(B, ...)`, which every student has,
    adapters or not.
    """
    return (hold.norm() / pull.norm().clamp(min=1e-12)).nan_to_num(0.0).clamp(least, most).detach()


def gradient_at(x: Tensor, value: Tensor, retain_graph: bool = False) -> Tensor:
    """Of a scalar, `(B, ...)`: on its way through a network in float16 it would vanish."""
    return torch.autograd.grad(value * FP16_SCALE, x, retain_graph=retain_graph)[0] / FP16_SCALE


def detour(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """loss(x) and its gradient at x, the same shape as x.

    The value back-propagates into x as loss(x) would, but the graph of `loss` is gone already: its memory is free
    before the graph of x is used.
    """
    leaf = x.detach().requires_grad_()
    value = loss(leaf)
    gradient = gradient_at(leaf, value)
    return _Known.apply(x, value.detach(), gradient), gradient


class _Known(torch.autograd.Function):
    """A scalar whose gradient is known already; if that overflowed, the value is not touched by it."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, scale: Tensor) -> tuple[Tensor, None, None]:
        return scale * ctx.saved_tensors[0], None, None


@dataclass
class AdversarialConfig:
    """How much a critic counts beside a distillation, and when."""

    adversarial_weight: float = HfArg(default=0.1, help="Weight of the adversarial term.")
    adversarial_balance: Literal["fixed", "adaptive"] = HfArg(
        default="fixed",
        help="adaptive: the weight is in units of the distillation's gradient at the samples over the critic's, at least "
        "0.01 and at most 10 of it, of each process and micro-batch.",
    )
    adversarial_start: int = HfArg(default=250, help="First step with a critic; before, distillation alone.")
    adversarial_ramp: int = HfArg(default=250, help="Steps from there in which its weight grows from 0.")
    adversarial_loss: Literal["hinge", "lsgan"] = HfArg(default="hinge", help="What critic and student play for.")
    r1_weight: float = HfArg(default=0.0, help="Weight of the critic's approximate R1 penalty, e.g. 100.")

    def __post_init__(self) -> None:
        check_ranges(self)
        check_choices(self, adversarial_loss=ADVERSARIAL_LOSSES, adversarial_balance=("fixed", "adaptive"))


def check_choices(config: object, **known: object) -> None:
    """
    Args:
        known: Field of the config -> its choices.

    Raises:
        ValueError: A field is none of its choices.
    """
    for name, choices in known.items():
        if getattr(config, name) not in choices:
            raise UserError(f"Unknown --{name} {getattr(config, name)!r}; one of {', '.join(map(str, choices))}.")


class Adversary:
    """The game of student and critic beside a distillation.

    Args:
        config: See `AdversarialConfig`.
        present: Whether there is a critic.
    """

    def __init__(self, config: AdversarialConfig, present: bool) -> None:
        self.config, self.present, self.loss = config, present, ADVERSARIAL_LOSSES[config.adversarial_loss]

    def plays(self, progress: Progress) -> bool:
        return self.present and progress.step >= self.config.adversarial_start

    def weight(self, progress: Progress) -> float:
        """Of the adversarial term: 0, then a ramp, then `adversarial_weight`."""
        if not self.plays(progress):
            return 0.0
        done, ramp = progress.step - self.config.adversarial_start, self.config.adversarial_ramp
        return self.config.adversarial_weight * (min(1.0, done / ramp) if ramp else 1.0)

    def join(
        self, value: Tensor, online: Tensor, logits: Callable[[Tensor], Tensor], progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's loss with the critic's part, and what to log.

        Args:
            value: The distillation's, a scalar.
            online: The student's samples `(B, ...)`, of which it was made.
            logits: Of the critic for such samples.
        """
        weight = self.weight(progress)
        if weight == 0:
            return value, {}
        adversarial, pull = detour(lambda fake: self.loss.generator(logits(fake)), online)
        hold = gradient_at(online, value, retain_graph=True)
        balance = adaptive_weight(hold, pull) if self.config.adversarial_balance == "adaptive" else value.new_ones(())
        weight = weight * balance
        logs = {"adversarial": adversarial.detach(), "adversarial_weight": weight}
        logs["gradient_ratio"] = weight * pull.norm() / hold.norm().clamp(min=1e-12)  # at the student's output
        return value + weight * adversarial, logs

    def judge(self, critic: nn.Module, x: Tensor, times: Tensor, cond: dict[str, Tensor]) -> Loss:
        """The critic's loss.

        Args:
            x: Real and fake samples, `(2 B, ...)`.
            times: What it is told of their noise `(2 B,)`.
            cond: Of both, each `(B, ...)`.
        """
        size = len(x) // 2
        if self.config.r1_weight:
            near = x[:size] + R1_NOISE * torch.randn_like(x[:size])
            x, times = torch.cat([x, near]), torch.cat([times, times[:size]])
        copies = len(x) // size
        cond = {name: torch.cat([value] * copies) for name, value in cond.items()}
        on_real, on_fake, *on_near = critic(x, times, cond).chunk(copies)  # one call: DDP counts them
        value = self.loss.critic(on_real, on_fake)
        if on_near:
            value = value + self.config.r1_weight * approximate_r1(on_real, on_near[0])
        right = accuracy(on_real, on_fake, self.loss.boundary)
        found = {"loss": value, "accuracy": right, "real": on_real.mean(), "fake": on_fake.mean()}
        return Loss(value, {f"critic/{name}": number.detach() for name, number in found.items()})
