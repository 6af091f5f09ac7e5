"""Derivatives of networks along a direction (dx, dt), forward: dF = dF/dx dx + dF/dt dt.

A function is (x, t) -> F with x `(B, ...)` and floating t `(B,)`, where no sample depends on another. All kinds give
(F, dF), without a graph, and draw the same dropout masks in each of their passes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cm_diffusers.diffusion.process import append_dims
from cm_diffusers.diffusion.rng import rewind_rng


Function = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def forward_ad(network: nn.Module) -> Iterator[None]:
    """Within it torch's forward-mode AD passes through the network."""

    def contiguous(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].contiguous(), *args[1:])

    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    hooks = [norm.register_forward_pre_hook(contiguous) for norm in norms]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def jvp(function: Function, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Exact, in one pass; `h` plays no part."""
    return torch.func.jvp(function, (x, t), (dx, dt))


def central(function: Function, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(F(+h) - F(-h)) / 2h, in three passes; of order h^2.

    Args:
        h: `(B,)`, see `step_of`.
    """
    ahead, behind = _moved(function, x, t, dx, dt, h), _moved(function, x, t, dx, dt, -h)
    return function(x, t), (ahead - behind) / append_dims(2 * h, x)


def one_sided(function: Function, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(F(+h) - F) / h, in two passes; of order h."""
    ahead = _moved(function, x, t, dx, dt, h)
    output = function(x, t)
    return output, (ahead - output) / append_dims(h, x)


def semi(function: Function, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Exact in x and a central difference in t, as rCM (2510.08431) has it; three passes."""
    still = torch.zeros_like(dx)
    ahead, behind = _moved(function, x, t, still, dt, h), _moved(function, x, t, still, dt, -h)
    output, slope = torch.func.jvp(lambda x: function(x, t), (x,), (dx,))
    return output, slope + (ahead - behind) / append_dims(2 * h, x)


TANGENTS = {"jvp": jvp, "central": central, "one_sided": one_sided, "semi": semi}


def step_of(told: Callable[[Tensor], Tensor], t: Tensor, dt: Tensor, native: float) -> Tensor:
    """h `(B,)` with which t + h dt moves what the network is told by `native`, its own unit of time."""
    return native / torch.func.jvp(told, (t,), (dt,))[1].abs()


def _moved(function: Function, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, h: Tensor) -> Tensor:
    with rewind_rng(x.device):
        return function(x + append_dims(h, x) * dx, t + h * dt)
