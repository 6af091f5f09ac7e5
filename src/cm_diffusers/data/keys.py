"""sha256 keys of rows, by the million: which rows have the same one, and where one is."""

import hashlib
from collections.abc import Iterable
from operator import length_hint

import numpy as np


BYTES = 32


def taken(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """These rows (M,) of a table (N, ...); the table itself, not a copy, where they are all of it in their order."""
    return table if len(rows) == len(table) else table[rows]


def keys_of(texts: Iterable[str]) -> np.ndarray:
    """sha256 of each text (N, 32) uint8."""
    digests = (hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts)
    return np.fromiter(digests, f"S{BYTES}", length_hint(texts, -1)).view(np.uint8).reshape(-1, BYTES)


class Keys:
    """N keys, each distinct one numbered, in an order of their own; beside the table they take 20 bytes each.

    Attributes:
        table: The keys (N, 32) uint8.
        first: Of each distinct key the first row that has it (M,) int32.
        number: Of each row the number of its key (N,) int32.
    """

    def __init__(self, table: np.ndarray) -> None:
        self.table, words = table, _words(table)
        order = np.lexsort(words.T).astype(np.int32)  # stable
        new = np.arange(len(order)) == 0
        for word in words.T:
            values = word[order]
            new[1:] |= values[1:] != values[:-1]
        self.first, self.number = order[new], np.empty(len(order), np.int32)
        self.number[order] = np.cumsum(new, dtype=np.int32) - 1
        self.leading = words[self.first, -1]

    def __len__(self) -> int:
        return len(self.first)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Of each of K keys (K, 32) uint8 its number, -1 where it is not among these (K,)."""
        leading = _words(keys)[:, -1]
        at, found = np.searchsorted(self.leading, leading), np.full(len(keys), -1)
        left = np.arange(len(keys))
        while len(left):
            left = left[at[left] < len(self)]
            left = left[self.leading[at[left]] == leading[left]]
            hit = (self.table[self.first[at[left]]] == keys[left]).all(1)
            found[left[hit]] = at[left[hit]]
            left = left[~hit]  # beside another key that ends alike
            at[left] += 1
        return found


def _words(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys).view(np.uint64)
