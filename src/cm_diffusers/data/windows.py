"""An order of samples in files in which any place is found at once: files shuffled, samples shuffled in windows of a few files."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cm_diffusers.data.sampler import SHUFFLE


class Place(NamedTuple):
    """Of a sample: its epoch, its file's number, and its own in the file."""

    epoch: int
    file: int
    sample: int


class _Epoch(NamedTuple):
    files: np.ndarray  # their numbers in the epoch's order
    starts: np.ndarray  # samples before each of them
    windows: np.ndarray  # samples before each window, and all of them


class Windows:
    """Place of sample n, a pure function of the seed and n; each epoch has every sample once.

    An epoch takes the files in random order and cuts it into windows of whole files with about `least` samples, which are
    shuffled among themselves. What is held is a permutation of one window, and a few numbers for each file.

    Args:
        counts: Samples of each file (F,), some of which may be 0.
        least: Samples of a window.
        seed: Of the order.
    """

    def __init__(self, counts: np.ndarray, least: int, seed: int) -> None:
        self.counts, self.least, self.seed, self.total = counts, least, seed, int(counts.sum())
        self._epoch, self._window = lru_cache(2)(self._plan), lru_cache(4)(self._permutation)

    def __getitem__(self, n: int) -> Place:
        epoch, place = divmod(n, self.total)
        plan = self._epoch(epoch)
        window = int(np.searchsorted(plan.windows, place, "right")) - 1
        start = plan.windows[window]
        place = start + self._window(epoch, window)[place - start]
        at = int(np.searchsorted(plan.starts, place, "right")) - 1
        return Place(epoch, int(plan.files[at]), int(place - plan.starts[at]))

    def _plan(self, epoch: int) -> _Epoch:
        files = np.random.default_rng([self.seed, SHUFFLE, epoch, 0]).permutation(len(self.counts))
        files = files[self.counts[files] > 0]
        ends = np.cumsum(self.counts[files])
        starts = ends - self.counts[files]
        _, first = np.unique(starts // self.least, return_index=True)
        return _Epoch(files, starts, np.append(starts[first], self.total))

    def _permutation(self, epoch: int, window: int) -> np.ndarray:
        start, end = self._epoch(epoch).windows[window : window + 2]
        return np.random.default_rng([self.seed, SHUFFLE, epoch, 1 + window]).permutation(end - start)
