"""Where images and captions come from: the Hub, image folders, parquet files; and how an image becomes a tensor."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from PIL import Image
from transformers.hf_argparser import HfArg

from cm_diffusers.data.folders import Folder, checked_folder, loose_images
from cm_diffusers.data.found import SHOWN, Found
from cm_diffusers.data.splits import other_than_training
from cm_diffusers.data.tables import MARK
from cm_diffusers.data.tars import FAULT, FIELDS, TAR_ROWS, tar_features, tar_rows, tar_shards
from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError, readable


INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
SOURCES = ("dataset_name", "train_data_dir", "train_shards_path_or_url")


@dataclass
class DataConfig:
    """Images and captions to train on."""

    dataset_name: str | None = HfArg(default=None, help="Dataset id on the Hub.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the Hub dataset.")
    train_data_dir: str | None = HfArg(
        default=None,
        help="Local folder: images with metadata.jsonl, .csv or .parquet (a file_name column), parquet files, "
        "or images with captions in .txt or .caption files of the same stem.",
    )
    train_shards_path_or_url: str | None = HfArg(
        default=None,
        help="WebDataset tar shards with images and .txt or .json captions: a path or URL with {000..123}, {a,b} or *; "
        "--caption_column names the entry of the .json.",
    )
    dataset_split: str = HfArg(
        default="train",
        help="Split to read: of the Hub dataset, or of a local folder, as its folders and tables are called.",
    )
    image_column: str = HfArg(default="image", help="Column with the images.")
    caption_column: str = HfArg(default="text", help="Column with a caption, or a list of captions to choose from.")
    resolution: int = HfArg(default=512, help="Side of the square training images, in pixels.")
    interpolation_type: Literal["bilinear", "bicubic", "lanczos", "nearest"] = HfArg(
        default="bilinear", help="Filter that resizes the shorter side to --resolution."
    )
    center_crop: bool = HfArg(default=False, help="Crop the centre instead of a random place.")
    random_flip: bool = HfArg(default=False, help="Mirror a random half of the images.")
    aspect_ratio_buckets: bool = HfArg(
        default=False,
        help="Keep the shape of the images: crop each to the bucket nearest to its aspect ratio, batches of one bucket. "
        "No bucket has more pixels than the square of --resolution.",
    )
    bucket_step: int = HfArg(default=64, help="Sides of the buckets are multiples of this many pixels.")
    bucket_max_ratio: float = HfArg(default=2.0, help="Longest bucket: its longer side over its shorter one.")
    streaming: bool = HfArg(
        default=False,
        help="Read and encode while training, for data too large for a cache: of the Hub, parquet files or tar shards.",
    )
    shuffle_buffer_size: int = HfArg(
        default=1000,
        help="With --streaming: samples shuffled among themselves. Of tables they are held in memory; of tar shards they are "
        "those of as many files as hold so many, and none is held.",
    )
    max_train_samples: int | None = HfArg(default=None, help="Use a fixed random subset of this many rows.")
    train_batch_size: int = HfArg(default=16, help="Batch size of each process and each micro-batch.")
    dataloader_num_workers: int = HfArg(
        default=0,
        help="Processes that prepare batches; 0 prepares them in line. With --streaming of tables one process reads, and decodes "
        "in so many threads.",
    )
    cache_dir: str | None = HfArg(default=None, help="Where `datasets` keeps what it downloads.")
    cache_latents: bool = HfArg(
        default=True,
        help="Keep VAE posteriors and text embeddings on disk, and what image files and tar shards hold; otherwise in memory, "
        "for this run only.",
    )
    latent_cache_dir: str = HfArg(
        default="~/.cache/cm_diffusers/latents",
        help="Where VAE posteriors and text embeddings are kept, and what image files and tar shards hold.",
    )
    encode_batch_size: int = HfArg(default=32, help="Images, frames or captions encoded at once.")
    num_crops: int = HfArg(default=1, help="Random crops cached for each image; --center_crop needs one.")
    proportion_empty_prompts: float = HfArg(default=0.0, help="Share of captions replaced by the empty prompt.")
    vae_dtype: Literal["float32", "float16", "bfloat16"] = HfArg(
        default="float32", help="Precision of the VAE encoder; several VAEs overflow in float16."
    )

    def check(self) -> None:
        """
        Raises:
            ValueError: What is named is not there, or out of reach.
        """
        if self.train_data_dir is not None:
            checked_folder(self.train_data_dir)
        if self.train_shards_path_or_url is not None:
            tar_shards(self.train_shards_path_or_url)


def load_image_text(
    config: DataConfig, columns: Sequence[str] | None = None, found: Found | None = None
) -> datasets.Dataset:
    """Loads the rows to train on, images undecoded as `{"bytes", "path"}`.

    Args:
        config: names the source.
        columns: columns needed besides the image column; the caption column when None, no other when empty.
        found: is told what is left out, and reported by the caller; by this function if not given.

    Raises:
        ValueError: wrong configuration, missing folder, no rows or a missing column.
    """
    validate(config)
    if config.streaming:
        raise UserError("--streaming does not act here: these images are read before training starts; leave it out.")
    refuse_changed(config, "shuffle_buffer_size", "without --streaming")
    wanted = [config.caption_column] if columns is None else list(columns)
    told = found or Found(source_name(config))
    if config.train_shards_path_or_url:
        dataset = _from_shards(config, told)
        if columns is None and len(dataset) and not any(map(any, dataset[config.caption_column])):
            raise UserError(nothing_usable(config, len(dataset), set(dataset[FIELDS]), told))
    elif config.dataset_name:
        dataset = from_hub(config)
    else:
        dataset = open_folder(config, told, config.caption_column in wanted).rows(loose_images)
    require_columns(dataset.column_names, [config.image_column, *wanted])
    dataset = subset(dataset, config, told)
    if found is None and told.lines():
        told.report()
    dataset = dataset.select_columns(list(dict.fromkeys([config.image_column, *wanted])))
    return dataset.cast_column(config.image_column, datasets.Image(decode=False))


def open_folder(config: DataConfig, found: Found, captioned: bool = True) -> Folder:
    """The local folder that the flags name; see `Folder.of`."""
    caption_column = config.caption_column if captioned else None
    return Folder.of(
        config.train_data_dir, config.dataset_split, found, config.image_column, caption_column, config.cache_dir
    )


def subset(dataset: datasets.Dataset, config: DataConfig, found: Found) -> datasets.Dataset:
    """The rows that `--max_train_samples` leaves.

    Raises:
        ValueError: there are no rows.
    """
    if len(dataset) == 0:
        raise UserError(f"The data holds no rows: {source_name(config)} is empty.")
    if config.max_train_samples is None or config.max_train_samples >= len(dataset):
        return dataset
    order = np.random.default_rng(0).permutation(len(dataset))
    chosen, others = np.split(order, [config.max_train_samples])
    names = [row_name(dataset[int(i)].get(config.image_column), i) for i in others[:SHOWN]]
    found.skip(f"rows beyond --max_train_samples {config.max_train_samples}", names, len(others))
    return dataset.select(np.sort(chosen))


def row_name(record: Any, number: int) -> str:
    """What to call an image or a clip: its file, or else the number of its row."""
    first = record[0] if isinstance(record, list) and record else record
    path = first.get("path") if isinstance(first, dict) else first if isinstance(first, str) else None
    return path or f"row {number}"


def require_columns(found: Sequence[str], wanted: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in found]:
        raise UserError(
            f"The data has no column named {', '.join(missing)}: choose from the columns found: {', '.join(found)}."
        )


def captions_of(value: Any, column: str) -> list[str]:
    """The non-empty captions of one row."""
    texts = value if isinstance(value, list) else [value]
    if not all(text is None or isinstance(text, str) for text in texts):
        found = next(type(text).__name__ for text in texts if not (text is None or isinstance(text, str)))
        raise UserError(f"--caption_column {column} must hold a text or a list of texts, but a row holds {found}.")
    plain = (text.lstrip(MARK) for text in texts if text)
    return [text for text in plain if text.strip()]


def nothing_usable(config: DataConfig, number: int, fields: Iterable[str], left_out: Found) -> str:
    """The sentence for `number` samples that hold these fields, where an image and a caption are needed."""
    found = " or ".join(f"[{names}]" for names in sorted(fields)[:3])
    return (
        f"None of the {number} samples of {source_name(config)} has both an image ({config.image_column}) and a "
        f"caption ({config.caption_column}): they hold {found}; "
        + "".join(f"{line}; " for line in left_out.lines())
        + "name what to read with --image_column and --caption_column."
    )


def source_name(config: DataConfig) -> str | None:
    """What the data was called on the command line."""
    return config.dataset_name or config.train_data_dir or config.train_shards_path_or_url


def source_flag(config: DataConfig) -> str:
    return next(f"--{name} {value}" for name in SOURCES if (value := getattr(config, name)) is not None)


def validate(config: DataConfig) -> None:
    """Checks that do not need the data.

    Raises:
        ValueError: not exactly one source, or a value out of range.
    """
    given = [f"--{name}" for name in SOURCES if getattr(config, name) is not None]
    if len(given) != 1:
        raise UserError(
            f"Give one of {', '.join(f'--{name}' for name in SOURCES)}: exactly one is needed and "
            f"{' and '.join(given) or 'none'} {'were' if given else 'was'} given."
        )
    check_values(config)
    if config.train_shards_path_or_url:
        refuse_changed(config, "dataset_split dataset_config_name", "with --train_shards_path_or_url")
    if not config.dataset_name:
        refuse_changed(config, "dataset_config_name", "without --dataset_name")
    if not config.aspect_ratio_buckets:
        refuse_changed(config, "bucket_step bucket_max_ratio", "without --aspect_ratio_buckets")
    if config.center_crop:
        refuse_changed(config, "num_crops", "with --center_crop")


def check_values(config: DataConfig) -> None:
    """
    Raises:
        ValueError: a value is out of range.
    """
    counts = (
        "resolution bucket_step train_batch_size encode_batch_size num_crops max_train_samples shuffle_buffer_size"
    )
    for name in counts.split():
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, but it is {value}.")
    if config.dataloader_num_workers < 0:
        raise UserError(f"--dataloader_num_workers must be at least 0, but it is {config.dataloader_num_workers}.")
    if not 0 <= (share := config.proportion_empty_prompts) <= 1:
        raise UserError(f"--proportion_empty_prompts must lie between 0 and 1, but it is {share}.")
    if config.interpolation_type not in INTERPOLATIONS:
        raise UserError(
            f"--interpolation_type must be one of {', '.join(INTERPOLATIONS)}, but it is {config.interpolation_type}."
        )


def shards_of(config: DataConfig, found: Found) -> list[str]:
    """The tar files that the flags name; `found` is told of those that are called after another split."""
    shards = tar_shards(config.train_shards_path_or_url)
    found.remark("shards that are called after another split than training", other_than_training(shards))
    return shards


def _from_shards(config: DataConfig, found: Found) -> datasets.Dataset:
    shards, columns = shards_of(config, found), (config.image_column, config.caption_column)
    stats = [Path(shard).stat() for shard in shards if Path(shard).is_file()]  # a changed file is read anew
    stamps = [f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats]
    with readable(source_flag(config)):
        dataset = datasets.Dataset.from_generator(
            tar_rows,
            features=tar_features(*columns),
            gen_kwargs={"shards": shards, "image_column": columns[0], "caption_column": columns[1]},
            cache_dir=config.cache_dir,
            fingerprint=hashlib.sha256(repr([TAR_ROWS, shards, stamps, columns]).encode()).hexdigest()[:16],
        )
    faults = dataset[FAULT][:]
    for reason in dict.fromkeys(filter(None, faults)):
        rows = [i for i, fault in enumerate(faults) if fault == reason]
        found.skip(reason, [row_name(dataset[i][columns[0]], i) for i in rows[:SHOWN]], len(rows))
    return dataset


def from_hub(config: DataConfig) -> datasets.Dataset:
    with readable(source_flag(config)):
        return datasets.load_dataset(
            config.dataset_name, config.dataset_config_name, split=config.dataset_split, cache_dir=config.cache_dir
        )
