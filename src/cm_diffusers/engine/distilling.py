"""Flags of the optimizer and of the loop with the defaults of a distillation, and how a task finds them among others.

The rate falls in the last third, and the average of the last weights is published: both win at equal cost (docs/results/defaults.md).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from transformers.hf_argparser import HfArg

from cm_diffusers.engine.optimizers import OptimConfig, Schedule
from cm_diffusers.engine.train_config import TrainConfig


def with_default(kind: type, name: str, default: object) -> Any:
    """A field of a dataclass of flags, with another default."""
    return field(default=default, metadata=kind.__dataclass_fields__[name].metadata)


@dataclass
class DistillOptimConfig(OptimConfig):
    lr_scheduler: Schedule = with_default(OptimConfig, "lr_scheduler", "wsd")
    lr_cooldown_steps: int | None = HfArg(
        default=None, help="Steps of the cooldown at the end, for wsd; a third of --max_train_steps if not given."
    )


@dataclass
class DistillTrainConfig(TrainConfig):
    export_ema_decay: float = with_default(TrainConfig, "export_ema_decay", 0.99)


def by_kind(configs: Iterable[object]) -> dict[type, Any]:
    """Each config by its dataclass, and by those that this one is made of."""
    return {kind: config for config in configs for kind in type(config).__mro__ if is_dataclass(kind)}
