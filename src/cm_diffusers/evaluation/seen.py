"""Images that are looked at batch by batch and forgotten, by each process its share of the batches."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cm_diffusers.engine.ranks import Ranks
from cm_diffusers.evaluation.features import NotFiniteError, extract_features
from cm_diffusers.evaluation.metrics import Clip, clip_scores


SHOWN = 10  # images kept, for a grid


class Seen(NamedTuple):
    """What is left of N images.

    Attributes:
        features: (N, D), on the CPU.
        scores: CLIP scores (N,); (0,) where nobody asked.
        first: The first ten images (10, 3, H, W), or all if there are fewer.
        seconds: That it took to draw them, of all processes together.
    """

    features: Tensor
    scores: Tensor
    first: Tensor
    seconds: float


class Look:
    """Takes batches of images (B, 3, H, W) in [0, 1], in their order, for their features (B, D), on the CPU.

    Args:
        extractor: As `load_extractor` gives it.
        clip: For scores, or None.
        prompts: Of all images, for the scores.
    """

    def __init__(self, extractor: nn.Module, clip: Clip | None = None, prompts: Sequence[str] = ()) -> None:
        self.extractor, self.clip, self.prompts = extractor, clip, prompts
        self.first, self.scores = torch.empty(0), torch.empty(0)

    def __call__(self, images: Tensor) -> Tensor:
        """
        Raises:
            NotFiniteError: Some images, or features, are no numbers.
        """
        if not images.isfinite().all():
            raise NotFiniteError("Some of the images are not finite: take another --dtype, or look at the weights.")
        if not len(self.first):
            self.first = images[:SHOWN].clone()  # a view would keep the batch
        elif len(self.first) < SHOWN:
            self.first = torch.cat([self.first, images[: SHOWN - len(self.first)]])
        if self.clip:
            asked = self.prompts[len(self.scores) : len(self.scores) + len(images)]
            self.scores = torch.cat([self.scores, clip_scores(self.clip, images, asked)])
        return extract_features(self.extractor, images).cpu()

    def seen(self, features: Tensor, seconds: float = 0.0) -> Seen:
        """With all features that it gave (N, D)."""
        return Seen(features, self.scores, self.first, seconds)


def by_all(ranks: Ranks, number: int, batch_size: int, see: Callable[[list[int]], Seen]) -> Seen:
    """Has every process see its share of images; all of them have what is left of all images, in their order.

    Process r of W has batches r, r + W, ...: each batch is what it would be in one process.

    Args:
        ranks: The processes.
        number: Of images.
        batch_size: Images that `see` takes at once.
        see: Numbers of images -> what is left of them, in this order.

    Raises:
        ValueError: `see` failed here or elsewhere.
    """
    starts = range(ranks.rank * batch_size, number, ranks.size * batch_size)
    rows = [row for start in starts for row in range(start, min(start + batch_size, number))]

    def mine() -> tuple[list[int], Seen]:
        seen = see(rows)
        return rows, seen._replace(first=seen.first[: sum(row < SHOWN for row in rows)])

    told = ranks.each(lambda: mine() if rows else None)
    return told[0][1] if ranks.size == 1 else _together([part for part in told if part])


def _together(parts: list[tuple[list[int], Seen]]) -> Seen:
    """Rows of the images and what is left of these, of each process that has some."""
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    features, scores, first, seconds = zip(*(seen for _, seen in parts), strict=True)
    heads = torch.tensor([row for rows, _ in parts for row in rows if row < SHOWN]).argsort()
    scores = torch.cat(scores)
    return Seen(
        torch.cat(features)[order],
        scores[order] if len(scores) else scores,
        torch.cat([f for f in first if len(f)])[heads],
        sum(seconds),
    )
