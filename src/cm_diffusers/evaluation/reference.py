"""Real images and their captions: what pipelines are compared with and prompted by."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from datasets import Dataset
from torch import Tensor
from transformers.hf_argparser import HfArg

from cm_diffusers.data.folders import checked_folder
from cm_diffusers.data.found import SHOWN, Found
from cm_diffusers.data.preprocessing import View, decode_image, preprocess
from cm_diffusers.data.sources import DataConfig, captions_of, load_image_text, row_name, source_name
from cm_diffusers.errors import UserError


MOST_PROMPTS = 100
USUAL_SIDE = 512  # pixels, where nothing says how large images are


@dataclass
class ReferenceConfig:
    """Real images, with captions where a pipeline reads them; resized and cropped at the centre."""

    dataset_name: str | None = HfArg(default=None, help="Dataset id on the Hub.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the Hub dataset.")
    train_data_dir: str | None = HfArg(default=None, help="Local folder of images with captions, or of parquet files.")
    dataset_split: str = HfArg(
        default="train",
        help="Split to read: of the Hub dataset, or of a local folder, as its folders and tables are called.",
    )
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
class Pictures:
    """Images that are read when they are asked for: `pictures[2, 5]` is (2, 3, R, R) in [0, 1].

    Attributes:
        rows: With the images undecoded.
        order: Which row each is.
        data: How they are resized and cropped.
    """

    rows: Dataset
    order: Sequence[int]
    data: DataConfig

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, numbers: Sequence[int]) -> Tensor:
        """
        Raises:
            ValueError: An image cannot be read.
        """
        chosen = [self.order[number] for number in numbers]
        return torch.stack([_pixels(self.rows[row][self.data.image_column], self.data, row) for row in chosen])


@dataclass(frozen=True)
class Reference:
    """N real images.

    Attributes:
        pictures: The images.
        captions: One per image; None where the data has none.
        labels: Class of each image; all None without a label column.
        class_names: Names of the classes, where the label column has them.
        without_captions: Why there are none, and what to do.
    """

    pictures: Pictures
    captions: list[str] | None
    labels: list[int | None]
    class_names: list[str] | None = None
    without_captions: str | None = None

    @property
    def images(self) -> Tensor:
        """All of them, read anew (N, 3, R, R)."""
        return self.pictures[range(len(self.pictures))]

    @property
    def prompts(self) -> list[str]:
        """The captions.

        Raises:
            ValueError: There are none.
        """
        if self.captions is None:
            raise UserError(self.without_captions)
        return self.captions


def load_reference(config: ReferenceConfig, num_images: int | None = None, captioned: bool = True) -> Reference:
    """The first `num_images` rows (all when None), taking one of each class in turn where there are labels.

    Args:
        captioned: Whether rows without a caption are left out and named, where as many have one.

    Raises:
        ValueError: if there are fewer rows.
    """
    return load_references(config, num_images, 1, captioned)[0]


def load_references(
    config: ReferenceConfig, num_images: int | None, most: int, captioned: bool = True
) -> list[Reference]:
    """Up to `most` disjoint sets of `num_images` rows, as `load_reference` takes the first; as many as there are rows for.

    Raises:
        ValueError: if there is no set.
    """
    label = config.label_column
    known = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "label_column"}
    data = DataConfig(**known | {"resolution": USUAL_SIDE if config.resolution is None else config.resolution})
    rows, captions, missing = _read(config, data)
    told = [row for row, texts in enumerate(captions) if texts] if captioned else []
    size = num_images or len(told) or len(rows)
    if size > len(rows):
        raise UserError(f"--num_images is {num_images} but the reference set holds {len(rows)} rows: ask for fewer.")
    labels = rows[label][:] if label else [None] * len(rows)
    chosen = told if len(told) >= size else range(len(rows))
    if bare := [row for row in range(len(rows)) if chosen is told and not captions[row]]:
        found = Found(source_name(data), len(told))
        names = [row_name(rows[row][config.image_column], row) for row in bare[:SHOWN]]
        found.skip("images without a caption", names, len(bare))
        found.report()
    elif missing is None and not all(captions):
        missing = f"Only {sum(map(bool, captions))} of {len(rows)} rows of the reference set have a caption: ask for no more."
    order = [chosen[i] for i in in_turns([labels[row] for row in chosen])]
    texts = None if missing else [captions[row][0] for row in order]
    names = getattr(rows.features[label], "names", None) if label else None
    references = []
    for start in range(0, size * min(most, len(order) // size), size):
        part = slice(start, start + size)
        pictures, prompts = Pictures(rows, order[part], data), None if texts is None else texts[part]
        references.append(Reference(pictures, prompts, [labels[row] for row in order[part]], names, missing))
    return references


def repeated(reference: Reference, num_prompts: int | None, times: int) -> Reference:
    """Captions and labels, without images, of the first rows with different captions, each row several times in a row.

    Args:
        reference: Without captions, rows of different classes are taken; without these, any, as many as `num_prompts`.
        num_prompts: How many rows; if None all that there are, but `MOST_PROMPTS` at most: images of all are drawn at every point of a sweep.
        times: How often each.

    Raises:
        ValueError: There are not so many, or nothing tells rows apart and no number is given.
    """
    told = reference.captions or (range(len(reference.labels)) if None in reference.labels else reference.labels)
    if isinstance(told, range) and num_prompts is None:
        raise UserError("The reference set has neither captions nor classes to count prompts by: give --num_prompts.")
    rows = [told.index(what) for what in dict.fromkeys(told)]
    if num_prompts is not None and num_prompts > len(rows):
        raise UserError(
            f"--num_prompts is {num_prompts}, but the reference set has {len(rows)} different: ask for fewer."
        )
    rows = [row for row in rows[: num_prompts or MOST_PROMPTS] for _ in range(times)]
    captions = reference.captions and [reference.captions[row] for row in rows]
    none = replace(reference.pictures, order=[])
    return replace(reference, pictures=none, captions=captions, labels=[reference.labels[row] for row in rows])


def _read(config: ReferenceConfig, data: DataConfig) -> tuple[Dataset, list[list[str]], str | None]:
    """The rows, the captions of each, and why there are none, if so: what has none serves pipelines that read none."""
    columns, found = [config.label_column] if config.label_column else [], Found(source_name(data))
    try:
        rows = load_image_text(data, [config.caption_column, *columns], found)
        captions, missing = [captions_of(value, config.caption_column) for value in rows[config.caption_column]], None
        if not any(captions):
            missing = f"No row of the reference set has a caption in its column {config.caption_column}: name another."
    except ValueError as error:
        found = Found(source_name(data))
        rows, missing = load_image_text(data, columns, found), str(error)
        captions = [[]] * len(rows)
    if found.lines():
        found.report()
    return rows, captions, missing


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
        raise UserError(f"The image in row {row} of the reference set cannot be read; remove the row.")
    return (preprocess(image, config, View()) + 1) / 2
