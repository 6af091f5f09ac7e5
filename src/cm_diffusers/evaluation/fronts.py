"""Which points of a sweep no other beats, how much they achieve together, and how sure that is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from tqdm.auto import tqdm


Better = Literal["min", "max"]
LEVEL = 0.95  # of intervals


def non_dominated(values: np.ndarray, better: Sequence[Better]) -> np.ndarray:
    """Whether each row (N,) is on the Pareto front: no other is as good in all columns and better in one.

    Args:
        values: (N, A); a row with NaN is not on the front and beats none. Rows that tie stay together.
        better: Of each column, whether less or more is better.
    """
    found, whole = np.zeros(len(values), dtype=bool), ~np.isnan(values).any(1)
    rows = values[whole] * _signs(better)
    found[whole] = [not ((rows >= row).all(1) & (rows > row).any(1)).any() for row in rows]
    return found


def hypervolume(values: np.ndarray, better: Sequence[Better], reference: np.ndarray) -> float:
    """Volume, in the product of the columns' units, of all that some row beats and that beats the reference point (A,).

    Zitzler and Thiele, 1998. By slices along the last column, of which each is a volume in one dimension less: made for two
    or three.

    Args:
        values, better: As for `non_dominated`; a row that does not beat the reference point in each column adds nothing.
        reference: The reference point.
    """
    corners = (values - reference) * _signs(better)
    return _volume(corners[(corners > 0).all(1)])


def _volume(corners: np.ndarray) -> float:
    """Of the union of the boxes between 0 and each row."""
    if not len(corners):
        return 0.0
    if corners.shape[1] == 1:
        return float(corners.max())
    corners = corners[np.argsort(-corners[:, -1], kind="stable")]
    depths = corners[:, -1] - np.append(corners[1:, -1], 0)
    return sum(depth * _volume(corners[: i + 1, :-1]) for i, depth in enumerate(depths) if depth > 0)


def worst(values: np.ndarray, better: Sequence[Better]) -> np.ndarray:
    """The least good value (A,) in each column of the rows without NaN; NaN where there is none."""
    rows = (values * _signs(better))[~np.isnan(values).any(1)]
    return rows.min(0, initial=np.inf) * _signs(better) if len(rows) else np.full(values.shape[1], np.nan)


def _signs(better: Sequence[Better]) -> np.ndarray:
    return np.array([1.0 if way == "max" else -1.0 for way in better])


def bootstrap(
    measure: Callable[[np.ndarray], Mapping[str, float]],
    estimates: Mapping[str, float],
    num_prompts: int,
    samples: int,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % intervals of columns: prompts are drawn anew with replacement, and all images of a prompt go with it.

    The percentiles of the resamples, moved as a whole so that the mean of the resamples comes to lie on the estimate: a
    resample holds fewer different images, which by itself raises a Fréchet distance and lowers recall and coverage.

    Args:
        measure: Numbers of prompts (P,), some of them more than once -> columns.
        estimates: The columns of all prompts, each once.
        num_prompts: P; of one prompt there is no interval.
        samples: How often; 0 for no intervals.
        seed: Of the draws.
    """
    if samples == 0 or num_prompts < 2:
        return {}
    draws = np.random.default_rng(seed).integers(num_prompts, size=(samples, num_prompts))
    found = [measure(rows) for rows in tqdm(draws, "bootstrap", leave=False)]
    intervals = {}
    for column, estimate in estimates.items():
        if np.isnan(estimate):
            continue
        values = np.array([one[column] for one in found])
        ends = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) - np.nanmean(values) + estimate
        intervals[column] = (float(ends[0]), float(ends[1]))
    return intervals
