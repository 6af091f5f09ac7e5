"""Where the samples of tar shards are: listed once, kept in the cache folder, read by range from disk, web or Hub."""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from cm_diffusers.data.found import Found
from cm_diffusers.data.kept import in_shares
from cm_diffusers.data.ragged import Tensors
from cm_diffusers.data.shards import check_writable, mark_used, shard_key, tensors_of, write_shard
from cm_diffusers.data.sources import DataConfig, source_flag
from cm_diffusers.data.tars import TAR_ROWS, Lacks, Run, runs, samples_of
from cm_diffusers.errors import UserError, readable


COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
READERS = 16  # ranges that are read at one time from a place that is not a disk


@dataclass(frozen=True)
class Index:
    """Of one tar: what has an image and may have a caption, by the names of the members.

    Attributes:
        tensors: `offset`, `size` (N,) int64, the bytes of each sample; `place` (N,) int16, which of the samples there it is.
        about: `content`, a hash of all members' names, sizes and times; `lacks`, JSON of what is left out and how much.
    """

    tensors: Tensors | Path
    about: dict[str, str]

    def __len__(self) -> int:
        return int(self.about["rows"])

    def range(self, sample: int) -> tuple[int, int, int]:
        """First byte of a sample and the byte after its last, and which of the samples there it is."""
        tensors = tensors_of(self.tensors)
        offset = int(tensors["offset"][sample])
        return offset, offset + int(tensors["size"][sample]), int(tensors["place"][sample])


@dataclass(frozen=True)
class TarSet:
    """Tar shards with their indexes."""

    shards: list[str]
    indexes: list[Index]

    @classmethod
    def of(cls, shards: list[str], config: DataConfig) -> "TarSet":
        """Lists what `config.latent_cache_dir` has no index of, every process its share; all in memory without `cache_latents`.

        A local shard's index is named by its path, size and time of change, another's by its address alone.

        Raises:
            ValueError: A shard is missing, cut off, compressed or not a tar file.
        """
        if not config.cache_latents:
            listed = [_listed(shard, config) for shard in tqdm(shards, "Tar shards", delay=1)]
            return cls(shards, [Index(tensors, about) for tensors, about in listed])
        folder = Path(config.latent_cache_dir).expanduser()
        setting = folder / shard_key("tar index", TAR_ROWS, config.image_column)
        paths = [setting / f"{shard_key(*_stamp(shard))}.safetensors" for shard in shards]

        def missing() -> list[tuple[str, Path]]:
            return [pair for pair in zip(shards, paths, strict=True) if _about(pair[1]) is None]

        def make(todo: list[tuple[str, Path]]) -> None:
            check_writable(folder)
            for shard, path in tqdm(todo, "Tar shards", delay=1):
                tensors, about = _listed(shard, config)
                write_shard(path, tensors, "tar indexes", about)

        in_shares(missing, make)
        mark_used(paths)
        return cls(shards, [Index(path, _about(path)) for path in paths])

    @cached_property
    def counts(self) -> np.ndarray:
        """Samples of each shard (F,)."""
        return np.array([len(index) for index in self.indexes], np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Of names, sizes and times of all members, wherever the shards lie."""
        return shard_key(*(index.about["content"] for index in self.indexes))

    @cached_property
    def lacks(self) -> Lacks:
        """What is left out, and why."""
        return Lacks.together(json.loads(index.about["lacks"]) for index in self.indexes)

    def tell(self, found: Found) -> None:
        for reason, (number, names) in self.lacks.reasons.items():
            found.skip(reason, names, number)

    def rows(self, places: Sequence[tuple[int, int]], image_column: str, caption_column: str) -> list[dict[str, Any]]:
        """As `tar_rows`, of (shard, sample) each.

        Raises:
            ValueError: A shard has changed since it was listed, or its server answers no ranges.
        """
        ranges = [(self.shards[shard], *self.indexes[shard].range(sample)) for shard, sample in places]
        contents = read_ranges([(name, start, end) for name, start, end, _ in ranges])
        rows = []
        for (name, start, end, place), content in zip(ranges, contents, strict=True):
            samples = samples_of(content, image_column, caption_column) if len(content) == end - start else []
            if place >= len(samples):
                raise UserError(
                    f"The shard {name} is not what it was when its samples were listed, or its server does not answer "
                    f"requests for ranges: {end - start:,} bytes at {start:,} are {len(content):,} of something else; "
                    "give a new --latent_cache_dir, and a server that does."
                )
            rows.append(samples[place])
        return rows


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Bytes from `start` to `end` of each file, which is a path or an address; from one place, many at one time."""
    system, _ = url_to_fs(ranges[0][0])
    names = [system._strip_protocol(name) for name, _, _ in ranges]
    if system.async_impl:
        _, starts, ends = zip(*ranges, strict=True)
        return list(system.cat_ranges(names, list(starts), list(ends), on_error="raise"))
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda name, asked: _range(system, name, *asked[1:]), names, ranges))


def _range(system: AbstractFileSystem, name: str, start: int, end: int) -> bytes:
    with system.open(name, "rb", cache_type="none") as file:
        file.seek(start)
        return file.read(end - start)


def _stamp(shard: str) -> tuple[str, ...]:
    if not os.path.isfile(shard):
        return (shard,)
    stat = os.stat(shard)
    return os.path.abspath(shard), str(stat.st_size), str(stat.st_mtime_ns)


def _about(path: Path) -> dict[str, str] | None:
    """What an index says of itself; None where there is none that is whole."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata()
    except (OSError, SafetensorError):
        return None


def _listed(shard: str, config: DataConfig) -> tuple[Tensors, dict[str, str]]:
    digest, lacks, found = hashlib.sha256(), Lacks({}, [], 0), []
    with readable(source_flag(config)):
        for run in _runs(shard, config.image_column):
            digest.update(repr(run.members).encode())
            for place, (key, fields) in enumerate(run.samples(config.image_column)):
                if lacks.has_all(key, fields, config.image_column):
                    found.append((run.start, run.end - run.start, place))
    table = torch.tensor(found, dtype=torch.int64).reshape(-1, 3)
    tensors = {"offset": table[:, 0].contiguous(), "size": table[:, 1].contiguous(), "place": table[:, 2].short()}
    about = {"rows": str(len(found)), "content": digest.hexdigest(), "lacks": json.dumps([*vars(lacks).values()])}
    return tensors, about


def _runs(shard: str, image_column: str) -> Iterator[Run]:
    try:
        system, name = url_to_fs(shard)
        with system.open(name, "rb") as file:
            if file.read(6).startswith(COMPRESSED):
                raise tarfile.ReadError("it is compressed, and its samples have no places: unpack it")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                yield from runs(archive, image_column, None)
    except (FileNotFoundError, tarfile.ReadError) as error:
        raise UserError(f"The shard {shard} cannot be read as a tar file ({error}); get it anew.") from error
