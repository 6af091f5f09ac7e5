"""Which times a method trains at: pure functions, no state.

Curricula depend on `Progress` alone, so every rank and a resumed run are at the same place. Grids ascend. All of it is
on the CPU, where float64 is.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cm_diffusers.diffusion.process import exact
from cm_diffusers.errors import UserError
from cm_diffusers.types import Progress


def solver_grid(num_train_timesteps: int, num_solver_steps: int) -> Tensor:
    """The N ascending times k-1, 2k-1, ..., Nk-1 with k = T // N of LCM (2310.04378, Sec. 4.3) and `LCMScheduler`."""
    if not 1 <= num_solver_steps <= num_train_timesteps:
        raise UserError(
            f"The grid has {num_solver_steps} steps (num_ddim_timesteps, original_inference_steps) but the model has "
            f"{num_train_timesteps} timesteps; choose between 1 and {num_train_timesteps}."
        )
    skip = num_train_timesteps // num_solver_steps
    return torch.arange(1, num_solver_steps + 1) * skip - 1


def phase_edges(points: int, phases: int) -> Tensor:
    """Where the phases of a grid begin (2405.18407): indices `(phases,)`, ascending from 0, as the authors' code has them.

    Raises:
        ValueError: There are fewer points than phases.
    """
    if not 1 <= phases <= points:
        raise UserError(f"--phases {phases} do not fit on {points} points (--num_ddim_timesteps): give 1 to {points}.")
    return torch.from_numpy(np.floor(np.linspace(0, points, phases, endpoint=False)).astype(np.int64))


class Phases(NamedTuple):
    """Of a grid of N times.

    Attributes:
        end: Where jumps from each of them end `(N,)`.
        start: The greatest time of its phase `(N,)`.
        starts: Of the phases, ascending `(phases,)`: what is sampled.
    """

    end: Tensor
    start: Tensor
    starts: Tensor

    @classmethod
    def of(cls, grid: Tensor, before: Tensor, phases: int) -> "Phases":
        """
        Args:
            grid: Ascending times `(N,)`.
            before: The time one spacing below each `(N,)`; a phase ends before its first time.
            phases: Their number, see `phase_edges`.
        """
        edges = phase_edges(len(grid), phases)
        phase = torch.searchsorted(edges, torch.arange(len(grid)), right=True) - 1
        starts = torch.cat([before[edges[1:]], grid[-1:]])
        return cls(before[edges][phase], starts[phase], starts)


def shifted(u: Tensor, shift: float) -> Tensor:
    """Times of rectified flow, k u / (1 + (k - 1) u) (2403.03206, Eq. 23), in float64.

    sigma / alpha becomes k-fold, so shifts in a row multiply; 1 changes nothing, e^mu is diffusers' exponential shift.
    """
    u = exact(u)
    return shift * u / (1 + (shift - 1) * u)


def shifted_grid(points: int, shift: float) -> Tensor:
    """`(points,)` ascending times of rectified flow, `shifted` from i / points, float64; the last is 1.

    Each is rounded to a number of bfloat16: stock pipelines in it tell some networks their time so, who would take it for
    another.

    Raises:
        ValueError: There are so many points that rounding makes some equal.
    """
    if points < 1 or not 0 < shift < math.inf:
        raise UserError(
            f"A grid of {points} points with shift {shift} is none; give at least 1 point and a shift above 0."
        )
    grid = _representable(points, shift)
    if not (grid.diff() > 0).all():
        most = next(n for n in range(points - 1, 0, -1) if (_representable(n, shift).diff() > 0).all())
        raise UserError(
            f"Of the {points} times of a grid with shift {shift} only {len(grid.unique())} differ in bfloat16, in which "
            f"networks are told them; give at most {most} points."
        )
    return grid


def _representable(points: int, shift: float) -> Tensor:
    grid = shifted(torch.arange(1, points + 1, dtype=torch.float64) / points, shift)
    return grid.to(torch.bfloat16).double()


def karras_grid(points: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """`(points,)` ascending sigmas of EDM (2206.00364, Eq. 5), float64: even in sigma^(1 / rho), with exact ends."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    grid = torch.linspace(low, high, points, dtype=torch.float64) ** rho
    grid[0], grid[-1] = sigma_min, sigma_max
    return grid


def sample_neighbours(batch_size: int, grid: Tensor, probabilities: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Times t = grid[i + 1] and s = grid[i], each `(B,)`.

    Args:
        probabilities: Of the interval i `(points - 1,)`; uniform if None.
    """
    if probabilities is None:
        index = torch.randint(len(grid) - 1, (batch_size,))
    else:
        index = torch.multinomial(probabilities, batch_size, replacement=True)
    return grid[index + 1], grid[index]


def square_root_intervals(progress: Progress, first: int, last: int) -> int:
    """How many intervals the grid of consistency training has (2303.01469, Appendix C; the paper's N is one more)."""
    grown = (last + 1) ** 2 - first**2
    return max(1, math.ceil(math.sqrt(progress.step * grown / progress.max_steps + first**2) - 1))


def square_root_decay(progress: Progress, first: int, last: int, first_decay: float) -> float:
    """Rate of the EMA target beside `square_root_intervals`, exp(s0 ln mu0 / intervals) (2303.01469, Appendix C).

    As the authors' code has it, first_decay^2 at first; the paper divides by one more.
    """
    return math.exp(first * math.log(first_decay) / square_root_intervals(progress, first, last))


def doubling_intervals(progress: Progress, first: int, last: int) -> int:
    """How many intervals the grid of improved consistency training has (2310.14189, Sec. 3.4; N(k) is one more).

    Doubled from `first` to `last` in stages of equal length.
    """
    length = max(1, int(progress.max_steps / (math.log2(last // first) + 1)))
    return min(first * 2 ** (progress.step // length), last)


def lognormal_probabilities(grid: Tensor, mean: float, std: float) -> Tensor:
    """Of the intervals of an ascending grid `(points - 1,)`: the mass of ln sigma ~ N(mean, std^2) in each.

    Rescaled to a sum of 1 (2310.14189, Sec. 3.5).
    """
    mass = torch.erf((grid.log() - mean) / (math.sqrt(2) * std)).diff()
    return mass / mass.sum()


def sample_lognormal(batch_size: int, mean: float, std: float, sigma_min: float, sigma_max: float) -> Tensor:
    """Times `(B,)` in float64 with ln t ~ N(mean, std^2), given that they lie between sigma_min and sigma_max."""
    ends = (torch.tensor([sigma_min, sigma_max], dtype=torch.float64).log() - mean) / std
    low, high = torch.special.ndtr(ends)
    share = torch.rand(batch_size, dtype=torch.float64)
    return torch.exp(mean + std * torch.special.ndtri(torch.lerp(low, high, share))).clamp(sigma_min, sigma_max)


def easy_ratio(t: Tensor, stage: int, q: float, k: float, b: float) -> Tensor:
    """r / t `(B,)` of easy consistency tuning (2406.14548): 1 - (1 + k sigmoid(-b t)) / q^(stage + 1), at least 0.

    It is 0 at first, where the loss is diffusion's, and goes to 1; but not beyond 0.999, as in 2410.14895: float32 must
    tell the pair apart. k = 0 gives the same ratio at all times.
    """
    return (1 - (1 + k * torch.sigmoid(-b * exact(t))) * q ** -(stage + 1)).clamp(0, 0.999)
