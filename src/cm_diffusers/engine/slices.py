"""Named tensors in safetensors files: whole in one, or in several of which each holds slices, as processes wrote them.

Where slices begin stands in a file's header as `torch.distributed.checkpoint` writes it, whose `HuggingFaceStorageReader` reads
them, too. A sharded tensor can be read whole, by another number of processes, or by one, and the other way round.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from cm_diffusers.engine.parts import local
from cm_diffusers.engine.ranks import Ranks


NAME = re.compile(r"(?P<stem>.+?)(?:-\d{5}-of-\d{5})?\.safetensors")
INFO, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"


class DamagedCheckpointError(ValueError):
    """A checkpoint does not hold what was written into it."""


def file_name(stem: str, ranks: Ranks) -> str:
    return f"{stem}.safetensors" if ranks.size == 1 else f"{stem}-{ranks.rank + 1:05d}-of-{ranks.size:05d}.safetensors"


def to_write(tensors: dict[str, Tensor], rank: int) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """What this process writes of named tensors, on the CPU, and the header's entry; None where nothing is sharded."""
    mine = {name: value for name, value in tensors.items() if _writes(value, rank)}
    values = {name: local(value.detach()).cpu().contiguous().clone() for name, value in mine.items()}
    if not any(isinstance(value, DTensor) for value in tensors.values()):
        return values, None
    offsets = {name: {OFFSETS: list(offset_of(value))} for name, value in mine.items()}
    return values, {INFO: json.dumps(offsets), "DCP_VERSION": "1.0"}


def offset_of(value: Tensor) -> tuple[int, ...]:
    """Where in the whole tensor this process's part of it begins."""
    if not isinstance(value, DTensor):
        return (0,) * value.dim()
    return tuple(compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)[1])


def _writes(value: Tensor, rank: int) -> bool:
    """Copies are written once, by the first process that has them; empty parts not at all."""
    if not isinstance(value, DTensor):
        return rank == 0
    places = zip(value.placements, value.device_mesh.get_coordinate(), strict=True)
    first = all(coordinate == 0 for placement, coordinate in places if isinstance(placement, Replicate))
    return first and (value.to_local().numel() > 0 or rank == 0)


class Slice(NamedTuple):
    """Of a tensor, in an open file."""

    file: Any
    start: tuple[int, ...]
    shape: tuple[int, ...]


class Stored(Mapping[str, Tensor]):
    """Tensors by name, read when asked for, as a whole or the part that a process holds.

    Args:
        paths: The files of one stem.

    Raises:
        DamagedCheckpointError: A file cannot be read, or a slice is missing.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths, self.slices = sorted(paths), {}
        for path in self.paths:
            try:
                file = safe_open(path, "pt")
                starts = json.loads((file.metadata() or {}).get(INFO, "{}"))
                for name in file.keys():  # no dict
                    shape = tuple(file.get_slice(name).get_shape())
                    start = tuple(starts[name][OFFSETS]) if name in starts else (0,) * len(shape)
                    self.slices.setdefault(name, []).append(Slice(file, start, shape))
            except (OSError, SafetensorError, ValueError, LookupError) as error:
                raise DamagedCheckpointError(f"{path} is damaged: {error}.") from error
        self.shapes = {name: _around(parts) for name, parts in self.slices.items()}
        for name, parts in self.slices.items():
            if sum(math.prod(part.shape) for part in parts) != math.prod(self.shapes[name]):
                raise DamagedCheckpointError(f"{self.paths[0]} is damaged: of {name} it has not each slice once.")

    def __iter__(self) -> Iterator[str]:
        return iter(self.slices)

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, name: str) -> Tensor:
        value = self.slices[name][0].file.get_tensor(name)
        return self.fill(name, value.new_empty(self.shapes[name])) if len(self.slices[name]) > 1 else value

    def like(self, name: str, parameter: Tensor) -> Tensor:
        """As `[name]`; of what has the shape of a sharded parameter, this process's part."""
        if not isinstance(parameter, DTensor) or self.shapes[name] != tuple(parameter.shape):
            return self[name]
        return self.fill(name, torch.zeros_like(parameter))

    def fill_all(self, tensors: dict[str, Tensor]) -> None:
        """As `fill`, of each; names that are not stored are a KeyError."""
        with torch.no_grad():
            for name, value in tensors.items():
                self.fill(name, value)

    def fill(self, name: str, value: Tensor) -> Tensor:
        """Read what a process holds of a tensor into it.

        Raises:
            DamagedCheckpointError: It has another shape.
        """
        if self.shapes[name] != tuple(value.shape):
            raise DamagedCheckpointError(
                f"{self.paths[0]} is damaged: {name} has the shape {self.shapes[name]}, not {tuple(value.shape)}."
            )
        mine, begin = local(value.detach()), offset_of(value)
        for file, start, shape in self.slices[name]:
            if not shape:
                mine.copy_(file.get_tensor(name))
                continue
            first = [max(a, b) for a, b in zip(begin, start, strict=True)]
            last = [min(a + n, b + m) for a, n, b, m in zip(begin, mine.shape, start, shape, strict=True)]
            if all(a < b for a, b in zip(first, last, strict=True)):
                there = tuple(slice(a - s, b - s) for a, b, s in zip(first, last, start, strict=True))
                here = tuple(slice(a - s, b - s) for a, b, s in zip(first, last, begin, strict=True))
                mine[here].copy_(file.get_slice(name)[there])
        return value


def _around(parts: list[Slice]) -> tuple[int, ...]:
    """Shape of the whole tensor."""
    ends = [[a + n for a, n in zip(part.start, part.shape, strict=True)] for part in parts]
    return tuple(max(places) for places in zip(*ends, strict=True))


def stems(names: Iterable[str]) -> dict[str, list[str]]:
    """File names by stem."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if match := NAME.fullmatch(name):
            found.setdefault(match["stem"], []).append(name)
    return found


def ranks_of(tensors: dict[str, dict[str, Tensor]]) -> Ranks:
    """The processes that hold them: one, unless something is sharded."""
    sharded = any(isinstance(value, DTensor) for named in tensors.values() for value in named.values())
    return Ranks(dist.get_rank(), dist.get_world_size()) if sharded else Ranks()
