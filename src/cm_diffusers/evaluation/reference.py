"""Real images and their captions: what pipelines are compared with and prompted by."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from cm_diffusers.data.folders import checked_folder
from cm_diffusers.data.preprocessing import View, decode_image, preprocess
from cm_diffusers.data.sources import DataConfig, captions_of, load_image_text


USUAL_SIDE = 512  # pixels, where nothing says how large images are


@dataclass
class ReferenceConfig:
    """Real images, with captions where a pipeline reads them; resized and cropped at the centre."""

    dataset_name: str | None = HfArg(default=None, help="Dataset id on the Hub.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the Hub dataset.")
    train_data_dir: str | None = HfArg(default=None, help="Local folder of images with captions, or of parquet files.")
    dataset_split: str = HfArg(default="train", help="Split of the Hub dataset, or subfolder of --train_data_dir.")
    image_column: str = HfArg(default="image", help="Column with the images.")
    caption_column: str = HfArg(
        default="text", help="Column with a caption, or a list of captions: the first is used."
    )
    label_column: str | None = HfArg(
        default=None,
        help="Integer column; images are then taken from each class in turn, and a class-conditional pipeline is asked "
        "for these classes.",
    )
    resolution: int | None = HfArg(
        default=None,
        help="Side in pixels of the square reference images, and of what pipelines that read prompts draw; if not given, "
        "each draws at the size of its training, and the reference has the largest of these.",
    )
    interpolation_type: Literal["bilinear", "bicubic", "lanczos", "nearest"] = HfArg(
        default="lanczos", help="Filter that resizes the shorter side to --resolution."
    )
    cache_dir: str | None = HfArg(default=None, help="Where `datasets` keeps what it downloads.")

    def check(self) -> None:
        """
        Raises:
            ValueError: The local folder is not there.
        """
        if self.train_data_dir is not None:
            checked_folder(self.train_data_dir)


@dataclass(frozen=True)
class Reference:
    """N real images.

    Attributes:
        images: (N, 3, R, R) in [0, 1].
        captions: One per image; None where the data has none.
        labels: Class of each image; all None without a label column.
        class_names: Names of the classes, where the label column has them.
        without_captions: Why there are none, and what to do.
    """

    images: Tensor
    captions: list[str] | None
    labels: list[int | None]
    class_names: list[str] | None = None
    without_captions: str | None = None

    @property
    def prompts(self) -> list[str]:
        """The captions.

        Raises:
            ValueError: There are none.
        """
        if self.captions is None:
            raise ValueError(self.without_captions)
        return self.captions


def load_reference(config: ReferenceConfig, num_images: int | None = None) -> Reference:
    """Reads the first `num_images` rows (all when None), taking one of each class in turn where there are labels.

    Raises:
        ValueError: if there are fewer rows, or an image cannot be read.
    """
    return load_references(config, num_images, 1)[0]


def load_references(config: ReferenceConfig, num_images: int | None, most: int) -> list[Reference]:
    """Up to `most` disjoint sets of `num_images` rows, as `load_reference` takes the first; as many as there are rows for.

    Raises:
        ValueError: if there is no set, or an image cannot be read.
    """
    label = config.label_column
    known = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "label_column"}
    data = DataConfig(**known | {"resolution": USUAL_SIDE if config.resolution is None else config.resolution})
    columns, missing = [label] if label else [], None
    try:
        rows = load_image_text(data, [config.caption_column, *columns])
    except ValueError as error:  # what has no captions is a reference of pipelines that read none
        rows, missing = load_image_text(data, columns), str(error)
    size = num_images or len(rows)
    if size > len(rows):
        raise ValueError(f"--num_images is {num_images} but the reference set holds {len(rows)} rows: ask for fewer.")
    order = in_turns(rows[label][:] if label else [None] * len(rows))
    count = min(most, len(rows) // size)
    return [_take(rows, order[i * size : (i + 1) * size], config, data, missing) for i in range(count)]


def _take(
    rows: Dataset, order: list[int], config: ReferenceConfig, data: DataConfig, missing: str | None
) -> Reference:
    label, chosen = config.label_column, rows.select(order)
    images = [
        _pixels(row[config.image_column], data, i)
        for i, row in zip(order, tqdm(chosen, "Real images", delay=1), strict=True)
    ]
    captions = None
    if missing is None:
        texts = [captions_of(value, config.caption_column) for value in chosen[config.caption_column]]
        if empty := [row for row, found in zip(order, texts, strict=True) if not found]:
            missing = (
                f"Row {empty[0]} of the reference set has no caption, as {len(empty) - 1} others: leave them out."
            )
        else:
            captions = [found[0] for found in texts]
    names = getattr(rows.features[label], "names", None) if label else None
    labels = chosen[label][:] if label else [None] * len(order)
    return Reference(torch.stack(images), captions, labels, names, missing)


def in_turns(labels: Sequence[int | None]) -> list[int]:
    """Row numbers that take the first row of each class, then the second of each, and so on."""
    seen: dict[int | None, int] = {}
    turns = []
    for label in labels:
        turns.append(seen.setdefault(label, 0))
        seen[label] += 1
    if None in seen:
        return list(range(len(labels)))
    return sorted(range(len(labels)), key=lambda row: (turns[row], labels[row]))


def _pixels(record: dict, config: DataConfig, row: int) -> Tensor:
    image = decode_image(record)
    if image is None:
        raise ValueError(f"The image in row {row} of the reference set cannot be read; remove the row.")
    return (preprocess(image, config, View()) + 1) / 2
