"""Rows of a data set that are encoded once and kept: found by their own keys, whatever lies around them."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from cm_diffusers.data import shards as files
from cm_diffusers.data.keys import Keys
from cm_diffusers.data.ragged import Tensors, is_by_row
from cm_diffusers.data.shards import KEYS, Shard, row_ranges, shard_name, tensors_of
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.engine.launcher import processes
from cm_diffusers.errors import UserError


logger = logging.getLogger(__name__)


class Wanted(NamedTuple):
    """Rows that are encoded alike.

    Attributes:
        setting: sha256 of all that decides an encoding beside the row itself; the name of their folder.
        keys: sha256 of each row (N, 32) uint8; rows of one key are encoded once.
        encode: Numbers of rows -> their tensors part by part, each with a first dimension of rows, or `packed`.
    """

    setting: str
    keys: np.ndarray
    encode: Callable[[Sequence[int]], Iterator[Tensors]]


class Kept(NamedTuple):
    """Where N rows are.

    Attributes:
        shards: That hold them, and others.
        shard: Number of each row's shard (N,) int32; -1 for a row that is nowhere.
        place: Its row in there (N,) int32.
    """

    shards: list[Shard]
    shard: np.ndarray
    place: np.ndarray

    def row(self, number: int) -> tuple[Tensors, int]:
        """The tensors that hold a row, and its place in them."""
        return tensors_of(self.shards[self.shard[number]]), int(self.place[number])

    def fill(self, name: str, values: np.ndarray) -> np.ndarray:
        """Writes the values of every row that is somewhere to `values` (N, ...), each shard read once; returns it."""
        order = np.argsort(self.shard, kind="stable").astype(np.int32)
        numbers, starts = np.unique(self.shard[order], return_index=True)
        for number, rows in zip(numbers, np.split(order, starts[1:]), strict=True):
            if number >= 0:
                values[rows] = tensors_of(self.shards[number])[name].numpy()[self.place[rows]]
        return values

    @classmethod
    def together(cls, number: int, parts: list[tuple[np.ndarray, "Kept"]]) -> "Kept":
        """Of `number` rows, those of each part; rows of none are nowhere."""
        shards, shard, place = [], np.full(number, -1, np.int32), np.zeros(number, np.int32)
        for rows, part in parts:
            shard[rows], place[rows] = np.where(part.shard < 0, -1, part.shard + len(shards)), part.place
            shards += part.shards
        return cls(shards, shard, place)


def keep(wanted: Sequence[Wanted], config: DataConfig, kind: str, shard_rows: int | None = None) -> list[Kept]:
    """Encodes the rows that `config.latent_cache_dir` lacks; all of them, in memory, without `cache_latents`.

    Every process encodes its share, see `in_shares`.

    Args:
        wanted: Rows by setting.
        config: Says whether and where they are kept.
        kind: What they are, for the progress bar, the log and `cache_stats.py`.
        shard_rows: Of a new shard; `SHARD_ROWS` if not given.

    Raises:
        ValueError: The folder cannot be written, or has no room for what is missing.
    """
    size, title = shard_rows or files.SHARD_ROWS, kind.capitalize()
    searches = [_Search(one) for one in wanted]
    if not config.cache_latents:
        with tqdm(total=sum(len(search.keys) for search in searches), desc=title, disable=not searches) as bar:
            return [search.in_memory(size, bar) for search in searches]
    folder, named = Path(config.latent_cache_dir).expanduser(), set()

    def missing() -> list[tuple[_Search, Sequence[int]]]:
        for search in searches:
            search.look(folder, named)
        return [(search, part) for search in searches for part in search.missing(size)]

    def encode(jobs: list[tuple[_Search, Sequence[int]]]) -> None:
        files.check_writable(folder)
        room = _Room(folder, kind, sum(search.number_missing for search in searches))
        with tqdm(total=sum(len(rows) for _, rows in jobs), desc=title) as bar:
            for search, rows in jobs:
                search.write(folder, rows, kind, room, bar)

    in_shares(missing, encode)
    found = [search.found() for search in searches]
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        files.mark_used(path for one in found for path in one.shards)
    return found


def in_shares(missing: Callable[[], list[Any]], make: Callable[[list[Any]], None]) -> None:
    """Makes what is missing, every process its share; each sees all of it afterwards.

    First all processes share it, then those of each machine what other machines have made in folders of their own,
    then each process makes what is still not there.

    Args:
        missing: What is not there, the same and in the same order for all who look at one time.
        make: Some of it.
    """
    for rank, ranks in _shares():
        todo = missing()
        if not any(_of_all(len(todo))):  # also: nobody writes before all have looked
            return
        if mine := todo[rank::ranks]:
            make(mine)
        _of_all(0)  # nobody looks before all have written
    missing()


def _shares() -> list[tuple[int, int]]:
    """Of this process: its number among how many, and so on until it is alone."""
    if (state := _state()) is None:
        return [(0, 1)]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    return [(state.process_index, state.num_processes), (state.local_process_index, local), (0, 1)]


def _of_all(value: int) -> list[int]:
    return [value] if _state() is None else gather_object([value])


def _state() -> PartialState | None:
    return None if int(os.environ.get("WORLD_SIZE", "1")) == 1 else processes()


class _Search:
    """The wanted rows, each key once, and where they have been found so far."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted, self.keys, self.shards = wanted, Keys(wanted.keys), []
        self.shard = np.full(len(self.keys), -1, np.int32)
        self.place = np.zeros(len(self.keys), np.int32)

    def look(self, folder: Path, named: set[Path]) -> None:
        """Finds rows in the shards of the setting; those in `named` have been called damaged before."""
        self.shards = []
        self.shard[:] = -1
        for path in sorted((folder / self.wanted.setting).glob("*.safetensors")):
            keys = files.read_keys(path)
            if not isinstance(keys, str):
                self._take(keys, path)
            elif path not in named:
                named.add(path)
                files.logger.warning("The cached file %s %s; it is encoded anew.", path, keys)

    def _take(self, keys: np.ndarray, shard: Shard) -> None:
        at = self.keys.find(keys)
        hit = np.flatnonzero((at >= 0) & (self.shard[at] < 0)) if len(self.keys) else []
        if len(hit):
            self.shard[at[hit]], self.place[at[hit]] = len(self.shards), hit
            self.shards.append(shard)

    @property
    def number_missing(self) -> int:
        return int((self.shard < 0).sum())

    def missing(self, size: int) -> list[np.ndarray]:
        """Rows that are nowhere, in their order, by the shards to write."""
        rows = np.sort(self.keys.first[self.shard < 0])
        return [rows[part.start : part.stop] for part in row_ranges(len(rows), size)]

    def write(self, folder: Path, rows: np.ndarray, kind: str, room: "_Room", bar: tqdm) -> None:
        keys = np.ascontiguousarray(self.wanted.keys[rows])
        path = folder / self.wanted.setting / f"{shard_name(self.wanted.setting, keys)}.safetensors"
        tensors = self._encoded(rows, bar, room) | {KEYS: torch.from_numpy(keys)}
        files.write_shard(path, tensors, kind)

    def in_memory(self, size: int, bar: tqdm) -> Kept:
        for rows in self.missing(size):
            self._take(self.wanted.keys[rows], self._encoded(rows, bar))
        return self.found()

    def found(self) -> Kept:
        return Kept(self.shards, self.shard[self.keys.number], self.place[self.keys.number])

    def _encoded(self, rows: np.ndarray, bar: tqdm, room: "_Room | None" = None) -> Tensors:
        parts = []
        for part in self.wanted.encode(rows.tolist()):
            parts.append(part)
            number = next(len(value) for name, value in part.items() if is_by_row(name))
            if room:
                room.check(part, number)
            bar.update(number)
        return files.joined_parts(parts)


class _Room:
    """Whether a disk can take so many rows, told once, when the size of the first is known."""

    def __init__(self, folder: Path, kind: str, rows: int) -> None:
        self.folder, self.kind, self.rows, self.told = folder, kind, rows, False

    def check(self, part: dict[str, Tensor], number: int) -> None:
        """
        Raises:
            ValueError: It has less than all rows need, if they are as large as these.
        """
        if self.told:
            return
        self.told, each = True, sum(tensor.nbytes for tensor in part.values()) / number + 32
        free = shutil.disk_usage(self.folder).free
        need = (
            f"{self.rows:,} {self.kind} that are not there yet take {each / 2**10:,.1f} KiB each, "
            f"{_size(each * self.rows)} in all"
        )
        if each * self.rows > free:
            raise UserError(
                f"--latent_cache_dir {self.folder} has {_size(free)} free, but {need}: make room (training/cache_prune.py), "
                "name another folder, or take fewer images; --streaming needs no room."
            )
        if int(os.environ.get("RANK", "0")) == 0:
            logger.info("%s; %s has %s free.", need, self.folder, _size(free))


def _size(number: float) -> str:
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"
