"""Folders of the user: images or clips, with captions in metadata, in parquet files or in text files beside them."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from pyarrow import parquet

from cm_diffusers.data.file_names import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    METADATA,
    NO_DATA,
    is_hidden,
    is_metadata,
    suffix_of,
)
from cm_diffusers.data.found import Found
from cm_diffusers.data.splits import TEST, TRAIN, split_name, splits_of
from cm_diffusers.data.tables import read_table
from cm_diffusers.errors import read_text, readable


FLAG = "--train_data_dir"


@dataclass(frozen=True)
class Folder:
    """A folder that was named on the command line.

    Attributes:
        path: Where its files are: the folder itself, or that of the split inside.
        files: All of the split that are not hidden, sorted.
        outside: Those that are not of the split.
        found: Counts what is left out.
        image_column: The rows' column of images or clips.
        caption_column: The rows' column of captions; None where none are read.
        cache_dir: Where `datasets` keeps what it makes of parquet files.
    """

    path: Path
    files: list[Path]
    outside: set[Path]
    found: Found
    image_column: str
    caption_column: str | None
    cache_dir: str | None

    @classmethod
    def of(cls, path: str, split: str, found: Found, image_column: str, *options: str | None) -> "Folder":
        """Finds the files of the split; of "train" where no file tells a split, all that tell none.

        Raises:
            ValueError: No such folder, or no such split in it.
        """
        top, wanted = checked_folder(path), split_name(split)
        files, hidden = _files(top)
        of_data = (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES, ".parquet")
        found.skip("hidden files", _names(top, (file for file in hidden if suffix_of(file) in of_data)))
        splits = splits_of(top, files, split)
        metadata = metadata_file(top)
        mine = [file for file, name in splits.items() if name == wanted and file != metadata]
        plain = [file for file, name in splits.items() if name is None and file != metadata]
        if wanted == TRAIN and (metadata or not mine):
            mine, plain = sorted([*mine, *plain], key=attrgetter("parts")), []
        others = sorted({name for name in splits.values() if name} - {wanted})
        if not mine and (others or wanted != TRAIN):
            known = f"the splits in it: {', '.join(others)}" if others else "no name in it tells a split"
            raise ValueError(
                f"{FLAG} {top} has no split {split} ({known}): give another --dataset_split, or the folder of the files."
            )
        for other in others:
            found.skip(f"files of the split {other}", _names(top, (f for f in splits if splits[f] == other)))
        found.skip(f"files outside the split {split}", _names(top, plain))
        told = [file.parent for file in mine if splits[file]]
        folder = top if metadata or not told else Path(os.path.commonpath(told))
        mine = [*mine, *([metadata] if metadata else [])]
        return cls(folder, mine, splits.keys() - set(mine), found, image_column, *options)

    def rows(self, loose: Callable[["Folder"], datasets.Dataset]) -> datasets.Dataset:
        """The rows of its metadata, else of its parquet files, else of loose files by `loose`.

        Raises:
            ValueError: Damaged or missing files or columns.
        """
        if metadata := metadata_file(self.path):
            return self._from_metadata(metadata)
        if tables := [file for file in self.files if suffix_of(file) == ".parquet"]:
            self.leave_out("files beside the parquet files, which are read", set(self.files) - set(tables))
            return from_parquet(tables, f"{FLAG} {self.path}", self.cache_dir)
        return loose(self)

    def leave_out(self, reason: str, files: Iterable[Path]) -> None:
        self.found.skip(reason, _names(self.path, files))

    def captions(self, stems: list[Path]) -> list[str]:
        """The captions of images or clips, by their paths without suffix; "" where there is none."""
        texts: dict[Path, list[Path]] = {}
        of_texts = [file for file in self.files if suffix_of(file) in CAPTION_SUFFIXES]
        for file in sorted(of_texts, key=lambda file: CAPTION_SUFFIXES.index(suffix_of(file))):
            texts.setdefault(file.with_suffix(""), []).append(file)
        wanted, uses = {stem: texts.get(stem, []) for stem in stems}, Counter(stems)
        kind, alone = self.found.kind, texts.keys() - uses.keys()
        self.leave_out(f"captions without {kind}", (file for stem in alone for file in texts[stem]))
        self.leave_out(f"second captions of {kind}", (file for files in wanted.values() for file in files[1:]))
        shared = [stem for stem, number in uses.items() if number > 1 and wanted[stem]]
        self.found.remark(f"several {kind} with one caption file", _names(self.path, shared))
        read = {stem: self._caption(files[0]) for stem, files in wanted.items() if files}
        return [read.get(stem, "") for stem in stems]

    def _caption(self, file: Path) -> str:
        with readable(f"{FLAG}: the file {file}"):
            return read_text(file).strip()

    def _from_metadata(self, path: Path) -> datasets.Dataset:
        texts = [self.caption_column] if self.caption_column else []
        with readable(f"{FLAG}: the file {path}"):
            table = read_table(path, ["file_name", *texts])
        if "file_name" not in table.column_names:
            found = ", ".join(table.column_names)
            raise ValueError(f"{path} needs a column file_name with the image paths; the columns found: {found}.")
        names = [_place(path, name) for name in table["file_name"].to_pylist()]
        mine = [number for number, name in enumerate(names) if name is None or Path(name) not in self.outside]
        table, names = table.take(pa.array(mine, pa.int64())), [names[number] for number in mine]
        uses, others = Counter(map(Path, filter(None, names))), set(self.files) - {path}
        self.found.remark("files in several rows", _names(self.path, (file for file in uses if uses[file] > 1)))
        unnamed = {file for file in others if not uses.keys() & {file, file.parent}}
        beside = {file for file in unnamed if suffix_of(file) in (*CAPTION_SUFFIXES, ".parquet") or is_metadata(file)}
        self.leave_out(f"files that {path.name} does not name", unnamed - beside)
        self.leave_out(f"files beside {path.name}, which is read", beside)
        rows, replaced = datasets.Dataset(table), {"file_name", self.image_column} & set(table.column_names)
        rows = rows.add_column("__paths__", names)  # before the others go: without a column there are no rows
        return rows.remove_columns(sorted(replaced)).rename_column("__paths__", self.image_column)


def _place(metadata: Path, name: Any) -> str | None:
    """What a row names, beside the metadata; Windows' separators are taken for what they are."""
    if name is None:
        return None
    if not isinstance(name, str | int):
        raise ValueError(
            f"{metadata} must hold paths in its column file_name, but a row holds {name!r}: give one a row."
        )
    place = metadata.parent / str(name)
    return str(place if "\\" not in place.name or place.exists() else metadata.parent / name.replace("\\", "/"))


def checked_folder(path: str, flag: str = FLAG) -> Path:
    """
    Raises:
        ValueError: No such folder.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder} is not a folder: give a folder with images, clips or parquet files.")
    return folder


def folder_of_test_data(path: str) -> dict[str, str]:
    """Flags that read a folder of test data: of its split "test" where its files are told apart, else all that it has.

    Raises:
        ValueError: As `splits_of`, or no such folder.
    """
    top = checked_folder(path)
    apart = TEST in splits_of(top, _files(top)[0], TEST).values()
    return {"train_data_dir": path, "dataset_split": TEST if apart else TRAIN}


def _files(top: Path) -> tuple[list[Path], list[Path]]:
    """All files, sorted, also in linked folders and links that lead nowhere: those to be seen, and hidden ones."""
    found, above = [], {str(top): {os.path.realpath(top)}}  # of each folder the real ones that it lies in
    for place, folders, names in os.walk(top, followlinks=True):
        found += [Path(place, name) for name in names]
        real = {name: os.path.realpath(os.path.join(place, name)) for name in folders}
        folders[:] = [name for name in folders if real[name] not in above[place]]  # a link may lead back
        above |= {os.path.join(place, name): above[place] | {real[name]} for name in folders}
    found.sort(key=attrgetter("parts"))
    hidden = {file for file in found if is_hidden(file.relative_to(top))}
    return [file for file in found if file not in hidden], sorted(hidden)


def loose_images(folder: Folder) -> datasets.Dataset:
    """Rows of image files, with the captions in the text files beside them.

    Raises:
        ValueError: No image, no caption where they are read, or a caption that is no text.
    """
    files = folder.files
    images = [file for file in files if suffix_of(file) in IMAGE_SUFFIXES]
    if not images:
        suffixes = ", ".join(sorted({file.suffix or file.name for file in files})) or "nothing"
        raise ValueError(
            f"{folder.path} holds no image and no parquet file; among its {len(files)} files: {suffixes}."
        )
    texts = {file for file in files if suffix_of(file) in CAPTION_SUFFIXES}
    folder.leave_out("files of another kind", set(files) - set(images) - texts)
    columns = {folder.image_column: list(map(str, images))}
    if folder.caption_column:
        if not texts:
            raise ValueError(
                f"{folder.path} holds {len(images)} images but no captions: add metadata.jsonl, .csv or .parquet "
                "with the columns file_name and text, or a .txt or .caption file beside each image."
            )
        columns[folder.caption_column] = folder.captions([file.with_suffix("") for file in images])
    return datasets.Dataset.from_dict(columns)


def metadata_file(folder: Path) -> Path | None:
    found = {path.name.lower(): path for path in folder.iterdir() if is_metadata(path) and path.is_file()}
    return next((found[name] for name in METADATA if name in found), None)


def from_parquet(tables: list[Path], what: str, cache_dir: str | None) -> datasets.Dataset:
    files = checked_tables(tables)
    with readable(what):
        return datasets.Dataset.from_parquet(files, cache_dir=cache_dir)


def checked_tables(tables: list[Path]) -> list[str]:
    """
    Raises:
        ValueError: One is damaged.
    """
    for path in tables:
        with readable(f"{FLAG}: the file {path}"):
            parquet.read_schema(path)  # its end, which a truncated file lacks
    return list(map(str, tables))


def _names(folder: Path, files: Iterable[Path]) -> list[str]:
    """Of the files that may be data, relative to the folder."""
    mine = sorted(file for file in files if file.name.lower() not in NO_DATA)
    return [str(file.relative_to(folder) if file.is_relative_to(folder) else file) for file in mine]
