"""The noise levels a consistency model is sampled at, and how its network is told of them, as in training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cm_diffusers.diffusion.preconditioning import input_scaling, noise_condition, vp_scalings
from cm_diffusers.errors import UserError
from cm_diffusers.schedulers.timesteps import chosen


class NetworkKind(Protocol):
    """What a view of `cm_diffusers.diffusion.views` is to training. Every sigma is float64."""

    def times(self, sigmas: Tensor) -> Tensor:
        """What the network is told of noise levels `(N,)`."""

    def sigmas(self, times: Tensor) -> Tensor:
        """The inverse of `times`."""

    def shown(self, sigma: Tensor) -> Tensor:
        """The factor of x in the network's input."""

    def as_edm(self, sigma: Tensor) -> tuple[float, float]:
        """on_x and on_output with F = on_x x + on_output output."""

    def start(self, sigma: float) -> float:
        """The standard deviation of what sampling starts from at sigma."""


HAIR = 1e-5  # above what a time may be: SANA-Sprint (2503.09641) starts at 1.57080
OUTPUT_SIGNS = {"epsilon": 1.0, "v_prediction": -1.0}  # as `EDMEulerScheduler` has them


@dataclass(frozen=True)
class EDMKind:
    """A network of EDM (2206.00364, Eq. 7): its output is F, or -F for "v_prediction", as of Stable Video Diffusion.

    Attributes:
        sigma_data: Standard deviation of the data.
        noise_conditioning: See `noise_condition`.
        prediction_type: One of `OUTPUT_SIGNS`.
    """

    sigma_data: float
    noise_conditioning: str
    prediction_type: str

    def __post_init__(self) -> None:
        if self.prediction_type not in OUTPUT_SIGNS:
            raise UserError(
                f'A network of kind "edm" answers with F, "epsilon", or -F, "v_prediction", got '
                f'{self.prediction_type!r}; take network "vp" for a diffusion model of Stable Diffusion\'s kind.'
            )

    def times(self, sigmas: Tensor) -> Tensor:
        return noise_condition(sigmas, self.noise_conditioning, self.sigma_data)

    def sigmas(self, times: Tensor) -> Tensor:
        if self.noise_conditioning == "trigflow":
            return self.sigma_data * torch.tan(times)
        return torch.exp(times / self.times(torch.tensor(math.e, dtype=torch.float64)))

    def shown(self, sigma: Tensor) -> Tensor:
        return input_scaling(sigma, self.sigma_data)

    def as_edm(self, sigma: Tensor) -> tuple[float, float]:
        return 0.0, OUTPUT_SIGNS[self.prediction_type]

    def start(self, sigma: float) -> float:
        return math.hypot(sigma, self.sigma_data) if self.prediction_type == "v_prediction" else sigma


@dataclass(frozen=True, eq=False)
class VPKind:
    """A variance-preserving network; between its integer times ln sigma is interpolated linearly.

    Attributes:
        sigma_data: Standard deviation of the data.
        prediction_type: What its output is.
        log_sigmas: ln(sigma / alpha) at its times `(T,)`.
        noise_conditioning: "trigflow", or it is told its own time.
    """

    sigma_data: float
    prediction_type: str
    log_sigmas: np.ndarray
    noise_conditioning: str

    @classmethod
    def of(
        cls, sigma_data: float, prediction_type: str, alphas_cumprod: Tensor, noise_conditioning: str = "own"
    ) -> "VPKind":
        """Leaves out a last time of zero terminal SNR, where sigma is infinite."""
        signal = alphas_cumprod[alphas_cumprod > 0].double()
        return cls(sigma_data, prediction_type, -torch.logit(signal).numpy() / 2, noise_conditioning)

    def times(self, sigmas: Tensor) -> Tensor:
        if self.noise_conditioning == "trigflow":
            return noise_condition(sigmas, "trigflow", self.sigma_data)
        return torch.as_tensor(np.interp(sigmas.log().numpy(), self.log_sigmas, np.arange(len(self.log_sigmas))))

    def sigmas(self, times: Tensor) -> Tensor:
        if self.noise_conditioning == "trigflow":
            return self.sigma_data * torch.tan(times)
        return torch.as_tensor(np.interp(times.numpy(), np.arange(len(self.log_sigmas)), self.log_sigmas)).exp()

    def shown(self, sigma: Tensor) -> Tensor:
        return input_scaling(sigma, 1.0)

    def as_edm(self, sigma: Tensor) -> tuple[float, float]:
        on_x, on_output = vp_scalings(sigma, self.sigma_data, self.prediction_type)
        return float(on_x), float(on_output)

    def start(self, sigma: float) -> float:
        return sigma

    def check(self, sigma_min: float, sigma_max: float) -> None:
        """
        Raises:
            ValueError: The levels go beyond what the network knows.
        """
        low, high = np.exp(self.log_sigmas[[0, -1]])
        if sigma_min < low or sigma_max > high:
            raise UserError(
                f"This network knows sigmas from {low:.5g} to {high:.5g}, but sigma_min is {sigma_min} and sigma_max "
                f"{sigma_max}; give what it was trained with."
            )


def strided(grid: list[float], count: int) -> list[float]:
    """`count` levels of a descending grid, the first and every (N // count)-th, as `CMStochasticIterativeScheduler`.

    Raises:
        ValueError: The count is no whole number from 1 to the points of the grid.
    """
    if not isinstance(count, Integral) or not 1 <= count <= len(grid):
        raise UserError(
            f"num_inference_steps must be a whole number from 1 to the {len(grid)} points of the training grid, got "
            f"{count!r}; for other noise levels give sigmas."
        )
    return grid[:: len(grid) // count][:count]


def at_places(grid: list[float], places: Sequence[int]) -> list[float]:
    """The levels at these places of a descending grid, which are listed from the last to the first.

    Raises:
        ValueError: They are not whole, not on the grid, or not descending.
    """
    return [grid[place] for place in chosen(places, range(len(grid)), len(grid), 1.0)[::-1]]


def checked(sigmas: Sequence[float], low: float, high: float, name: str = "sigmas") -> list[float]:
    """
    Raises:
        ValueError: They are no numbers from high down to low.
    """
    values = list(sigmas.tolist() if hasattr(sigmas, "tolist") else sigmas)
    known = all(isinstance(value, Real) and low <= value <= high for value in values)
    if not values or not known or any(a <= b for a, b in pairwise(values)):
        raise UserError(f"{name} must be numbers that descend, from at most {high} to at least {low}; got {values}.")
    return [float(value) for value in values]


def checked_times(times: Sequence[float], high: float) -> list[float]:
    """Times of TrigFlow without a last 0, which is the end; one a hair above `high`, as pi / 2 is rounded, is `high`.

    Raises:
        ValueError: They are no floating numbers from high down to above 0.
    """
    values = list(times.tolist() if hasattr(times, "tolist") else times)
    values = values[:-1] if values and values[-1] == 0 else values
    if any(isinstance(value, Integral) for value in values):
        raise UserError(f"Timesteps of TrigFlow are times from {high:.6g} to 0, no integer indices; got {values}.")
    known = all(isinstance(value, Real) and 0 < value <= high + HAIR for value in values)
    if not values or not known or any(a <= b for a, b in pairwise(values)):
        raise UserError(f"Times must be numbers that descend, from at most {high:.6g} to above 0; got {values}.")
    return [min(float(value), high) for value in values]
