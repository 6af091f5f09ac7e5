"""Networks of a few numbers, with an objective, a data source and a trainer for them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor, nn

from cm_diffusers.engine.checkpoints import read_checkpoint
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.types import Batch, Loss, Networks, Progress


WIDTH = 4


def forget_accelerate() -> None:
    """Accelerate keeps precision and devices in singletons, one setting for a process; a test wants its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def toy_network(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, WIDTH))


@dataclass
class ToyConfig:
    pull: float = 0.5


class ToyObjective:
    """Regression towards the data and, where there is one, the target network."""

    def __init__(self, config: ToyConfig | None = None) -> None:
        self.config = config or ToyConfig()
        self.players = {"student": self}

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        goal = batch.cond["goal"]
        if nets.target is not None:
            with torch.no_grad():
                goal = goal + self.config.pull * nets.target(batch.x0)
        value = (nets.student(batch.x0) - goal).square().mean()
        return Loss(value, {"first": batch.x0[0, 0]})


def rows(start: int, stop: int) -> Batch:
    """Rows `start` to `stop` of an endless table."""
    table = torch.stack(
        [torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(start, stop)]
    )
    return Batch(table[:, 0], {"goal": table[:, 1]})


def source(size: int = 4, rank: int = 0, ranks: int = 1) -> Callable[[int], Iterator[Batch]]:
    """Batch k of all ranks together is rows k * size * ranks and following."""

    def batches(start: int) -> Iterator[Batch]:
        for k in count(start):
            first = (k * ranks + rank) * size
            yield rows(first, first + size)

    return batches


def toy_networks(seed: int = 0, dropout: float = 0.0) -> Networks:
    return Networks(toy_network(seed, dropout), target=toy_network(seed).requires_grad_(False))


def toy_trainer(
    folder: Path, nets: Networks | None = None, objective=None, optim=None, callbacks=(), **config
) -> Trainer:
    forget_accelerate()
    config = TrainConfig(**{"output_dir": str(folder), "max_train_steps": 4, "report_to": "none"} | config)
    optim = optim or OptimConfig(learning_rate=1e-2)
    return Trainer(config, nets or toy_networks(), objective or ToyObjective(), optim, callbacks=callbacks)


def weights(module: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in module.state_dict().values()]


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by file and name."""
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.stem}/{name}": value for file in files for name, value in load_file(file).items()}


def stored(checkpoint: Path) -> dict[str, Tensor]:
    """As `tensors`, whole also where processes wrote parts, by what the file would be called then."""
    files, _ = read_checkpoint(checkpoint)
    return {f"{stem}/{name}": value for stem, named in files.items() for name, value in named.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to the last bit."""
    assert actual.keys() == expected.keys()
    assert len(expected) > 0
    assert [name for name, value in expected.items() if not torch.equal(actual[name], value)] == []
