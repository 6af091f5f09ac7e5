"""Whether a network bears the tangents of continuous-time consistency models, without training."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from diffusers import AutoModel, DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.tangent import derivative, stop_of
from cm_diffusers.errors import UserError
from cm_diffusers.models.double_norm import double_normed
from cm_diffusers.models.examples import Example, example_of
from cm_diffusers.models.teachers import LOADING, LOADING_ERRORS, first_line
from cm_diffusers.ranges import check_ranges


# Each half of the one before; floats are exact there, and the usual one is in the middle.
STEPS_IN_X = [2.0**-k for k in range(4, 12)]  # of samples of unit variance
STEPS_IN_T = [2.0**-k for k in range(5, 18)]  # of the range of times
UNLIKE, TOO_STEEP = 0.1, 5.0  # relative error at which something is wrong; |dF/dt| over |dF/dx v| that training bears


@dataclass
class JVPConfig:
    """The network to check."""

    pretrained_model: str = HfArg(help="Folder or Hub id of a pipeline, or of a network alone.")
    subfolder: str | None = HfArg(
        default=None, help="Of the network; of a pipeline, its unet or transformer if not given."
    )
    revision: str | None = HfArg(default=None, help="Branch, tag or commit on the Hub.")
    time_range: float | None = HfArg(
        default=None,
        help="Length of the times that the network is told; if not given, 1 for Flux and SANA-Sprint, otherwise 1000. "
        "2650 for 250 ln sigma, 1.57 for TrigFlow's times.",
    )
    time_start: float = HfArg(default=0.0, help="The least of these times; -1550 for 250 ln sigma.")

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class JVPReport:
    """What `check_jvp` found.

    Attributes:
        network: Its class.
        stop: Name and class of the module at which forward-mode AD stops; None if it passes.
        error_x: Least relative difference of JVP and central differences in x; None where it stops.
        error_t: The same in t.
        step: In t where that is least, in the network's unit of time.
        slope_x: Root mean square of dF/dx v for a random v of unit variance.
        slope_t: Root mean square of dF/dt, by TrigFlow's time.
    """

    network: str
    stop: str | None
    error_x: float | None
    error_t: float | None
    step: float
    slope_x: float
    slope_t: float

    @property
    def tangent(self) -> str:
        """The --tangent to take."""
        return "central" if self.stop or max(self.error_x, self.error_t) > UNLIKE else "jvp"

    @property
    def is_steep(self) -> bool:
        """Whether the network's time is on too large a scale: dF/dt drowns all else."""
        return self.slope_t > TOO_STEEP * self.slope_x

    def __str__(self) -> str:
        passes = f"stops at {self.stop}" if self.stop else "passes everywhere"
        lines = [f"{self.network}: forward-mode AD {passes}."]
        if self.stop is None:
            lines.append(f"JVP against central differences: {self.error_x:.1e} in x, {self.error_t:.1e} in t.")
        lines.append(f"By TrigFlow's time, |dF/dt| is {self.slope_t:.3g}, and |dF/dx v| is {self.slope_x:.3g}.")
        if self.is_steep:
            lines.append(
                f"Warning: |dF/dt| is {self.slope_t / self.slope_x:.0f} times |dF/dx v|, so the time's scale is too large "
                "for a stable tangent; tune the network to TrigFlow's time with training/tune_time.py first."
            )
        return "\n".join([*lines, f"Take --tangent {self.tangent}; for differences, --tangent_step {self.step:.1g}."])


class _Slope(NamedTuple):
    """Of F along a direction: root mean square, least error and the best step of differences, where AD stops."""

    size: float
    error: float | None
    step: float
    stop: str | None


def check_jvp(network: nn.Module, example: Example | None = None) -> JVPReport:
    """Takes derivatives of a network at an example.

    Args:
        network: In float32, called as `network(x, timestep=t, **arguments, return_dict=False)[0]`.
        example: If not given, from the network's config, see `example_of`.

    Raises:
        ValueError: No example can be made, or the network's weights are in half precision.
    """
    example = example or example_of(network)
    v, length, still = torch.randn_like(example.x), example.time_range, torch.zeros_like(example.t)
    x = _slope(network, example, v, still, STEPS_IN_X)
    t = _slope(network, example, 0 * v, still + length, STEPS_IN_T)
    slope_t = t.size / (math.pi / 2)  # all times are a quarter turn
    return JVPReport(type(network).__name__, x.stop or t.stop, x.error, t.error, t.step * length, x.size, slope_t)


def _slope(network: nn.Module, example: Example, dx: Tensor, dt: Tensor, steps: list[float]) -> _Slope:
    def function(x: Tensor, t: Tensor) -> Tensor:
        return network(x, timestep=t, **example.arguments, return_dict=False)[0]

    def taken(kind: str, start: float, h: float) -> Tensor:
        x, t = example.x + start * dx, example.t + start * dt
        return derivative(kind, network, function, x, t, dx, dt, torch.full_like(t, h))[1]

    differences = [taken("one_sided", -h, 2 * h) for h in steps]  # that is, central ones
    finer = [(4 * half - whole) / 3 for whole, half in pairwise(differences)]  # of order h^4
    try:
        exact = taken("jvp", 0, 0)
    except UserError as error:
        middle = len(steps) // 2
        return _Slope(_rms(differences[middle]), None, steps[middle], stop_of(error.__cause__ or error, network))
    errors = [_rms(found - exact) / _rms(exact) for found in differences + finer]
    return _Slope(_rms(exact), min(errors), steps[errors.index(min(errors[: len(steps)]))], None)


def load_network(config: JVPConfig) -> ModelMixin:
    """In float32.

    Raises:
        ValueError: It is out of reach, does not load, or is no network of diffusers.
    """
    source, subfolder = config.pretrained_model, config.subfolder
    try:
        network = AutoModel.from_pretrained(
            source, subfolder=subfolder or _part(source, config.revision), revision=config.revision, **LOADING
        )
    except LOADING_ERRORS as error:
        raise UserError(f"{source} has no network that loads: {first_line(error)}") from error
    return double_normed(network.eval())


def _part(source: str, revision: str | None) -> str | None:
    """The network of a pipeline; None where there is no pipeline."""
    try:
        index = DiffusionPipeline.load_config(source, revision=revision)
    except OSError:
        return None
    return next((name for name in ("unet", "transformer") if name in index), None)


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()
