"""Coefficients of the averages that are known without a search, each `(K,)` with the sum 1, for snapshots from old to new."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cm_diffusers.engine.averages import power_of


KINDS = SINGLE, UNIFORM, EMA, POWER = "single", "uniform", "EMA", "power function"


class Baseline(NamedTuple):
    """An average without a search.

    Attributes:
        kind: One of `KINDS`.
        which: Of its kind.
        vector: `(K,)`.
    """

    kind: str
    which: str
    vector: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.kind} ({self.which})"


def one_hot(count: int, index: int) -> np.ndarray:
    return np.eye(count)[index]


def uniform(count: int) -> np.ndarray:
    """Stochastic weight averaging (1803.05407)."""
    return np.full(count, 1 / count)


def ema(count: int, rate: float) -> np.ndarray:
    """Of average <- rate average + (1 - rate) weights, which starts as the first: that one's weight is rate^(K - 1)."""
    weights = (1 - rate) * rate ** np.arange(count - 1.0, -1, -1)
    weights[0] = rate ** (count - 1)
    return weights


def power_function(steps: Sequence[int], sigma_rel: float) -> np.ndarray:
    """The profile tau^gamma (2312.02696, Eq. 3 and App. C) at the snapshots' steps, scaled to the sum 1.

    Args:
        steps: Of the snapshots; the last is where the profile ends.
        sigma_rel: Its width, as a share of the run.
    """
    weights = (np.asarray(steps) / steps[-1]) ** power_of(sigma_rel)
    return weights / weights.sum()


def baselines(steps: Sequence[int], rates: Sequence[float], sigma_rels: Sequence[float]) -> list[Baseline]:
    """Each snapshot alone from the first to the last, their mean, and averages of several lengths."""
    count = len(steps)
    return [
        *(Baseline(SINGLE, f"step {step}", one_hot(count, i)) for i, step in enumerate(steps)),
        Baseline(UNIFORM, "SWA", uniform(count)),
        *(Baseline(EMA, f"{rate:g}", ema(count, rate)) for rate in rates),
        *(Baseline(POWER, f"{width:g}", power_function(steps, width)) for width in sigma_rels),
    ]
