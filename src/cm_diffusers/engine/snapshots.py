"""Weights that a run kept on its way, to be combined afterwards."""

from pathlib import Path
from typing import NamedTuple


FOLDER = "snapshots"  # of a run: step-<n>.safetensors


class Kept(NamedTuple):
    """The raw weights of a step."""

    step: int
    path: Path


def list_weights(run: Path) -> list[Kept]:
    """Those of a run, by step."""
    found = (run / FOLDER).glob("step-*.safetensors")
    numbered = [(path.stem.removeprefix("step-"), path) for path in found]
    return sorted(Kept(int(step), path) for step, path in numbered if step.isdigit())
