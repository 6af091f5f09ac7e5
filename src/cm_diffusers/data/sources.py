"""Where images and captions come from: the Hub, image folders, parquet files; and how an image becomes a tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
from PIL import Image
from pyarrow import csv, json, parquet
from transformers.hf_argparser import HfArg


INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
METADATA = {
    "metadata.jsonl": json.read_json,
    "metadata.csv": csv.read_csv,
    "metadata.parquet": parquet.read_table,
}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass
class DataConfig:
    """Images and captions to train on."""

    dataset_name: str | None = HfArg(default=None, help="Dataset id on the Hub.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the Hub dataset.")
    train_data_dir: str | None = HfArg(
        default=None,
        help="Local folder: images with metadata.jsonl, .csv or .parquet (a file_name column), parquet files, "
        "or images with captions in .txt files of the same stem.",
    )
    dataset_split: str = HfArg(
        default="train", help="Split of the Hub dataset, or the subfolder of that name in --train_data_dir, if any."
    )
    image_column: str = HfArg(default="image", help="Column with the images.")
    caption_column: str = HfArg(default="text", help="Column with a caption, or a list of captions to choose from.")
    resolution: int = HfArg(default=512, help="Side of the square training images, in pixels.")
    interpolation_type: Literal["bilinear", "bicubic", "lanczos", "nearest"] = HfArg(
        default="bilinear", help="Filter that resizes the shorter side to --resolution."
    )
    center_crop: bool = HfArg(default=False, help="Crop the centre instead of a random place.")
    random_flip: bool = HfArg(default=False, help="Mirror a random half of the images.")
    max_train_samples: int | None = HfArg(default=None, help="Use a fixed random subset of this many rows.")
    train_batch_size: int = HfArg(default=16, help="Batch size of each process and each micro-batch.")
    dataloader_num_workers: int = HfArg(default=0, help="Processes that prepare batches; 0 prepares them in line.")
    cache_dir: str | None = HfArg(default=None, help="Where `datasets` keeps what it downloads.")
    cache_latents: bool = HfArg(
        default=True, help="Keep VAE posteriors and text embeddings on disk; otherwise in memory, for this run only."
    )
    latent_cache_dir: str = HfArg(
        default="~/.cache/cm_diffusers/latents", help="Where VAE posteriors and text embeddings are kept."
    )
    encode_batch_size: int = HfArg(default=32, help="Images or captions encoded at once while filling the cache.")
    num_crops: int = HfArg(default=1, help="Random crops cached for each image; --center_crop needs one.")
    proportion_empty_prompts: float = HfArg(default=0.0, help="Share of captions replaced by the empty prompt.")
    vae_dtype: Literal["float32", "float16", "bfloat16"] = HfArg(
        default="float32", help="Precision of the VAE encoder; several VAEs overflow in float16."
    )


def load_image_text(config: DataConfig, columns: Sequence[str] | None = None) -> datasets.Dataset:
    """Loads the rows to train on, images undecoded as `{"bytes", "path"}`.

    Args:
        config: names the source.
        columns: columns needed besides the image column; the caption column when None, no other when empty.

    Raises:
        ValueError: wrong configuration, missing folder, no rows or a missing column.
    """
    _validate(config)
    wanted = [config.caption_column] if columns is None else list(columns)
    dataset = _from_hub(config) if config.dataset_name else _from_folder(config, wanted)
    if missing := [name for name in (config.image_column, *wanted) if name not in dataset.column_names]:
        found = ", ".join(dataset.column_names)
        raise ValueError(f"The data has no column named {', '.join(missing)}: choose from the columns found: {found}.")
    if len(dataset) == 0:
        raise ValueError(f"The data holds no rows: {config.dataset_name or config.train_data_dir} is empty.")
    if config.max_train_samples is not None and config.max_train_samples < len(dataset):
        chosen = np.random.default_rng(0).permutation(len(dataset))[: config.max_train_samples]
        dataset = dataset.select(np.sort(chosen))
    dataset = dataset.select_columns(list(dict.fromkeys([config.image_column, *wanted])))
    return dataset.cast_column(config.image_column, datasets.Image(decode=False))


def _validate(config: DataConfig) -> None:
    if (config.dataset_name is None) == (config.train_data_dir is None):
        found = "neither" if config.dataset_name is None else "both"
        raise ValueError(f"Give --dataset_name or --train_data_dir: exactly one is needed and {found} was given.")
    for name in ("resolution", "train_batch_size", "encode_batch_size", "num_crops", "max_train_samples"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, but it is {value}.")
    if not 0 <= config.proportion_empty_prompts <= 1:
        raise ValueError(
            f"--proportion_empty_prompts must lie between 0 and 1, but it is {config.proportion_empty_prompts}."
        )
    if config.interpolation_type not in INTERPOLATIONS:
        raise ValueError(
            f"--interpolation_type must be one of {', '.join(INTERPOLATIONS)}, but it is {config.interpolation_type}."
        )


def _from_hub(config: DataConfig) -> datasets.Dataset:
    return datasets.load_dataset(
        config.dataset_name, config.dataset_config_name, split=config.dataset_split, cache_dir=config.cache_dir
    )


def _from_folder(config: DataConfig, wanted: list[str]) -> datasets.Dataset:
    folder = Path(config.train_data_dir).expanduser()
    if not folder.is_dir():
        raise ValueError(f"--train_data_dir {folder} is not a folder: give a folder with images or parquet files.")
    metadata = _metadata_file(folder)
    if metadata is None and (folder / config.dataset_split).is_dir():
        folder = folder / config.dataset_split
        metadata = _metadata_file(folder)
    if metadata is not None:
        return _from_metadata(metadata, config)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if tables := [str(path) for path in files if path.suffix == ".parquet"]:
        return datasets.Dataset.from_parquet(tables, cache_dir=config.cache_dir)
    return _from_text_files(folder, files, config, wanted)


def _metadata_file(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _from_metadata(path: Path, config: DataConfig) -> datasets.Dataset:
    table = METADATA[path.name](path)
    if "file_name" not in table.column_names:
        found = ", ".join(table.column_names)
        raise ValueError(f"{path} needs a column file_name with the image paths; the columns found: {found}.")
    rows = datasets.Dataset(table)
    files = [None if name is None else str(path.parent / name) for name in table["file_name"].to_pylist()]
    replaced = {"file_name", config.image_column} & set(rows.column_names)
    return rows.remove_columns(sorted(replaced)).add_column(config.image_column, files)


def _from_text_files(folder: Path, files: list[Path], config: DataConfig, wanted: list[str]) -> datasets.Dataset:
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    texts = {path.with_suffix("") for path in files if path.suffix == ".txt"}
    if not images:
        suffixes = ", ".join(sorted({path.suffix or path.name for path in files})) or "nothing"
        raise ValueError(f"{folder} holds no image and no parquet file; among its {len(files)} files: {suffixes}.")
    columns = {config.image_column: [str(path) for path in images]}
    if config.caption_column in wanted:
        if not texts:
            raise ValueError(
                f"{folder} holds {len(images)} images but no captions: add metadata.jsonl, .csv or .parquet "
                "with the columns file_name and text, or a .txt file beside each image."
            )
        columns[config.caption_column] = [
            path.with_suffix(".txt").read_text("utf-8").strip() if path.with_suffix("") in texts else ""
            for path in images
        ]
    return datasets.Dataset.from_dict(columns)
