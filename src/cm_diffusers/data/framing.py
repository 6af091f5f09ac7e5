"""Which part of an image a network sees, at which size, and what Stable Diffusion XL is told about it."""

import logging
from collections import Counter
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from torch import Tensor

from cm_diffusers.data.buckets import aspect_ratio_buckets, nearest_buckets
from cm_diffusers.data.contents import MISSING, Digests, read_contents
from cm_diffusers.data.preprocessing import Size, View, micro_conditions, square
from cm_diffusers.data.sources import DataConfig


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Framing:
    """How every image of a data set is resized, cropped and mirrored, in each of its variants.

    Attributes:
        config: Preprocessing.
        digests: Content hashes of the files (N,); random crops are drawn from them.
        sizes: Heights and widths of the upright images (N, 2) int32; empty where nothing depends on them.
        targets: Sizes that images are brought to: one square, or the buckets.
        assigned: Number of each image's target (N,).
    """

    config: DataConfig
    digests: Digests
    sizes: np.ndarray
    targets: list[Size]
    assigned: np.ndarray

    @classmethod
    def of(cls, dataset: datasets.Dataset, config: DataConfig, sized: bool) -> "Framing":
        """Reads the files' hashes and, where buckets or the caller need them (`sized`), their sizes."""
        targets, sized = [square(config.resolution)], sized or config.aspect_ratio_buckets
        if config.aspect_ratio_buckets:
            targets = aspect_ratio_buckets(config.resolution, config.bucket_step, config.bucket_max_ratio)
        digests, sizes, _ = read_contents(dataset, config, sized)
        sizes[~sizes.all(1)] = targets[0]  # unreadable ones are left out later
        assigned = nearest_buckets(sizes, targets) if sized else np.zeros(len(digests), dtype=np.int64)
        if config.aspect_ratio_buckets:
            _report(assigned, targets)
        return cls(config, digests, sizes, targets, assigned)

    @property
    def variants(self) -> int:
        """Number of crops, twice that with mirrored ones."""
        crops = 1 if self.config.center_crop else self.config.num_crops
        return crops * (2 if self.config.random_flip else 1)

    def crop_and_flip(self, variant: int) -> tuple[int | None, bool]:
        """Number of the random crop (None: the centre) and whether it is mirrored."""
        number, mirrored = divmod(variant, 2) if self.config.random_flip else (variant, 0)
        return None if self.config.center_crop else number, bool(mirrored)

    def view(self, row: int, variant: int) -> View:
        number, mirrored = self.crop_and_flip(variant)
        if number is None or self.digests[row] == MISSING:
            return View(flip=mirrored)
        return View(*np.random.default_rng([int(self.digests[row], 16), number]).random(2), flip=mirrored)

    def time_ids(self, rows: np.ndarray, variants: np.ndarray) -> Tensor:
        """`micro_conditions` of the images in these variants (B, 6)."""
        ids = [
            micro_conditions(
                Size(*self.sizes[row].tolist()), self.targets[self.assigned[row]], self.view(row, variant)
            )
            for row, variant in zip(rows.tolist(), variants.tolist(), strict=True)
        ]
        return torch.tensor(ids, dtype=torch.float32)


def _report(assigned: np.ndarray, targets: list[Size]) -> None:
    counts = Counter(assigned.tolist())
    found = ", ".join(f"{targets[i].height}x{targets[i].width}: {counts[i]}" for i in sorted(counts))
    logger.info("Images by bucket (height x width): %s.", found)
