"""How a student was made and wants to be sampled: `cm_diffusers.json`, which travels beside its weights."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Self, get_args

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from cm_diffusers.errors import UserError


RECORD = "cm_diffusers.json"
OF_FLOWS = "FlowConsistencyScheduler"  # of students of flow-matching teachers
Guidance = Literal["embedded", "distilled", "none"]


@dataclass(frozen=True)
class Record:
    """How a student was distilled and wants to be sampled.

    Attributes:
        method: Objective it was trained with, e.g. "lcm".
        base_model: Folder or Hub id of the teacher; a LoRA is put on it. "" for a network trained from data alone.
        guidance: "embedded": the pipeline's guidance_scale goes in as w = guidance_scale - 1, within [w_min, w_max]; of a
            network that its own teacher told so, in the teacher's units.
            "distilled": guidance from w_min to w_max is in the weights, sample with guidance_scale 1; a little
            classifier-free guidance on top, and with it a negative prompt, is possible.
            "none": the student cannot be guided.
        w_min: Least guidance it was trained with, in LCM's convention w = guidance_scale - 1.
        w_max: Greatest.
        recommended_guidance_scale: In diffusers' convention.
        recommended_num_inference_steps: Steps its samples look best at.
        scheduler: Class (`_class_name`) and config of the scheduler to sample with; of a student of a flow
            `FlowConsistencyScheduler` with the shift of its training, its gamma and `recommended_sigmas`.
        resolution: Side in pixels of the square images or frames it was trained on; older records do not tell.
        num_frames: Frames of the clips it was trained on; None for images.
        target_dim: Size of the embedding of where a step goes, of a student that is told it beside time and guidance (TCD);
            None for one that is not.
        one_step: Whether it makes samples of pure noise in one step, and can do nothing else.
    """

    method: str
    base_model: str
    guidance: Guidance
    w_min: float
    w_max: float
    recommended_guidance_scale: float
    recommended_num_inference_steps: int
    scheduler: dict
    resolution: int | None = None
    num_frames: int | None = None
    target_dim: int | None = None
    one_step: bool = False

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Self:
        """From what `asdict` or a file made of one, whatever else it holds: newer ones may hold more, older ones less.

        Raises:
            KeyError: A field that every record has is missing.
        """
        needed = {field.name: entry[field.name] for field in fields(cls) if field.default is MISSING}
        known = {field.name for field in fields(cls)}
        return cls(**needed | {name: value for name, value in entry.items() if name in known})


def is_of_flow(record: Record) -> bool:
    """Whether its teacher was a rectified flow."""
    return record.scheduler.get("_class_name") == OF_FLOWS


def write_record(record: Record, folder: Path) -> None:
    aside = folder / f"{RECORD}.part"
    aside.write_text(json.dumps(asdict(record), indent=2) + "\n", "utf-8")
    os.replace(aside, folder / RECORD)


def read_record(
    source: str | Path,
    token: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Record | None:
    """The record in a student's folder or Hub repository; None where there is none, or no such repository in reach.

    Args:
        source: Folder or Hub id; or a single `.safetensors` file, which has it in its metadata.
        token, revision, cache_dir, local_files_only: As for `from_pretrained`.

    Raises:
        ValueError: The file is there but is not a record, or the Hub refuses to say whether it is there.
    """
    if Path(source).is_file():
        return _parse(Path(source), _in_header(Path(source)))
    path = Path(source) / RECORD
    if not Path(source).exists():
        options = {"token": token, "revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        try:
            path = Path(hf_hub_download(str(source), RECORD, **options))
        except (HfHubHTTPError, EntryNotFoundError, HFValidationError) as error:
            if (status := _refusal(error)) is None:
                return None
            raise UserError(
                f"The Hub does not say whether {str(source)!r} has a {RECORD} (status {status}); try again later, log "
                "in if it is private or gated, or take what is here with local_files_only=True."
            ) from error
    return _parse(path, path.read_text("utf-8", "replace")) if path.is_file() else None


def base_model_of(record: Record, lora: str | Path) -> str:
    """Where the base model of a LoRA is: its Hub id, or a folder, which the record may name relative to elsewhere.

    A relative name is looked for from the LoRA's folder, as scripts write it, the working directory and each folder
    above the LoRA; at last, a folder of the same name beside the LoRA is taken for it.

    Raises:
        ValueError: It is the LoRA itself, or a folder without a pipeline, such as another LoRA.
    """
    name, home = Path(record.base_model), Path(lora).resolve()
    above = [*(parent / name for parent in home.parents), home.parent / name.name]
    found = record.base_model
    if home.exists():
        places = [Path(os.path.normpath(home / name)), name, *above]
        found = next((str(place) for place in places if _is_pipeline(place)), found)
    if found == str(lora) or (Path(found).is_dir() and not _is_pipeline(Path(found))):
        raise UserError(
            f"The record of {str(lora)!r} names {record.base_model!r} as the base model, which is no pipeline; name one "
            f"as base_model in its {RECORD}."
        )
    return found


def first_model_of(record: Record, student: str) -> str:
    """Where it all began: a student that was tuned has a student as its base model."""
    base = base_model_of(record, student)
    earlier = read_record(base)
    return base if earlier is None else first_model_of(earlier, base)


def _is_pipeline(place: Path) -> bool:
    return (place / "model_index.json").is_file() or (place.suffix == ".safetensors" and place.is_file())


def _in_header(path: Path) -> str | None:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(RECORD)
    except SafetensorError:  # whoever reads the weights says so
        return None


def _refusal(error: Exception) -> int | None:
    """The status with which the Hub refused to answer; None where it answered, or could not be asked."""
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    missing = isinstance(cause, EntryNotFoundError | RepositoryNotFoundError) and not isinstance(cause, GatedRepoError)
    return None if missing or not isinstance(cause, HfHubHTTPError) else cause.response.status_code


def _parse(path: Path, text: str | None) -> Record | None:
    if text is None:
        return None
    try:
        record = Record.of(json.loads(text))
        if fault := _fault(record):
            raise UserError(fault)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a record of cm_diffusers ({error!r}); get the checkpoint anew.") from error
    return record


def _fault(record: Record) -> str | None:
    scales = (record.w_min, record.w_max, record.recommended_guidance_scale)
    steps = record.recommended_num_inference_steps
    if record.guidance not in get_args(Guidance):
        return f"guidance must be one of {', '.join(get_args(Guidance))}, got {record.guidance!r}"
    if not all(isinstance(x, Real) and math.isfinite(x) for x in scales) or record.w_min > record.w_max:
        return f"w_min, w_max and recommended_guidance_scale must be finite and w_min at most w_max, got {scales}"
    if not isinstance(steps, Integral) or steps < 1:
        return f"recommended_num_inference_steps must be a whole number of at least 1, got {steps!r}"
    for name in ("resolution", "num_frames", "target_dim"):
        if (value := getattr(record, name)) is not None and not (isinstance(value, Integral) and value > 0):
            return f"{name} must be a whole number of at least 1 or null, got {value!r}"
    if not isinstance(record.one_step, bool):
        return f"one_step must be true or false, got {record.one_step!r}"
    if not isinstance(record.scheduler, dict):
        return f"scheduler must be a dict, got {record.scheduler!r}"
    shift = record.scheduler.get("shift")
    if is_of_flow(record) and not (isinstance(shift, Real) and 0 < shift < math.inf):
        return f"shift of a {OF_FLOWS} must be above 0 and finite, got {shift!r}"
    return None
