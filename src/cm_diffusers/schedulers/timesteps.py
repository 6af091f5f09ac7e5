"""The timesteps a consistency model is sampled at: descending lists, checked."""

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Real

import numpy as np
from diffusers.utils import logging

from cm_diffusers.diffusion.times import solver_grid
from cm_diffusers.errors import UserError


logger = logging.get_logger(__name__)


def distillation_grid(num_train_timesteps: int, points: int) -> list[int]:
    """The grid of `solver_grid`, ascending.

    Raises:
        ValueError: The number of points is not whole, or out of range.
    """
    if not _is_whole(points):
        raise UserError(f"original_inference_steps must be a whole number, got {points!r}.")
    return solver_grid(num_train_timesteps, int(points)).tolist()


def spread(grid: Sequence[int], count: int, strength: float) -> list[int]:
    """`count` timesteps spread evenly over the share `strength` of the grid that has the least noise.

    Args:
        grid: The distillation grid, ascending.

    Raises:
        ValueError: The count is no whole number from 1 to the points that remain, or strength is outside (0, 1].
    """
    check_strength(strength)
    remaining = grid[: _share(len(grid), strength)]
    if not _is_whole(count) or count < 1:
        raise UserError(f"num_inference_steps must be a whole number of at least 1, got {count!r}.")
    if count > len(remaining):
        least = math.ceil(count / len(grid) * 1000) / 1000
        ways = [f"a strength of at least {least:g}"] * (count <= len(grid)) + ["fewer steps"] * bool(remaining)
        raise UserError(
            f"num_inference_steps is {count}, but a strength of {strength} leaves {len(remaining)} of the {len(grid)} "
            f"timesteps of the distillation grid; take {', '.join(ways)} or more original_inference_steps."
        )
    places = np.floor(np.linspace(0, len(remaining), num=int(count), endpoint=False)).astype(int)
    return [remaining[::-1][i] for i in places]


def chosen(timesteps: Sequence[int], grid: Sequence[int], limit: int, strength: float) -> list[int]:
    """The share `strength` of a user's timesteps that has the least noise; those off the grid are warned of.

    Raises:
        ValueError: They are not whole, not in [0, limit), not descending, none remains, or strength is outside (0, 1].
    """
    check_strength(strength)
    timesteps = timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps
    if not isinstance(timesteps, Sequence) or not all(_is_whole(t) for t in timesteps):
        raise UserError(f"timesteps must be a list of whole numbers, got {timesteps!r}.")
    schedule = [int(t) for t in timesteps]
    if not schedule or not all(0 <= t < limit for t in schedule):
        raise UserError(f"timesteps must be a list of numbers from {limit - 1} down to 0, got {schedule}.")
    if any(a <= b for a, b in pairwise(schedule)):
        raise UserError(f"timesteps must descend without repetition, got {schedule}.")
    kept = _share(len(schedule), strength)
    if kept == 0:
        raise UserError(f"A strength of {strength} leaves none of the {len(schedule)} timesteps; take a higher one.")
    if strangers := [t for t in schedule[-kept:] if t not in grid]:
        logger.warning(f"Timesteps {strangers} are not on the distillation grid of {len(grid)} points.")
    return schedule[-kept:]


def _share(length: int, strength: float) -> int:
    """How many of `length` remain; in floating point 50 * 0.58 is below 29."""
    return int(length * strength + 1e-6)


def _is_whole(value: object) -> bool:
    try:
        return value == int(value)
    except (TypeError, ValueError, OverflowError):
        return False


def check_strength(strength: float) -> None:
    """
    Raises:
        ValueError: It is not above 0 and at most 1.
    """
    if not isinstance(strength, Real) or not 0 < strength <= 1:
        raise UserError(f"strength must be above 0 and at most 1, got {strength!r}.")
