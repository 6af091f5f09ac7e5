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
from tqdm.auto import tqdm

from cm_diffusers.diffusion.process import as_like
from cm_diffusers.engine import checkpoints
from cm_diffusers.engine.snapshots import is_due
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.errors import optional
from cm_diffusers.types import Loss


def is_saved(step: int, config: TrainConfig) -> bool:
    """Whether a checkpoint of a step is due."""
    return step == config.max_train_steps or step % config.checkpointing_steps == 0 or step in config.branch_steps


def is_looked_at(step: int, config: TrainConfig) -> bool:
    """Whether a step is looked at, which all are of which anything is kept."""
    keeps = is_saved(step, config) or is_due(step, config.snapshot_steps, config.snapshot_window)
    return keeps or step % config.logging_steps == 0


class Turn(NamedTuple):
    """A player's turn of a step, whose mean loss and gradient norm are on the device still."""

    step: int
    player: str
    loss: Tensor
    norm: Tensor


class Looks:
    """Keeps every turn until it is looked at, stops the run where one was not finite, and shows what there is to see.

    Attributes:
        turns, seen, seconds: Since the last look: of the players, images of all ranks, and without what was written and shown.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig) -> None:
        self.accelerator, self.config = accelerator, config
        self.turns: list[Turn] = []
        self.seen, self.seconds = 0, 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        """What is done inside the block counts for the speed."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

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

    def show(self, step: int, values: dict[str, float], bar: tqdm) -> None:
        """The bar, and at every `logging_steps` the tracker, have these values, if there are any, and the speed since the last."""
        if not values:
            return
        speed, self.seen, self.seconds = self.seen / self.seconds, 0, 0.0
        others = [f"{name[:-5]} {value:.4g}, " for name, value in values.items() if name.endswith("/loss")]
        bar.set_postfix_str(f"loss {values['loss']:.4g}, {''.join(others)}{speed:.1f} images/s", False)
        if step % self.config.logging_steps == 0:
            with optional(f"The tracker at step {step}"):
                self.accelerator.log(values | {"images_per_second": speed}, step=step)

    def _fetch(self, shown: list[Tensor]) -> list[float]:
        turns, self.turns = self.turns, []
        asked = shown + [value for turn in turns for value in (turn.loss, turn.norm)]
        found = stacked(asked, turns[0].loss if turns else shown[-1]).tolist()
        pairs = zip(found[len(shown) :: 2], found[len(shown) + 1 :: 2], strict=True)
        if bad := [(turn, pair) for turn, pair in zip(turns, pairs, strict=True) if not self._is_sound(*pair)]:
            (first, (loss, norm)), steps = bad[0], len({turn.step for turn, _ in bad})
            kept = checkpoints.list_checkpoints(Path(self.config.output_dir))
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
