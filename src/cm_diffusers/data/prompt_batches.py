"""Prompts alone, and what reward training keeps of any data source: for rewards that are followed back into the network."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cm_diffusers.data.found import Found
from cm_diffusers.data.prompts import Prompt
from cm_diffusers.data.reward_history import RewardHistory
from cm_diffusers.data.sampler import Position, Stream, batch_rows, stream
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.errors import UserError
from cm_diffusers.policy.policy import Conditions
from cm_diffusers.types import Batch, Loss


def prompt_batches(
    prompts: list[Prompt],
    conditions: Callable[[Tensor], tuple[Conditions, Conditions]],
    batch_size: int,
    position: Position,
) -> Stream:
    """A data source of prompts in random order, each as often as the others.

    Args:
        conditions: Numbers of prompts `(B,)` -> the network's arguments with them, and without any.

    Raises:
        ValueError: The batches would be empty.
    """
    if batch_size < 1:
        raise UserError(f"--train_batch_size must be at least 1, but it is {batch_size}.")

    def make(k: int) -> tuple:
        rows = batch_rows(k, batch_size, len(prompts), position)
        texts, metadata = zip(*(prompts[row] for row in rows), strict=True)
        return None, *conditions(torch.from_numpy(rows)), list(texts), list(metadata)

    return stream(make, 0, found=Found("prompts", captions=len(prompts)))


@dataclass
class Remembered:
    """A data source, and the history of the rewards of its batches, which checkpoints keep.

    Args:
        batches: The source.
        passes: Of the network, for a sample.
    """

    batches: Stream
    passes: int
    history: RewardHistory = field(default_factory=RewardHistory)

    @property
    def found(self) -> Found:
        return self.batches.found

    def __call__(self, start: int) -> Iterator[Batch]:
        return self.batches(start)

    @property
    def fingerprint(self) -> str:
        return getattr(self.batches, "fingerprint", "")

    def remember(self, images: int) -> Callable[[Trainer, Loss], None]:
        """A callback, for steps of so many images."""

        def callback(trainer: Trainer, loss: Loss) -> None:
            found = {name: value.item() for name, value in loss.logs.items()}
            spread = found["reward"], found["reward_std"]
            self.history.add(trainer.step - 1, images * self.passes, spread, found.get("kl", 0.0))

        return callback

    def state(self) -> dict[str, Tensor]:
        return self.history.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.history.load_state(tensors)
