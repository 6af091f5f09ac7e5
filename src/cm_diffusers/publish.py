"""Writing results: whole or not at all, as safetensors."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import ModelMixin


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well, and vanishes when not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside, replaced = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "replaced"))
    for leftover in (aside, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(aside, folder)
    finally:
        for leftover in (aside, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def save_model(model: ModelMixin, folder: Path) -> None:
    with written_aside(folder) as aside:
        model.save_pretrained(aside)
