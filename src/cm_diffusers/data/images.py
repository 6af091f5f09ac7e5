"""Pixel batches for training a VAE, a classifier or a student without prompts."""

from collections.abc import Callable
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from cm_diffusers.data.contents import read_contents
from cm_diffusers.data.found import SHOWN, Found
from cm_diffusers.data.preprocessing import (
    crop,
    decode_image,
    drawn_view,
    fault_of,
    resize,
    square,
    to_tensor,
)
from cm_diffusers.data.sampler import Position, Stream, batch_generator, batch_rows, stream
from cm_diffusers.data.shards import shard_key
from cm_diffusers.data.sources import DataConfig, load_image_text, row_name, source_name
from cm_diffusers.errors import UserError


MEMORY_LIMIT = 2**30  # bytes of decoded pixels kept in memory


def image_batches(
    config: DataConfig,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    label_column: str | None = None,
    num_classes: int | None = None,
) -> Stream:
    """A data source of pixels x0 (B, 3, R, R) in [-1, 1], crops and flips drawn anew for every batch.

    Args:
        config: the images, their preprocessing, and where it is kept what is in their files; captions are not needed.
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
        raise UserError("--aspect_ratio_buckets is for training on captions; leave it out: these images are squares.")
    found = Found(source_name(config))
    dataset = load_image_text(config, [label_column] if label_column else [], found)
    labels = class_labels(dataset, label_column, num_classes) if label_column else None
    images = Images(dataset.select_columns(config.image_column), config, found)
    make = partial(_make_batch, images=images, labels=labels, position=Position(seed, rank, world_size))
    found.report()
    fingerprint = shard_key(iter(images.digests), None if labels is None else labels.tolist())
    return stream(make, config.dataloader_num_workers, found=found, fingerprint=fingerprint)


def usable_rows(
    readable: np.ndarray, captioned: np.ndarray | None, record_of: Callable[[int], Any], found: Found
) -> np.ndarray:
    """Numbers (M,) of the rows of N that are trained on; `found` is told how many, and which are left out and why.

    Args:
        readable: Which rows' images or clips can be read (N,).
        captioned: Which have a caption (N,); None where none is needed.
        record_of: Number of a row -> its image or clip, undecoded.

    Raises:
        ValueError: There is none.
    """
    inside = f"{Path(found.source).expanduser()}/"

    def skip(reason: str, rows: np.ndarray) -> None:
        names = [row_name(record_of(i), i).removeprefix(inside) for i in rows[:SHOWN].tolist()]
        found.skip(reason, names, len(rows))

    unreadable, faults = np.flatnonzero(~readable), {}
    for row in unreadable.tolist():
        faults.setdefault(fault_of(record_of(row)), []).append(row)
    for fault, rows in faults.items():
        skip(f"{found.kind} {fault}", np.array(rows))
    if captioned is not None:
        skip(f"{found.kind} without a caption", np.flatnonzero(readable & ~captioned))
    rows = np.flatnonzero(readable if captioned is None else readable & captioned)
    found.images = len(rows)
    if len(rows) == 0:
        reasons = "; ".join(found.lines())
        raise UserError(f"None of the {len(readable)} {found.kind} of {found.source} can be used: {reasons}.")
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
            raise UserError(
                f"--label_column {column} must hold whole numbers {bounds}, but a row holds {label!r}: name a column "
                "that numbers the classes so."
            )
    return torch.tensor(labels, dtype=torch.int64)


class Images:
    """The readable images of a dataset, resized: `images[i]` is (H, W, 3) uint8; small sets stay in memory."""

    def __init__(self, dataset: datasets.Dataset, config: DataConfig, found: Found) -> None:
        self.dataset, self.config, self.memory = dataset, config, []
        self.digests, _, readable = read_contents(dataset, config, False, decoded=True)
        self.rows = usable_rows(readable, None, lambda row: dataset[row][config.image_column], found)
        if len(self) * 3 * config.resolution**2 < MEMORY_LIMIT:
            self.memory = [self._read(index) for index in range(len(self))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.memory[index] if self.memory else self._read(index)

    def _read(self, index: int) -> np.ndarray:
        image = decode_image(self.dataset[int(self.rows[index])][self.config.image_column])
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
