"""The captions of a data set: texts in Arrow, where they lie on disk as far as they can, and by row the numbers of its own."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import datasets
import numpy as np
import pyarrow as pa

from cm_diffusers.data.keys import Keys, keys_of
from cm_diffusers.data.shards import AT_ONCE
from cm_diffusers.data.sources import captions_of


EMPTY = 0  # number of the empty prompt in every table
STRINGS = (pa.string(), pa.large_string())


class Texts(Sequence):
    """Texts that take at most the memory of their characters."""

    def __init__(self, array: pa.ChunkedArray) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, number: int) -> str:
        return self.array[int(number)].as_py()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), AT_ONCE):
            yield from self.array[start : start + AT_ONCE].to_pylist()


class Captions(Sequence):
    """Of each row a list of captions, of which there may be none; `captions[i]` holds them, or their numbers.

    Attributes:
        values: Of all rows, one after the other.
        ends: Number of values up to the end of each row (N,).
    """

    def __init__(self, values: Texts | np.ndarray, lengths: np.ndarray) -> None:
        self.values, self.ends = values, np.cumsum(lengths)

    @classmethod
    def read(cls, dataset: datasets.Dataset, column: str) -> "Captions":
        """
        Raises:
            ValueError: A row holds something else than texts.
        """
        lengths, parts = [], []
        for batch in dataset.select_columns(column).with_format("arrow").iter(AT_ONCE):
            values, given = batch[column], batch[column].to_pylist()
            plain = values.type in STRINGS
            kind = values.type if plain else pa.large_string()
            rows = [captions_of(value, column) for value in given]
            texts = [text for row in rows for text in row]
            lengths.append(np.fromiter(map(len, rows), np.int32, len(rows)))
            parts += values.chunks if plain and texts == given else [pa.array(texts, kind)]
        return cls(Texts(pa.chunked_array(parts, kind)), np.concatenate(lengths))

    @property
    def lengths(self) -> np.ndarray:
        """Number of captions of each row (N,)."""
        return np.diff(self.ends, prepend=0)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> list[str] | np.ndarray:
        return self._between(self.ends[row - 1] if row else 0, self.ends[row])

    def __iter__(self) -> Iterator[list[str] | np.ndarray]:
        for start in range(0, len(self), AT_ONCE):
            ends = self.ends[start : start + AT_ONCE]
            first = self.ends[start - 1] if start else 0
            values = self._between(first, ends[-1])
            for begin, end in pairwise([first, *ends]):
                yield values[begin - first : end - first]

    def _between(self, start: int, end: int) -> list[str] | np.ndarray:
        if isinstance(self.values, Texts):
            return self.values.array[start:end].to_pylist()
        return self.values[start:end]

    def numbered(self, rows: np.ndarray) -> tuple[Texts, "Captions"]:
        """The distinct texts of some rows, the empty prompt before all; and of each of these rows their numbers."""
        lengths = self.lengths
        chosen = np.zeros(len(self), bool)
        chosen[rows] = True
        mine = _filtered(self.values.array, np.repeat(chosen, lengths))
        keys = Keys(keys_of(Texts(mine)))
        order = np.argsort(keys.first)  # of the distinct ones, by where they are first
        number = np.empty(len(order), np.int32)
        number[order] = np.arange(1, len(order) + 1)
        first = np.zeros(len(mine), bool)
        first[keys.first] = True
        distinct = _filtered(mine, first)
        texts = pa.chunked_array([pa.array([""], distinct.type), *distinct.chunks])
        return Texts(texts), Captions(number[keys.number], lengths[rows])


def _filtered(texts: pa.ChunkedArray, wanted: np.ndarray) -> pa.ChunkedArray:
    """Those that are wanted (N,); a copy where some are not."""
    return texts if wanted.all() else texts.filter(pa.array(wanted))
