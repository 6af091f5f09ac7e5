"""Pixel batches for training a VAE, a classifier or a student without prompts."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from numbers import Integral

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cm_diffusers.data.preprocessing import content_hash, crop, decode_image, drawn_view, resize, square, to_tensor
from cm_diffusers.data.sampler import Position, batch_generator, batch_rows, stream
from cm_diffusers.data.shards import shard_key
from cm_diffusers.data.sources import DataConfig, load_image_text
from cm_diffusers.types import Batch


logger = logging.getLogger(__name__)
MEMORY_LIMIT = 2**30  # bytes of decoded pixels kept in memory


def image_batches(
    config: DataConfig,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    label_column: str | None = None,
    num_classes: int | None = None,
) -> Callable[[int], Iterator[Batch]]:
    """A data source of pixels x0 (B, 3, R, R) in [-1, 1], crops and flips drawn anew for every batch.

    Args:
        config: the images and their preprocessing; captions are not needed.
        seed: seed of the order, the crops and the flips.
        rank: number of this process.
        world_size: number of processes, which share every epoch.
        label_column: integer column returned as `cond["class_labels"]` (B,) int64.
        num_classes: bound of the labels; none if not given.

    Returns:
        A function from the number of the first batch to an endless iterator of batches.

    Raises:
        ValueError: wrong configuration, no image that can be read, or a label that is no class.
    """
    if config.aspect_ratio_buckets:
        raise ValueError("--aspect_ratio_buckets is for training on captions; leave it out: these images are squares.")
    dataset = load_image_text(config, [label_column] if label_column else [])
    labels = class_labels(dataset, label_column, num_classes) if label_column else None
    images = Images(dataset.select_columns(config.image_column), config)
    make = partial(_make_batch, images=images, labels=labels, position=Position(seed, rank, world_size))
    fingerprint = shard_key(images.digests, None if labels is None else labels.tolist())
    return stream(make, config.dataloader_num_workers, fingerprint)


def readable_rows(valid: np.ndarray, column: str) -> np.ndarray:
    """Numbers (M,) of the rows whose image can be read, of `valid` (N,); the others are counted in a warning.

    Raises:
        ValueError: there is none.
    """
    rows = np.flatnonzero(valid)
    if len(rows) == 0:
        raise ValueError(f"None of the {len(valid)} images in column {column} can be read.")
    if len(rows) < len(valid):
        logger.warning("Skipped %d of %d rows: the image cannot be read.", len(valid) - len(rows), len(valid))
    return rows


def class_labels(dataset: datasets.Dataset, column: str, num_classes: int | None) -> Tensor:
    """Classes (N,) int64 of all rows.

    Raises:
        ValueError: one is not a whole number from 0 to `num_classes - 1`, or below 0 where that is not given.
    """
    labels = dataset[column][:]
    for label in labels:
        if not isinstance(label, Integral) or label < 0 or (num_classes is not None and label >= num_classes):
            bounds = "of at least 0" if num_classes is None else f"from 0 to {num_classes - 1}"
            raise ValueError(
                f"--label_column {column} must hold whole numbers {bounds}, but a row holds {label!r}: name a column "
                "that numbers the classes so."
            )
    return torch.tensor(labels, dtype=torch.int64)


class Images:
    """The readable images of a dataset, resized: `images[i]` is (H, W, 3) uint8; small sets stay in memory."""

    def __init__(self, dataset: datasets.Dataset, config: DataConfig) -> None:
        self.dataset, self.config = dataset, config
        keep = len(dataset) * 3 * config.resolution**2 < MEMORY_LIMIT
        valid, self.memory, self.digests = [], [], []
        for record in dataset:
            self.digests.append(content_hash(record[config.image_column]))
            image = decode_image(record[config.image_column])
            valid.append(image is not None)
            if keep and image is not None:
                self.memory.append(self._resized(image))
        self.rows = readable_rows(np.asarray(valid), config.image_column)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        if self.memory:
            return self.memory[index]
        return self._resized(decode_image(self.dataset[int(self.rows[index])][self.config.image_column]))

    def _resized(self, image: Image.Image) -> np.ndarray:
        return resize(image, square(self.config.resolution), self.config.interpolation_type)


def _make_batch(
    k: int, images: Images, labels: Tensor | None, position: Position
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    config = images.config
    indices = batch_rows(k, config.train_batch_size, len(images), position)
    draws = batch_generator(k, position).random((len(indices), 3))
    target = square(config.resolution)
    squares = [
        crop(images[index], target, drawn_view(draw, config)) for index, draw in zip(indices, draws, strict=True)
    ]
    return to_tensor(squares), {} if labels is None else {"class_labels": labels[images.rows[indices]]}, {}
