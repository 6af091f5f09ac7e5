"""Images that are looked at batch by batch and forgotten, by each process its share of the batches."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cm_diffusers.data.shards import row_ranges
from cm_diffusers.engine.ranks import Ranks
from cm_diffusers.evaluation.features import NotFiniteError, extract_features
from cm_diffusers.evaluation.reference import Pictures


SHOWN = 10  # images kept, for a grid
AT_ONCE = 64  # real images in memory
Score = Callable[[Tensor, slice], dict[str, Tensor]]  # images (B, 3, H, W), which of all -> (B, ...) by name


class Seen(NamedTuple):
    """What is left of N images.

    Attributes:
        features: (N, D), on the CPU.
        scores: What else was found of each, (N, ...) by name.
        shown: The images that are kept (S, 3, H, W): the first ten, or others that were named.
        seconds: That it took to draw them, of all processes together.
    """

    features: Tensor
    scores: dict[str, Tensor]
    shown: Tensor
    seconds: float


class Look:
    """Takes batches of images (B, 3, H, W) in [0, 1], in their order, for their features (B, D), on the CPU.

    Args:
        extractor: As `load_extractor` gives it.
        score: What else is to be found of each image.
        shown: Numbers of the images to keep.
    """

    def __init__(
        self, extractor: nn.Module, score: Score | None = None, shown: Collection[int] = range(SHOWN)
    ) -> None:
        self.extractor, self.score, self.numbers = extractor, score, shown
        self.count, self.shown, self.scores = 0, [], []

    def __call__(self, images: Tensor) -> Tensor:
        """
        Raises:
            NotFiniteError: Some images, or features, are no numbers.
        """
        if not images.isfinite().all():
            raise NotFiniteError("Some of the images are not finite: take another --dtype, or look at the weights.")
        rows = slice(self.count, self.count + len(images))
        self.shown.append(images[[row - rows.start for row in range(rows.start, rows.stop) if row in self.numbers]])
        if self.score:
            self.scores.append(self.score(images, rows))
        self.count = rows.stop
        return extract_features(self.extractor, images).cpu()

    def seen(self, features: Tensor, seconds: float = 0.0) -> Seen:
        """With all features that it gave (N, D)."""
        names = self.scores[0] if self.scores else ()
        scores = {name: torch.cat([part[name] for part in self.scores]) for name in names}
        return Seen(features, scores, torch.cat(self.shown), seconds)


def see_real(look: Look, pictures: Pictures, numbers: Sequence[int] | None = None) -> Seen:
    """Real images, read batch by batch.

    Args:
        look: That has seen none.
        pictures: The images.
        numbers: Of those to see, in this order; all if not given.
    """
    numbers = range(len(pictures)) if numbers is None else numbers
    parts = tqdm(row_ranges(len(numbers), AT_ONCE), "real images", leave=False)
    return look.seen(torch.cat([look(pictures[[numbers[i] for i in part]]) for part in parts]))


def by_all(ranks: Ranks, number: int, batch_size: int, see: Callable[[list[int]], Seen]) -> Seen:
    """Has every process see its share of images; all of them have what is left of all images, in their order.

    Process r of W has batches r, r + W, ...: each batch is what it would be in one process.

    Args:
        ranks: The processes.
        number: Of images.
        batch_size: Images that `see` takes at once.
        see: Numbers of images -> what is left of them, in this order, the first ten of them shown.

    Raises:
        ValueError: `see` failed here or elsewhere.
    """
    starts = range(ranks.rank * batch_size, number, ranks.size * batch_size)
    rows = [row for start in starts for row in range(start, min(start + batch_size, number))]

    def mine() -> tuple[list[int], Seen]:
        seen = see(rows)
        return rows, seen._replace(shown=seen.shown[: sum(row < SHOWN for row in rows)])

    told = ranks.each(lambda: mine() if rows else None)
    return told[0][1] if ranks.size == 1 else _together([part for part in told if part])


def _together(parts: list[tuple[list[int], Seen]]) -> Seen:
    """Rows of the images and what is left of these, of each process that has some."""
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    features, scores, shown, seconds = zip(*(seen for _, seen in parts), strict=True)
    heads = torch.tensor([row for rows, _ in parts for row in rows if row < SHOWN]).argsort()
    return Seen(
        torch.cat(features)[order],
        {name: torch.cat([part[name] for part in scores])[order] for name in scores[0]},
        torch.cat([some for some in shown if len(some)])[heads],
        sum(seconds),
    )
