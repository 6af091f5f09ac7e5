"""The records that travel between data, objective and trainer."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


@dataclass
class Batch:
    """One batch of training data.

    Attributes:
        x0: Clean data `(B, ...)`: scaled latents, or pixels in [-1, 1]; None for data-free methods.
        cond: Keyword arguments of the network, each `(B, ...)`.
        uncond: The same keys for the unconditional branch of classifier-free guidance.
        texts: The B prompts in `cond`, where the source tells them; for rewards.
        metadata: What else is known of each prompt, likewise.
    """

    x0: Tensor | None
    cond: dict[str, Tensor] = field(default_factory=dict)
    uncond: dict[str, Tensor] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    metadata: list[dict[str, Any]] | None = None

    def to(self, device: torch.device | str) -> "Batch":
        def move(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {k: v.to(device, non_blocking=True) for k, v in tensors.items()}

        x0 = None if self.x0 is None else self.x0.to(device, non_blocking=True)
        return Batch(x0, move(self.cond), move(self.uncond), self.texts, self.metadata)

    @property
    def size(self) -> int:
        """B."""
        return len(self.x0 if self.x0 is not None else next(iter(self.cond.values())))


@dataclass
class Networks:
    """The networks of a run. A player of the objective names the field that holds its network."""

    student: nn.Module
    target: nn.Module | None = None
    teacher: nn.Module | None = None
    critic: nn.Module | None = None

    def items(self) -> list[tuple[str, nn.Module]]:
        present = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return [(name, module) for name, module in present if module is not None]


@dataclass(frozen=True)
class Progress:
    """How far training is: `step` optimizer steps done of `max_steps`. Curricula are pure functions of it."""

    step: int
    max_steps: int

    @property
    def fraction(self) -> float:
        return self.step / self.max_steps


class Loss(NamedTuple):
    """A scalar to minimise and detached scalars to log."""

    value: Tensor
    logs: dict[str, Tensor]


class Objective(Protocol):
    """A method. `players` maps a field of `Networks` to that player's loss; None (never the first's) skips its turn.

    With a method `target_decay(progress)`, that is the rate of the EMA target instead of the config's. With
    `spans_training` true, its curriculum spans the training, whose length a resume must not change then. With
    `takes_derivatives` true, networks run outside of autocast, too. All ranks call each network equally often.
    """

    players: dict[str, Callable[[Networks, Batch, Progress], Loss | None]]
    config: object
