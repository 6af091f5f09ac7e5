"""Pixel batches for training a VAE or a classifier."""

import logging
from collections.abc import Callable, Iterator
from functools import partial

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cm_diffusers.data.preprocessing import crop, decode_image, drawn_view, resize, square, to_tensor
from cm_diffusers.data.sampler import Position, batch_generator, batch_rows, stream
from cm_diffusers.data.sources import DataConfig, load_image_text
from cm_diffusers.types import Batch


logger = logging.getLogger(__name__)
MEMORY_LIMIT = 2**30  # bytes of decoded pixels kept in memory


def image_batches(
    config: DataConfig, seed: int, rank: int = 0, world_size: int = 1, label_column: str | None = None
) -> Callable[[int], Iterator[Batch]]:
    """A data source of pixels x0 (B, 3, R, R) in [-1, 1], crops and flips drawn anew for every batch.

    Args:
        config: the images and their preprocessing; captions are not needed.
        seed: seed of the order, the crops and the flips.
        rank: number of this process.
        world_size: number of processes, which share every epoch.
        label_column: integer column returned as `cond["labels"]` (B,).

    Returns:
        A function from the number of the first batch to an endless iterator of batches.

    Raises:
        ValueError: wrong configuration, or no image that can be read.
    """
    if config.aspect_ratio_buckets:
        raise ValueError("--aspect_ratio_buckets is for training on captions; leave it out: these images are squares.")
    dataset = load_image_text(config, [label_column] if label_column else [])
    images = Images(dataset.select_columns(config.image_column), config)
    labels = torch.tensor(dataset[label_column][:])[images.rows] if label_column else None
    make = partial(_make_batch, images=images, labels=labels, position=Position(seed, rank, world_size))
    return stream(make, config.dataloader_num_workers)


class Images:
    """The readable images of a dataset, resized: `images[i]` is (H, W, 3) uint8; small sets stay in memory."""

    def __init__(self, dataset: datasets.Dataset, config: DataConfig) -> None:
        self.dataset, self.config = dataset, config
        keep = len(dataset) * 3 * config.resolution**2 < MEMORY_LIMIT
        rows, self.memory = [], []
        for row, record in enumerate(dataset):
            image = decode_image(record[config.image_column])
            if image is not None:
                rows.append(row)
                self.memory += [self._resized(image)] if keep else []
        self.rows = np.asarray(rows, dtype=np.int64)
        self._report()

    def _report(self) -> None:
        total, readable = len(self.dataset), len(self.rows)
        if readable == 0:
            raise ValueError(f"None of the {total} images in column {self.config.image_column} can be read.")
        if readable < total:
            logger.warning("Skipped %d of %d rows: the image cannot be read.", total - readable, total)

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
    return to_tensor(squares), {} if labels is None else {"labels": labels[indices]}, {}
