"""Where clips and their captions come from: folders of clips or of frames, parquet files, the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from cm_diffusers.data.clips import CLIP_SUFFIXES, clip_name, is_frame, measure, read_frames
from cm_diffusers.data.sources import (
    METADATA,
    DataConfig,
    captions_of,
    from_hub,
    from_metadata,
    metadata_file,
    parquet_files,
    read_caption,
    require_columns,
    source_flag,
    source_name,
)
from cm_diffusers.errors import readable


@dataclass(frozen=True)
class FileClips:
    """Clips in files, decoded when they are asked for.

    Attributes:
        records: rows with the column of clips, undecoded.
        column: its name.
        captions: of each clip, none or several.
        digests: content hashes.
        lengths: numbers of frames, 0 where a clip cannot be read.
    """

    records: datasets.Dataset
    column: str
    captions: list[list[str]]
    digests: list[str]
    lengths: list[int]

    @classmethod
    def of(cls, config: DataConfig, span: int) -> "FileClips":
        """Finds the clips and measures them.

        Args:
            config: names the source; its image column is the clips'.
            span: least number of frames of a readable clip.

        Raises:
            ValueError: missing folder, no rows, no captions, a missing column or a clip that is too short.
        """
        rows = _load_rows(config)
        captions = [captions_of(value, config.caption_column) for value in rows[config.caption_column]]
        records = rows.select_columns(config.image_column)
        measured = [measure(row[config.image_column]) for row in tqdm(records, desc="Reading clips", delay=1)]
        digests, lengths = map(list, zip(*measured, strict=True))
        if short := [number for number, length in enumerate(lengths) if 0 < length < span]:
            name, length = clip_name(records[short[0]][config.image_column]), lengths[short[0]]
            raise ValueError(
                f"{len(short)} of {len(rows)} clips are too short, such as {name} with {length} frames: "
                f"--sample_n_frames with --sample_stride needs {span}; lower them, or leave these clips out."
            )
        return cls(records, config.image_column, captions, digests, lengths)

    def frames(self, row: int, numbers: Sequence[int]) -> list[Image.Image] | None:
        """The frames of a clip with these ascending numbers; None when one of them cannot be read.

        Raises:
            ValueError: they differ in size.
        """
        return read_frames(self.records[row][self.column], numbers)


def _load_rows(config: DataConfig) -> datasets.Dataset:
    """Captions, and clips undecoded as `{"bytes", "path"}` or as a list of such, one for each frame."""
    columns = [config.image_column, config.caption_column]
    dataset = from_hub(config) if config.dataset_name else _from_folder(config)
    require_columns(dataset.column_names, columns)
    if len(dataset) == 0:
        raise ValueError(f"The data holds no rows: {source_name(config)} is empty.")
    if config.max_train_samples is not None and config.max_train_samples < len(dataset):
        chosen = np.random.default_rng(0).permutation(len(dataset))[: config.max_train_samples]
        dataset = dataset.select(np.sort(chosen))
    of_frames = isinstance(dataset.features[config.image_column], datasets.List | datasets.LargeList)
    undecoded = datasets.List(datasets.Image(decode=False)) if of_frames else datasets.Video(decode=False)
    with readable(f"The column {config.image_column} of clips"):
        return dataset.select_columns(columns).cast_column(config.image_column, undecoded)


def _from_folder(config: DataConfig) -> datasets.Dataset:
    folder = Path(config.train_data_dir).expanduser()
    if not folder.is_dir():
        raise ValueError(f"--train_data_dir {folder} is not a folder: give a folder with clips or parquet files.")
    if metadata_file(folder) is None and (folder / config.dataset_split).is_dir():
        folder = folder / config.dataset_split
    if metadata := metadata_file(folder):
        return from_metadata(metadata, config)
    if tables := parquet_files(folder):
        with readable(source_flag(config)):
            return datasets.Dataset.from_parquet(tables, cache_dir=config.cache_dir)
    clips = _clips(folder)
    if not clips:
        raise ValueError(
            f"{folder} holds no clip: give files in {', '.join(sorted(CLIP_SUFFIXES))}, sub-folders of numbered "
            "frames, or parquet files."
        )
    texts = [path.with_name(f"{path.stem if path.is_file() else path.name}.txt") for path in clips]
    if not any(path.is_file() for path in texts):
        raise ValueError(
            f"{folder} holds {len(clips)} clips but no captions: add {', '.join(METADATA)} with the columns file_name "
            "and text, or a .txt file beside each clip."
        )
    captions = [read_caption(path) if path.is_file() else "" for path in texts]
    return datasets.Dataset.from_dict({config.image_column: list(map(str, clips)), config.caption_column: captions})


def _clips(folder: Path) -> list[Path]:
    """Clip files at any depth, and the folders that hold numbered frames."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    files = [path for path in found if path.suffix.lower() in CLIP_SUFFIXES]
    return sorted(files + list({path.parent for path in found if is_frame(path)}))
