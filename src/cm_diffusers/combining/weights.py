"""theta = sum_i alpha_i theta_i over the weights that a run kept, a few tensors in memory at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from cm_diffusers.engine.snapshots import Kept
from cm_diffusers.errors import UserError
from cm_diffusers.models.stored import header


PARTS = 16  # in which the files are gone through, each opened anew: mapped pages count as memory until it is closed
T = TypeVar("T")


class Snapshots:
    """The files with the weights of several steps, the newest last.

    Args:
        kept: At least one.
        dtype: In which sums are accumulated.

    Attributes:
        shapes: Of the tensors by their names.

    Raises:
        ValueError: A file is damaged, or has other tensors than the newest.
    """

    def __init__(self, kept: Sequence[Kept], dtype: torch.dtype = torch.float64) -> None:
        self.steps, self.paths, self.dtype = [one.step for one in kept], [one.path for one in kept], dtype
        shapes = [{name: tuple(entry["shape"]) for name, entry in header(path)[0].items()} for path in self.paths]
        self.shapes = shapes[-1]
        for path, found in zip(self.paths, shapes, strict=True):
            odd = sorted(name for name in found.keys() | self.shapes if found.get(name) != self.shapes.get(name))
            if odd:
                raise UserError(
                    f"{path} and {self.paths[-1]} are of different networks: {len(odd)} tensors differ, such as {odd[0]}."
                )

    def folded(
        self, alphas: Sequence[float], sizes: Mapping[str, int], fold: Callable[[T | None, safe_open, str, float], T]
    ) -> Iterator[tuple[str, T]]:
        """What a function makes of each unit, a tensor or a layer, going through the files from the oldest to the newest.

        Args:
            alphas: One per file; those with 0 are not opened.
            sizes: Of each unit, by name.
            fold: (result so far or None, open file, unit, alpha) -> result.
        """
        for part in _parts(sizes):
            results: dict[str, T] = {}
            for path, alpha in zip(self.paths, alphas, strict=True):
                if alpha:
                    with safe_open(path, "pt") as file:
                        for unit in part:
                            results[unit] = fold(results.get(unit), file, unit, float(alpha))
            yield from results.items()

    def combined(
        self, alphas: Sequence[float], names: Sequence[str], device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Tensor]]:
        """Each tensor of the combination, in its own dtype; one that is not of floating point is the newest's.

        A single 1 gives back its file's tensors to the bit.

        Args:
            device: Where it is computed.
        """

        def add(total: Tensor | None, file: safe_open, name: str, alpha: float) -> Tensor:
            return added(total, file.get_tensor(name).to(device, self.dtype), alpha)

        with safe_open(self.paths[-1], "pt") as newest:
            dtypes = {name: newest.get_slice(name).get_dtype() for name in names}
            counted = {name: newest.get_tensor(name).clone() for name in names if dtypes[name] not in FLOATS}
        yield from counted.items()
        sizes = {name: torch.Size(self.shapes[name]).numel() for name in names if name not in counted}
        for name, total in self.folded(alphas, sizes, add):
            yield name, total.to(FLOATS[dtypes[name]])


FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def added(total: Tensor | None, term: Tensor, alpha: float) -> Tensor:
    """total + alpha term; the first term is not added to 0, which would lose the sign of -0."""
    return alpha * term if total is None else total.add_(term, alpha=alpha)


def _parts(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The units in about `PARTS` parts of one size, in their order."""
    most, part, filled = sum(sizes.values()) / PARTS, [], 0
    for unit, size in sizes.items():
        if part and filled + size > most:
            yield part
            part, filled = [], 0
        part.append(unit)
        filled += size
    if part:
        yield part
