"""Losses between a critic and what it judges, on its logits `(B, N)`: pure functions, one scalar each.

Every logit counts the same: those of all places of a map, and of all maps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import relu


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


def detour(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """loss(x) and its gradient at x, the same shape as x.

    The value back-propagates into x as loss(x) would, but the graph of `loss` is gone already: its memory is free
    before the graph of x is used.
    """
    leaf = x.detach().requires_grad_()
    value = loss(leaf)
    gradient = torch.autograd.grad(value * FP16_SCALE, leaf)[0] / FP16_SCALE
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
