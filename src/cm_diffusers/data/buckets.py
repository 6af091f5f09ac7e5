"""Aspect-ratio buckets (ARAD, 2308.16582): a few sizes of about one area, and batches of one size each."""

from collections.abc import Sequence

import numpy as np

from cm_diffusers.data.preprocessing import Size, square
from cm_diffusers.data.sampler import SHUFFLE, Position
from cm_diffusers.errors import UserError


def aspect_ratio_buckets(resolution: int, step: int, max_ratio: float) -> list[Size]:
    """The square of `resolution` and, for each shorter side, the two longest sizes that have no more pixels.

    Args:
        resolution: side of the square, in pixels.
        step: every side is a multiple of it.
        max_ratio: bound of longer over shorter side.

    Returns:
        Sizes from the square to the longest, the tall one before the wide one.

    Raises:
        ValueError: the square itself is no multiple of the step, or the bound is below 1.
    """
    if not max_ratio >= 1:
        raise UserError(f"--bucket_max_ratio must be at least 1, the square's ratio, but it is {max_ratio}.")
    if resolution % step:
        below = resolution // step * step
        sizes = " or ".join(str(side) for side in (below, below + step) if side)
        raise UserError(f"--resolution {resolution} is not a multiple of --bucket_step {step}: take {sizes}.")
    buckets = [square(resolution)]
    for short in range(resolution - step, 0, -step):
        long = resolution**2 // short // step * step
        if long > max_ratio * short:
            break
        buckets += [Size(long, short), Size(short, long)]
    return buckets


def nearest_buckets(sizes: np.ndarray, buckets: Sequence[Size]) -> np.ndarray:
    """Numbers (N,) of the buckets with the aspect ratios nearest to those of `sizes` (N, 2), heights and widths.

    The distance is `|log(h / w) - log(bh / bw)|`, which treats tall and wide alike; a tie goes to the earlier bucket.
    """
    ratios, choices = (np.log(pairs[:, 0] / pairs[:, 1]) for pairs in (np.asarray(sizes), np.asarray(buckets)))
    distances = np.abs(ratios[:, None] - choices[None])
    return np.argmin(distances.round(9), axis=1)  # rounded: logarithms of equal ratios differ in the last bits


class BucketBatches:
    """Row numbers of batch k of a rank: one bucket per batch, and the same one on every rank.

    An epoch has each bucket's rows in random order, cut into batches for all ranks together. A bucket's last batch is
    filled up with its first rows again, so no row is left out. The batches of all buckets are shuffled.

    Args:
        assigned: bucket of each row (N,).
        batch_size: B, of one rank.
        position: seed, rank and number of ranks.
    """

    def __init__(self, assigned: np.ndarray, batch_size: int, position: Position) -> None:
        self.position, self.batch_size = position, batch_size
        self.groups = [np.flatnonzero(assigned == bucket) for bucket in np.unique(assigned)]
        self.counts = [-(-len(rows) // (batch_size * position.world_size)) for rows in self.groups]
        self._planned, self._plan = -1, np.empty(0)

    def __call__(self, k: int) -> np.ndarray:
        """(B,) int64, a pure function of the seed, the rank and `k`."""
        epoch, number = divmod(k, sum(self.counts))
        if epoch != self._planned:
            self._planned, self._plan = epoch, self._batches(epoch)
        start = self.position.rank * self.batch_size
        return self._plan[number, start : start + self.batch_size]

    def _batches(self, epoch: int) -> np.ndarray:
        """The epoch's batches for all ranks together (batches, ranks * B)."""
        generator = np.random.default_rng([self.position.seed, SHUFFLE, epoch])
        whole = self.batch_size * self.position.world_size
        batches = [
            np.resize(generator.permutation(rows), (count, whole))  # repeats the rows where they do not suffice
            for rows, count in zip(self.groups, self.counts, strict=True)
        ]
        return generator.permutation(np.concatenate(batches))
