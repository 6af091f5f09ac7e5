"""Raw weights of a run, kept every few steps: what averages and combinations are made of afterwards."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from cm_diffusers.engine.checkpoints import trainable_state, write_folder
from cm_diffusers.engine.parts import gathered
from cm_diffusers.errors import UserError


FOLDER, STEM = "snapshots", "student"  # of a run: snapshots/step-<n>/student.safetensors


class Kept(NamedTuple):
    """Weights of a run at a step, not averaged: what trains of them, and buffers; of a LoRA student its adapters alone."""

    step: int
    path: Path


def is_due(step: int, every: int, window: list[int]) -> bool:
    """
    Args:
        every: Steps between two; 0 keeps none.
        window: First and last step of it; empty for the whole run.
    """
    return every > 0 and step % every == 0 and (not window or window[0] <= step <= window[1])


def write_weights(run: Path, step: int, student: nn.Module, is_main: bool = True) -> None:
    """Whole, by the main process; called by all where the student is sharded."""
    weights = gathered(trainable_state(student), is_main)
    if is_main:
        write_folder(run / FOLDER / f"step-{step}", {STEM: weights})


def list_weights(run: Path) -> list[Kept]:
    """Of a run, by step."""
    found = run.glob(f"{FOLDER}/step-*/{STEM}.safetensors")
    return sorted(Kept(int(path.parent.name.removeprefix("step-")), path) for path in found)


def weights_within(run: Path, window: list[int] | None) -> list[Kept]:
    """Those of a window.

    Args:
        window: First and last step; None for all.

    Raises:
        ValueError: There are none.
    """
    kept = list_weights(run)
    if not kept:
        raise UserError(f"{run} has no folder {FOLDER} with weights to choose from: train with --snapshot_steps.")
    first, last = window or (kept[0].step, kept[-1].step)
    if not (inside := [one for one in kept if first <= one.step <= last]):
        raise UserError(
            f"{run} keeps no weights between steps {first} and {last}; it has those of {kept[0].step} to {kept[-1].step}."
        )
    return inside
