"""Where clips and their captions come from: folders of clips or of frames, parquet files, the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
from PIL import Image
from tqdm.auto import tqdm

from cm_diffusers.data.clips import CLIP_SUFFIXES, clip_name, is_frame, measure, read_frames
from cm_diffusers.data.file_names import CAPTION_SUFFIXES, METADATA, suffix_of
from cm_diffusers.data.folders import Folder
from cm_diffusers.data.found import Found
from cm_diffusers.data.sources import (
    DataConfig,
    captions_of,
    from_hub,
    open_folder,
    require_columns,
    subset,
)
from cm_diffusers.errors import UserError, readable


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
    def of(cls, config: DataConfig, span: int, found: Found) -> "FileClips":
        """Finds the clips and measures them.

        Args:
            config: names the source; its image column is the clips'.
            span: least number of frames of a readable clip.
            found: is told what is left out.

        Raises:
            ValueError: missing folder, no rows, no captions, a missing column or a clip that is too short.
        """
        rows = _load_rows(config, found)
        captions = [captions_of(value, config.caption_column) for value in rows[config.caption_column]]
        records = rows.select_columns(config.image_column)
        measured = [measure(row[config.image_column]) for row in tqdm(records, desc="Reading clips", delay=1)]
        digests, lengths = map(list, zip(*measured, strict=True))
        if short := [number for number, length in enumerate(lengths) if 0 < length < span]:
            name, length = clip_name(records[short[0]][config.image_column]), lengths[short[0]]
            raise UserError(
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


def _load_rows(config: DataConfig, found: Found) -> datasets.Dataset:
    """Captions, and clips undecoded as `{"bytes", "path"}` or as a list of such, one for each frame."""
    columns = [config.image_column, config.caption_column]
    if config.dataset_name:
        dataset = from_hub(config)
    else:
        dataset = open_folder(config, found).rows(_loose_clips)
    require_columns(dataset.column_names, columns)
    dataset = subset(dataset, config, found)
    of_frames = isinstance(dataset.features[config.image_column], datasets.List | datasets.LargeList)
    undecoded = datasets.List(datasets.Image(decode=False)) if of_frames else datasets.Video(decode=False)
    with readable(f"The column {config.image_column} of clips"):
        return dataset.select_columns(columns).cast_column(config.image_column, undecoded)


def _loose_clips(folder: Folder) -> datasets.Dataset:
    """Rows of clip files at any depth and of folders that hold numbered frames, with the captions beside them."""
    frames = [file for file in folder.files if is_frame(file)]
    files = [file for file in folder.files if suffix_of(file) in CLIP_SUFFIXES]
    clips = sorted([*files, *{file.parent for file in frames}])
    if not clips:
        raise UserError(
            f"{folder.path} holds no clip: give files in {', '.join(sorted(CLIP_SUFFIXES))}, sub-folders of numbered "
            "frames, or parquet files."
        )
    texts = [file for file in folder.files if suffix_of(file) in CAPTION_SUFFIXES]
    folder.leave_out("files of another kind", set(folder.files) - {*frames, *files, *texts})
    captions = folder.captions([clip.with_suffix("") if clip.is_file() else clip for clip in clips])
    if not any(captions):
        raise UserError(
            f"{folder.path} holds {len(clips)} clips but no captions: add {', '.join(METADATA)} with the columns "
            "file_name and text, or a .txt or .caption file beside each clip."
        )
    return datasets.Dataset.from_dict({folder.image_column: list(map(str, clips)), folder.caption_column: captions})
