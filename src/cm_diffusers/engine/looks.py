"""Looks at a training. Each waits until the device has done all it was asked for, so there is one every few steps."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from cm_diffusers.diffusion.process import as_like
from cm_diffusers.engine import checkpoints
from cm_diffusers.types import Loss


class Turn(NamedTuple):
    """A player's turn of a step, whose mean loss and gradient norm are on the device still."""

    step: int
    player: str
    loss: Tensor
    norm: Tensor


class Speed:
    """Images per second between looks, without the time of what is written and shown.

    Attributes:
        images: Since the last look, of all ranks.
    """

    def __init__(self) -> None:
        self.images, self.seconds = 0, 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    def taken(self) -> float:
        """The speed; what comes counts anew."""
        speed = self.images / self.seconds
        self.images, self.seconds = 0, 0.0
        return speed


class Looks:
    """Keeps every turn until it is looked at, and stops the run where one was not finite."""

    def __init__(self, accelerator: Accelerator, output_dir: Path) -> None:
        self.accelerator, self.output_dir = accelerator, output_dir
        self.turns: list[Turn] = []

    def values(self, loss: Loss) -> dict[str, float]:
        """The numbers of a step by name, "loss" last, in one transfer with the turns since the last look.

        Raises:
            FloatingPointError: As `check`.
        """
        shown = loss.logs | {"loss": loss.value}
        return dict(zip(shown, self._fetch(list(shown.values())), strict=True))

    def check(self) -> None:
        """
        Raises:
            FloatingPointError: A turn since the last look has changed nothing, for its loss or gradient was not finite.
        """
        if self.turns:
            self._fetch([])

    def _fetch(self, shown: list[Tensor]) -> list[float]:
        turns, self.turns = self.turns, []
        asked = shown + [value for turn in turns for value in (turn.loss, turn.norm)]
        found = stacked(asked, turns[0].loss if turns else shown[-1]).tolist()
        pairs = zip(found[len(shown) :: 2], found[len(shown) + 1 :: 2], strict=True)
        if bad := [(turn, pair) for turn, pair in zip(turns, pairs, strict=True) if not self._is_sound(*pair)]:
            (first, (loss, norm)), steps = bad[0], len({turn.step for turn, _ in bad})
            kept = checkpoints.list_checkpoints(self.output_dir)
            raise FloatingPointError(
                f"Training stopped at step {first.step}: the {first.player}'s loss is {loss}, its gradient norm {norm}; "
                f"{steps} step{'s were' if steps > 1 else ' was'} skipped until this was looked at. The last good checkpoint is "
                f"{kept[-1] if kept else 'none yet'}; try a lower --learning_rate or --mixed_precision no or bf16."
            )
        return found[: len(shown)]

    def _is_sound(self, loss: float, norm: float) -> bool:
        overflow_is_normal = self.accelerator.scaler is not None  # fp16: the scale was too large
        return math.isfinite(loss) and (overflow_is_normal or math.isfinite(norm))


def stacked(scalars: list[Tensor], like: Tensor) -> Tensor:
    """Scalars, some of which may be on the CPU, as one float32 tensor `(N,)` where `like` is, without waiting for it."""
    like = like.detach().float()
    return torch.stack([as_like(value.detach(), like) for value in scalars])
