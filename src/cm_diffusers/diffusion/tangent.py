"""Derivatives of networks along a direction (dx, dt), forward: dF = dF/dx dx + dF/dt dt.

A function is (x, t) -> F with x `(B, ...)` and floating t `(B,)`, where no sample depends on another. All kinds give
(F, dF), without a graph, and draw the same dropout masks in each of their passes, as does the next pass if the caller
rewinds the random state (`rewind_rng`).
"""

import traceback
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from cm_diffusers.diffusion.passable import full_precision, passable
from cm_diffusers.diffusion.process import append_dims
from cm_diffusers.diffusion.rng import rewind_rng
from cm_diffusers.errors import UserError


Function = Callable[[Tensor, Tensor], Tensor]


def jvp(function: Function, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Exact, in one pass; `h` plays no part."""
    return _dual(function, (x, t), (dx, dt))


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
    """Exact in x, as rCM (2510.08431) has it, and a difference in t, here a central one; three passes."""
    still = torch.zeros_like(dx)
    ahead, behind = _moved(function, x, t, still, dt, h), _moved(function, x, t, still, dt, -h)
    output, slope = _dual(lambda x: function(x, t), (x,), (dx,))
    return output, slope + (ahead - behind) / append_dims(2 * h, x)


TANGENTS = {"jvp": jvp, "central": central, "one_sided": one_sided, "semi": semi}
DIFFERENCES = ("central", "one_sided")  # which need no forward-mode AD


def derivative(
    kind: str, network: nn.Module, function: Function, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """(F, dF) by one of `TANGENTS`, in full precision whatever autocast the network runs under otherwise.

    Args:
        network: That `function` calls, also within wrappers of accelerate, and compiled.

    Raises:
        ValueError: Times are integers, or something is in half precision; or forward-mode AD does not pass a module.
    """
    check_precision(network, x, t)
    try:
        with torch.no_grad(), (full_precision if kind in DIFFERENCES else passable)(network):
            return TANGENTS[kind](function, x, t, dx, dt, h)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or kind in DIFFERENCES:
            raise
        with torch.no_grad(), full_precision(network):
            function(x, t)  # which tells what else is wrong
        raise UserError(
            f"Forward-mode AD stops at {stop_of(error, network)}, where torch says: {_first_sentence(error)}; give "
            "--tangent central."
        ) from error


def check_precision(network: nn.Module, x: Tensor, t: Tensor) -> None:
    """
    Raises:
        ValueError: Times are integers, or samples or weights in half precision.
    """
    if not t.is_floating_point():
        raise UserError(f"A derivative needs times that are floating, but these are {t.dtype}: give t.double().")
    values = {"the samples": x, **dict(network.named_parameters())}
    for name, value in values.items():
        if value.is_floating_point() and value.dtype.itemsize < 4:
            raise UserError(
                f"A derivative needs float32, but {name} of {type(network).__name__} is {value.dtype}: keep all weights in "
                "float32, without --cast_teacher_unet; --mixed_precision may stay."
            )


def stop_of(error: BaseException, network: nn.Module) -> str:
    """Name and class of the innermost module of the network that an error comes from."""
    names = {id(module): name for name, module in network.named_modules()}
    inside = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [module for module in inside if id(module) in names]
    return f"{names[id(found[-1])] or 'the network'} ({type(found[-1]).__name__})" if found else "the network"


def step_of(told: Callable[[Tensor], Tensor], t: Tensor, dt: Tensor, native: float) -> Tensor:
    """h `(B,)` with which t + h dt moves what the network is told by `native`, its own unit of time."""
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        (slope,) = torch.autograd.grad(told(t).sum(), t)
    return native / (slope * dt).abs()


def _dual(function: Callable, at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Not by torch.func, whose wrapped tensors draw other dropout masks where they are not contiguous."""
    with forward_ad.dual_level():
        output = forward_ad.unpack_dual(function(*map(forward_ad.make_dual, at, along)))
    return output.primal, torch.zeros_like(output.primal) if output.tangent is None else output.tangent


def _moved(function: Function, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, h: Tensor) -> Tensor:
    with rewind_rng(x.device):
        return function(x + append_dims(h, x) * dx, t + h * dt)


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].split(". ")[0].rstrip(".;")
