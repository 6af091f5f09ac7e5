"""Writing results: whole or not at all, as safetensors, with record, provenance and card beside the weights."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from diffusers import ModelMixin

from cm_diffusers.engine.own_files import is_result_file, keep_foreign, remove
from cm_diffusers.errors import optional, writable
from cm_diffusers.pipelines.portable import forget_origin, sort_headers
from cm_diffusers.publishing.model_card import model_card
from cm_diffusers.publishing.provenance import Provenance, is_path, write_provenance
from cm_diffusers.publishing.student_kinds import knows_names
from cm_diffusers.record import Record, write_record


WITHOUT = "{} could not be written ({}); the result is published without it."
SAMPLES = "samples.png"  # the last validation grid of the training


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well, and vanishes when not.

    Its files are as readable as the umask lets new ones be, whatever wrote them: safetensors lets only the owner read.
    Equal contents give equal bytes.
    What a user has put beside our files stays; of a link the folder that it leads to is replaced.
    """
    folder = Path(os.path.realpath(folder))
    aside, replaced = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "replaced"))
    try:
        with writable(str(folder)):
            for leftover in (aside, replaced):
                remove(leftover)
            aside.mkdir(parents=True)
            yield aside
            sort_headers(aside.rglob("*.safetensors"))
            _follow_umask(aside)
            keep_foreign(folder, aside, is_result_file)
            if folder.exists():
                os.replace(folder, replaced)
            os.replace(aside, folder)
    finally:
        for leftover in (aside, replaced):
            remove(leftover)


def _follow_umask(folder: Path) -> None:
    """Gives files the permissions that the folder, which was just made, has by the umask."""
    permissions = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(permissions)


def write_result(
    folder: Path,
    writers: Iterable[Callable[[Path], None]],
    record: Record | None = None,
    provenance: Provenance | None = None,
    card: str | None = None,
) -> None:
    """A folder with the result of a training, in place of an earlier one.

    Args:
        writers: Each puts a part of what the kind of result is made of into a folder.
        record: A student's. With `provenance`, its model card is written too, with the last sample grid of the run.
        card: Of what is no student; goes with `provenance`.
    """
    with written_aside(folder) as aside:
        for write in writers:
            write(aside)
        if record is not None:
            write_record(_seen_from(folder, record), aside)
        if provenance is not None and (record or card):
            write_provenance(provenance, aside)
            with optional("Its card", WITHOUT):
                (aside / "README.md").write_text(card or _student_card(record, provenance, aside), "utf-8")


def _seen_from(folder: Path, record: Record) -> Record:
    """The record with a base model that is a folder here named relative to the result, wherever scripts are started."""
    base = record.base_model
    if not (is_path(base) and Path(base).exists()):
        return record
    return replace(record, base_model=Path(os.path.relpath(Path(base).resolve(), folder.resolve())).as_posix())


def _student_card(record: Record, provenance: Provenance, folder: Path) -> str:
    """With the last grid in `samples/` beside the folder, that of the run that ends here; with that of the published step alone
    where the weights are not the last ones."""
    step = provenance.settings.get("published_step")
    grids = sorted((folder.parent / "samples").glob("step-*.png" if step is None else f"step-{step:06d}.png"))
    if grids:
        with optional("Its sample grid", WITHOUT):
            shutil.copyfile(grids[-1], folder / SAMPLES)
    grid = SAMPLES if (folder / SAMPLES).is_file() else None
    return model_card(record, provenance, grid=grid, named=knows_names(folder, provenance))


def model_writer(model: ModelMixin, fp16: bool) -> Callable[[Path], None]:
    """Writes what `from_pretrained` of the model's class reads.

    Args:
        fp16: Store half precision; diffusers loads float32 unless told otherwise.
    """

    def write(folder: Path) -> None:
        (model.half() if fp16 else model).save_pretrained(folder)
        forget_origin([folder / "config.json"])

    return write
