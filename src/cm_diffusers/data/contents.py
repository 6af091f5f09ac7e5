"""What is in the image files of a data set: read once, and kept by path, size and time of change."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch

from cm_diffusers.data.kept import Kept, Wanted, keep
from cm_diffusers.data.keys import taken
from cm_diffusers.data.preprocessing import content_hash, decode_image, upright_size
from cm_diffusers.data.ragged import Tensors
from cm_diffusers.data.shards import AT_ONCE, row_ranges, shard_key
from cm_diffusers.data.sources import DataConfig


MISSING = "missing"  # in place of the sha256 of a file that is not there
FILE_ROWS = 8192  # of a shard, 40 bytes each
NO_KEY = bytes(32)


class Digests(Sequence):
    """sha256 of files in hexadecimal, `MISSING` where there is none; held as a table (N, 32) uint8, zeros where there is none."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Digests":
        content = b"".join(NO_KEY if text == MISSING else bytes.fromhex(text) for text in texts)
        return cls(np.frombuffer(content, np.uint8).reshape(-1, 32))

    @property
    def there(self) -> np.ndarray:
        """Which files are there (N,)."""
        return self.table.any(1)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> str:
        digest = self.table[row].tobytes()
        return MISSING if digest == NO_KEY else digest.hex()


class Contents(NamedTuple):
    """Of N image files.

    Attributes:
        digests: Of their bytes.
        sizes: Heights and widths of the upright images (N, 2) int32, 0 where a file's header cannot be read; (0, 2) where
            nobody asked.
        readable: Whether each is an image (N,); (0,) where nobody asked.
    """

    digests: Digests
    sizes: np.ndarray
    readable: np.ndarray


def read_contents(dataset: datasets.Dataset, config: DataConfig, sized: bool, decoded: bool = False) -> Contents:
    """What is in the files of `config.image_column`; files that were read before and have not changed are not opened.

    Args:
        dataset: Rows with the images undecoded.
        config: Where what was read is kept.
        sized: Whether sizes are wanted.
        decoded: Whether images are decoded to find out which can be; what could not be is tried again each time.
    """
    records, column = dataset.select_columns(config.image_column), config.image_column
    keys = _file_keys(records, column)
    rows = np.flatnonzero(keys.any(1))

    def read(numbers: Sequence[int]) -> Iterator[Tensors]:
        with ThreadPoolExecutor() as pool:
            for part in row_ranges(len(numbers), AT_ONCE):
                chunk = records[rows[[numbers[i] for i in part]]][column]
                table = Digests.of(list(pool.map(content_hash, chunk))).table.copy()
                read = {"digest": torch.from_numpy(table)}
                read |= {"readable": torch.tensor([*pool.map(_readable, chunk)])} if decoded else {}
                yield read | ({"size": torch.tensor([*map(_size, chunk)], dtype=torch.int32)} if sized else {})

    setting = shard_key("files", "sized" if sized else "", *["decoded"] * decoded)
    keys = taken(keys, rows)
    (kept,) = keep([Wanted(setting, keys, read)], config, "image files", FILE_ROWS)
    del keys  # each table of all rows counts
    kept = Kept.together(len(records), [(rows, kept)])
    table = kept.fill("digest", np.zeros((len(records), 32), np.uint8))
    sizes, readable = np.zeros((0, 2), np.int32), np.zeros(0, bool)
    if sized:
        sizes = kept.fill("size", np.zeros((len(records), 2), np.int32))
    if decoded:
        readable = kept.fill("readable", np.zeros(len(records), bool))
    for row in rows[~table[rows].any(1)].tolist():  # they could not be read then, but perhaps they can now
        table[row] = Digests.of([content_hash(records[row][column])]).table[0]
    for row in np.flatnonzero(~readable).tolist():
        readable[row] = _readable(records[row][column])
    return Contents(Digests(table), sizes, readable)


def _readable(record: dict[str, Any] | None) -> bool:
    return decode_image(record) is not None


def _size(record: dict[str, Any] | None) -> tuple[int, int]:
    return upright_size(record) or (0, 0)


def _file_keys(records: datasets.Dataset, column: str) -> np.ndarray:
    """What names each file's content without reading it (N, 32) uint8; zeros where there is no file.

    A file has its path, size and time of change, an image in a table the table's fingerprint and the row's number.
    """
    keys, row = bytearray(), 0
    for batch in records.with_format("arrow").iter(AT_ONCE):
        images = batch[column].combine_chunks()
        inside = images.is_valid().to_numpy(False) & images.field("bytes").is_valid().to_numpy(False)
        paths = _paths(images, inside)
        for number, path in enumerate(paths, row):
            name = f"{records._fingerprint} {number}" if path is True else path and _stamp(path)
            keys += hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() if name else NO_KEY
        row += len(images)
    return np.frombuffer(keys, np.uint8).reshape(-1, 32)


def _paths(images: pa.StructArray, inside: np.ndarray) -> list[Any]:
    """Of each image: True where its bytes are in the table, else its path, or None."""
    if inside.all():
        return [True] * len(images)
    valid = images.is_valid().to_pylist()
    paths = images.field("path").to_pylist()
    return [bool(has) or (path if there else None) for has, path, there in zip(inside, paths, valid, strict=True)]


def _stamp(path: str) -> str | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}"
