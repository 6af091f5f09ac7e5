"""An endless stream of whole batches in which batch k of a rank is a pure function of (seed, rank, k)."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from cm_diffusers.data.found import Found
from cm_diffusers.errors import UserError
from cm_diffusers.types import Batch


SHUFFLE, DRAW = 0, 1  # two families of independent random streams of one seed


@dataclass(frozen=True)
class Position:
    """Which part of the stream a process reads."""

    seed: int
    rank: int = 0
    world_size: int = 1


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, SHUFFLE, epoch]).permutation(size)


def batch_rows(k: int, batch_size: int, size: int, position: Position) -> np.ndarray:
    """Row numbers (B,) of batch `k`: the ranks share every epoch, and a batch may span two epochs."""
    samples = (k * position.world_size + position.rank) * batch_size + np.arange(batch_size)
    epochs, places = np.divmod(samples, size)
    rows = [_permutation(position.seed, int(e), size)[p] for e, p in zip(epochs, places, strict=True)]
    return np.asarray(rows)


def batch_generator(k: int, position: Position) -> np.random.Generator:
    """The generator of every random choice in batch `k` of this rank."""
    return np.random.default_rng([position.seed, DRAW, position.rank, k])


@dataclass(frozen=True)
class Stream:
    """A data source: a function from the number of the first batch to an endless iterator of batches.

    Attributes:
        batches: That function.
        found: What is trained on and what is left out.
        fingerprint: Names the content that the batches are made of, wherever it lies; "" if nothing is known of it.
    """

    batches: Callable[[int], Iterator[Batch]]
    found: Found
    fingerprint: str = ""

    def __call__(self, start: int = 0) -> Iterator[Batch]:
        return self.batches(start)


class BatchDataset(Dataset):
    """Maps a batch number to the fields of that batch; never ends."""

    def __init__(self, make: Callable[[int], tuple[Any, ...]]) -> None:
        self.make = make

    def __getitem__(self, k: int) -> tuple[Any, ...] | UserError:
        try:
            return self.make(k)
        except UserError as error:
            return error


class ReadOn(IterableDataset):
    """What `read(start)` gives, in its order."""

    def __init__(self, read: Callable[[int], Iterator[Any]], start: int) -> None:
        self.read, self.start = read, start

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.read(self.start)
        except UserError as error:
            yield error


def stream(make: Callable[[int], tuple[Any, ...]], num_workers: int, *, found: Found, fingerprint: str = "") -> Stream:
    """The data source of `make(k) -> (x0, cond, uncond, ...)`, a batch's fields."""

    def batches(start: int) -> Iterator[Batch]:
        for fields in loaded(make, num_workers, start):
            yield Batch(*fields)

    return Stream(batches, found, fingerprint)


def loaded(make: Callable[[int], Any], num_workers: int, start: int) -> Iterator[Any]:
    """`make(start)`, `make(start + 1)` and so on, by `num_workers` processes; by this one if there are none."""
    return _by_workers(BatchDataset(make), num_workers, sampler=count(start))


def read_on(read: Callable[[int], Iterator[Any]], apart: bool, start: int) -> Iterator[Any]:
    """`read(start)`, by a process of its own or by this one: what can only be read in order is read by one."""
    return _by_workers(ReadOn(read, start), int(apart))


def _by_workers(dataset: Dataset, num_workers: int, sampler: Iterator[int] | None = None) -> Iterator[Any]:
    """
    Raises:
        ValueError: As in the worker: the loader would put its traceback into the sentence.
    """
    loader = DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the loader must not draw from the global generator
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


def ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same endless items, each made by a thread while the one before it is used.

    The first is made where it is asked for: a data loader starts its processes then, which a thread should not.
    """
    first, gpu = next(items), torch.cuda.current_device() if torch.cuda.is_available() else -1
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(gpu,)) as thread:
        following = thread.submit(next, items)
        yield first
        while True:
            item = following.result()
            following = thread.submit(next, items)
            yield item
