"""Real images and their captions: what pipelines are compared with and prompted by."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cm_diffusers.data.sources import DataConfig, View, decode_image, load_image_text, preprocess


@dataclass(frozen=True)
class Reference:
    """N real images.

    Attributes:
        images: (N, 3, R, R) in [0, 1].
        prompts: One caption per image.
        labels: Class of each image; all None for data without a label column.
    """

    images: Tensor
    prompts: list[str]
    labels: list[int | None]


def load_reference(config: DataConfig, num_images: int | None, label_column: str | None = None) -> Reference:
    """Reads the first `num_images` rows (all when None), taking one of each class in turn where there are labels.

    Raises:
        ValueError: if there are fewer rows, or an image cannot be read.
    """
    captioned = num_images is not None
    columns = [name for name in (label_column, config.caption_column if captioned else None) if name]
    rows = load_image_text(config, columns)
    if captioned and num_images > len(rows):
        raise ValueError(f"--num_images is {num_images} but the reference set holds {len(rows)} rows: ask for fewer.")
    labels = rows[label_column][:] if label_column else [None] * len(rows)
    order = in_turns(labels)[:num_images]
    chosen = rows.select(order)
    prompts = [_caption(value) for value in chosen[config.caption_column]] if captioned else []
    images = torch.stack([_pixels(row[config.image_column], config, i) for i, row in zip(order, chosen, strict=True)])
    return Reference(images, prompts, [labels[i] for i in order])


def in_turns(labels: Sequence[int | None]) -> list[int]:
    """Row numbers that take the first row of each class, then the second of each, and so on."""
    seen: dict[int | None, int] = {}
    turns = []
    for label in labels:
        turns.append(seen.setdefault(label, 0))
        seen[label] += 1
    return sorted(range(len(labels)), key=lambda row: (turns[row], labels[row] or 0))


def _caption(value: str | Sequence[str]) -> str:
    return value if isinstance(value, str) else value[0]


def _pixels(record: dict, config: DataConfig, row: int) -> Tensor:
    image = decode_image(record)
    if image is None:
        raise ValueError(f"The image in row {row} of the reference set cannot be read; remove the row.")
    return (preprocess(image, config, View()) + 1) / 2
