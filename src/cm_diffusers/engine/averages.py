"""Moving averages of a student's weights: the one that is published, and power-function ones to choose from later.

A power-function average (2312.02696, Sec. 3.1) weighs the weights of step tau with tau^gamma: its window grows with
the run. From a few of them, kept at every checkpoint, any other is rebuilt after training (Sec. 3.2).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.sgd import sgd

from cm_diffusers.engine.checkpoints import write_folder
from cm_diffusers.engine.parts import gathered, local, shards
from cm_diffusers.engine.slices import Stored
from cm_diffusers.errors import UserError


MOST_ERROR = 0.2  # of a rebuilt profile, relative, in the 2-norm
SNAPSHOTS = "averages"  # folder of a run: step-<n>/<sigma_rel>.safetensors


def warmed_up(decay: float) -> Callable[[int], float]:
    """The rate min(decay, (1 + step) / (10 + step)), so that short runs are not dominated by their start."""
    return lambda step: min(decay, (1 + step) / (10 + step))


def power_rate(sigma_rel: float) -> Callable[[int], float]:
    """The rate (1 - 1 / step)^(gamma + 1) of a power-function average; 0 at the first step."""
    gamma = power_of(sigma_rel)
    return lambda step: (1 - 1 / step) ** (gamma + 1)


def power_of(sigma_rel: float) -> float:
    """gamma of the average whose profile has the standard deviation sigma_rel, as a share of the run.

    sigma_rel = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))), a cubic equation for gamma.

    Raises:
        ValueError: No gamma > 0 has it.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise UserError(f"The width of a power-function average is {sigma_rel}; give one between 0 and 0.288.")
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


class MovingAverage:
    """average <- rate average + (1 - rate) weights, of the trainable parameters, in float32.

    Args:
        rate: Number of the step, from 1 -> rate.
    """

    def __init__(self, model: nn.Module, rate: Callable[[int], float]) -> None:
        self.rate = rate
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor | None = None) -> None:
        mine, theirs = ([local(value) for value in values.values()] for values in (self.average, self.live))
        draw(mine, theirs, 1 - self.rate(step), skipped)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averaged weights inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, live in self.live.items():
            kept = live.detach().clone()
            live.copy_(self.average[name])
            self.average[name].copy_(kept)


class Averages:
    """All averages that a run keeps.

    Args:
        decay: Rate of the average to publish; 0 publishes the last weights.
        sigma_rels: Widths of the power-function averages.
    """

    def __init__(self, model: nn.Module, decay: float, sigma_rels: list[float]) -> None:
        self.powers = {sigma_rel: MovingAverage(model, power_rate(sigma_rel)) for sigma_rel in sigma_rels}
        self.kept = {f"average-{sigma_rel:g}": average for sigma_rel, average in self.powers.items()}
        self.kept |= {"export_ema": MovingAverage(model, warmed_up(decay))} if decay else {}

    def update(self, step: int, skipped: Tensor | None = None) -> None:
        """
        Args:
            step: Its number, from 1.
            skipped: 1 if it has changed nothing, nor is to change the averages; else 0.
        """
        for average in self.kept.values():
            average.update(step, skipped)

    def applied(self) -> AbstractContextManager:
        """The model holds what is published inside the block."""
        return self.kept["export_ema"].applied() if "export_ema" in self.kept else nullcontext()

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {name: average.average for name, average in self.kept.items()}

    def load(self, files: dict[str, Stored]) -> None:
        for name, average in self.kept.items():
            files[name].fill_all(average.average)

    def write_snapshots(self, run: Path, step: int, is_main: bool) -> None:
        """Keep the power-function averages of this step for `rebuild`; called by all processes where they are sharded."""
        tensors = {f"{width:g}": gathered(average.average, is_main) for width, average in self.powers.items()}
        if tensors and is_main:
            write_folder(run / SNAPSHOTS / f"step-{step}", tensors)


class Snapshot(NamedTuple):
    """A power-function average of a run."""

    step: int
    sigma_rel: float
    path: Path


def list_snapshots(run: Path) -> list[Snapshot]:
    found = [
        (int(path.parent.name[5:]), float(path.stem), path) for path in run.glob(f"{SNAPSHOTS}/step-*/*.safetensors")
    ]
    return [Snapshot(*one) for one in sorted(found)]


def profile_product(step_a: float, gamma_a: float, step_b: float, gamma_b: float) -> float:
    """The integral of p_a p_b, where p(tau) = (gamma + 1) tau^gamma / step^(gamma + 1) up to step (2312.02696, App. C)."""
    shorter, powers = min(step_a, step_b), gamma_a + gamma_b + 1
    scale = (gamma_a + 1) * (gamma_b + 1) / (powers * shorter)
    return scale * (shorter / step_a) ** (gamma_a + 1) * (shorter / step_b) ** (gamma_b + 1)


def rebuild_weights(kept: list[tuple[int, float]], step: int, sigma_rel: float) -> np.ndarray:
    """Factors `(N,)` of N kept averages, 1 in all, whose sum comes nearest to another one in least squares of profiles.

    Args:
        kept: Step and sigma_rel of each.
        step, sigma_rel: Of the wanted one.

    Raises:
        ValueError: The kept ones are too few to come near it.
    """
    profiles = [(at, power_of(width)) for at, width in kept]
    gram = np.array([[profile_product(*a, *b) for b in profiles] for a in profiles])
    right = np.array([profile_product(*a, step, power_of(sigma_rel)) for a in profiles])
    ones = np.ones((len(kept), 1))
    system = np.block([[gram, ones], [ones.T, np.zeros((1, 1))]])  # with a multiplier for the sum
    weights = np.linalg.lstsq(system, np.append(right, 1), rcond=None)[0][:-1]
    whole = profile_product(*[step, power_of(sigma_rel)] * 2)
    error = math.sqrt(max(0, weights @ gram @ weights - 2 * weights @ right + whole) / whole)
    if error > MOST_ERROR:
        raise UserError(
            f"The {len(kept)} averages kept until step {step} come only within {error:.0%} of the profile of width "
            f"{sigma_rel}: give a width between theirs, or keep more with a smaller --checkpointing_steps."
        )
    return weights


def rebuild(run: Path, sigma_rel: float, step: int | None = None) -> tuple[dict[str, Tensor], int]:
    """The power-function average of a run with any width, from the snapshots of its checkpoints; and its step.

    Args:
        run: Folder of a run with `--ema_sigma_rels`.
        sigma_rel: The width.
        step: Of which step; the last if None.

    Raises:
        ValueError: There are no snapshots, or none of that step.
    """
    snapshots = list_snapshots(run)
    steps = sorted({snapshot.step for snapshot in snapshots})
    if not steps:
        raise UserError(f"{run} has no folder {SNAPSHOTS} with averages to choose from: train with --ema_sigma_rels.")
    if step is not None and step not in steps:
        raise UserError(f"{run} has no averages of step {step}; of {', '.join(map(str, steps))} it has.")
    step = steps[-1] if step is None else step
    used = [snapshot for snapshot in snapshots if snapshot.step <= step]
    weights = rebuild_weights([(one.step, one.sigma_rel) for one in used], step, sigma_rel)
    total: dict[str, Tensor] = {}
    for snapshot, weight in zip(used, weights, strict=True):
        for name, value in load_file(snapshot.path).items():
            total[name] = total.get(name, 0) + float(weight) * value.double()
    return {name: value.float() for name, value in total.items()}, step


@torch.no_grad()
def draw(averages: list[Tensor], live: list[Tensor], weight: float, skipped: Tensor | None = None) -> None:
    """average <- average + weight (live - average), of all at once, where `skipped` is not 1.

    It is the step of SGD with the gradient average - live, whose fused form can be told on the device to change nothing.
    """
    constants = {"momentum": 0, "dampening": 0, "nesterov": False, "weight_decay": 1, "maximize": True}
    sgd(averages, live, [None] * len(live), fused=True, found_inf=skipped, lr=weight, **constants)


@torch.no_grad()
def ema_update(average: nn.Module, model: nn.Module, decay: float, skipped: Tensor | None = None) -> None:
    """average <- decay * average + (1 - decay) * model for parameters, where `skipped` is not 1; buffers are copied."""
    draw(shards(average), shards(model), 1 - decay, skipped)
    for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)
