"""The captions of a data set: one list of texts in Arrow, and by row the numbers of its own."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import datasets
import numpy as np
import pyarrow as pa

from cm_diffusers.data.shards import AT_ONCE
from cm_diffusers.data.sources import captions_of


EMPTY = 0  # number of the empty prompt in every table


class Texts(Sequence):
    """Texts that take the memory of their characters."""

    def __init__(self, array: pa.Array) -> None:
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
            rows = [captions_of(value, column) for value in batch[column].to_pylist()]
            lengths.append(np.fromiter(map(len, rows), np.int32))
            parts.append(pa.array([text for texts in rows for text in texts], pa.large_string()))
        return cls(Texts(pa.chunked_array(parts, pa.large_string()).combine_chunks()), np.concatenate(lengths))

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
        chosen = np.zeros(len(self), bool)
        chosen[rows] = True
        mine = self.values.array
        if not chosen.all():  # each copy of millions of texts counts
            mine = mine.filter(pa.array(np.repeat(chosen, self.lengths)))
        empty, others = pa.chunked_array([pa.array([""], pa.large_string()), mine]).dictionary_encode().chunks
        return Texts(others.dictionary), Captions(others.indices.to_numpy(), self.lengths[rows])
