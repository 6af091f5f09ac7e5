"""What lies beside the weights of a pipeline that its user saves, as beside those that a training publishes."""

import shutil
from dataclasses import replace
from pathlib import Path

from cm_diffusers.pipelines.recorded import PROVENANCE, RecordedMixin
from cm_diffusers.places import public
from cm_diffusers.publishing.model_card import model_card
from cm_diffusers.publishing.provenance import Provenance, as_provenance, write_provenance
from cm_diffusers.publishing.student_kinds import PIPELINE_FILE, SAMPLED_BY


OURS = "\n- cm_diffusers\n"  # the tag in the front matter of our cards
EMPTY = "has been automatically generated"  # in those that diffusers makes for an upload


def describe(pipe: RecordedMixin, folder: Path, name: str) -> None:
    """Card and `training.json` where it is known how a student was trained, and the single file that samples it.

    A card that somebody wrote stays.

    Args:
        folder: With the weights and the record.
        name: Folder or Hub id that the card's examples load.
    """
    if pipe.record and pipe.stock_class() is None:
        _put_single_file(pipe, folder)
    provenance, card = _provenance(pipe, name), folder / "README.md"
    text = card.read_text("utf-8", errors="replace") if card.is_file() else ""
    if provenance is None:
        (folder / PROVENANCE).unlink(missing_ok=True)
        if OURS in text:  # of another student
            card.unlink()
        return
    write_provenance(provenance, folder)
    if not text or OURS in text or EMPTY in text:
        new = model_card(pipe.record, provenance, single_file=(folder / PIPELINE_FILE).is_file())
        card.write_text(new, "utf-8")


def _provenance(pipe: RecordedMixin, name: str) -> Provenance | None:
    try:
        known = as_provenance(pipe.training) if pipe.record and pipe.training else None
    except TypeError:  # not one of ours
        return None
    if known is None:
        return None
    parts = bool(known.settings.get("lora")) or pipe.record.method == "animatelcm"
    fused = parts or bool(getattr(pipe, "num_fused_loras", 0))
    return replace(known, name=public(name), fused=known.fused or fused)


def _put_single_file(pipe: RecordedMixin, folder: Path) -> None:
    """The pipeline for diffusers alone, if there is one for its parts and no other lies there."""
    needs_text = hasattr(pipe, "tokenizer")
    family = "stable-diffusion" if needs_text else None
    known = not needs_text or not (pipe.is_xl or hasattr(pipe, "motion_adapter"))
    file = _own_file(SAMPLED_BY[family]) if known else None
    if file and not (folder / PIPELINE_FILE).exists():
        shutil.copyfile(file, folder / PIPELINE_FILE)


def _own_file(name: str) -> Path | None:
    """A single file of this project, where they lie: in the installed package, or in the checkout."""
    package = Path(__file__).resolve().parents[1]
    places = (package / "single_files" / name, package.parents[1] / "pipelines" / name)
    return next((place for place in places if place.is_file()), None)
