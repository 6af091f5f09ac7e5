"""How a student was made and wants to be sampled: `cm_diffusers.json`, which travels beside its weights."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError


RECORD = "cm_diffusers.json"


@dataclass(frozen=True)
class Record:
    """How a student was distilled and wants to be sampled.

    Attributes:
        method: Objective it was trained with, e.g. "lcm".
        base_model: Folder or Hub id of the teacher; a LoRA is put on it.
        guidance: "embedded": the pipeline's guidance_scale goes in as w = guidance_scale - 1, within [w_min, w_max].
            "distilled": guidance from w_min to w_max is in the weights, sample with guidance_scale 1; a little
            classifier-free guidance on top, and with it a negative prompt, is possible.
            "none": the student cannot be guided.
        w_min: Least guidance it was trained with, in LCM's convention w = guidance_scale - 1.
        w_max: Greatest.
        recommended_guidance_scale: In diffusers' convention.
        recommended_num_inference_steps: Steps its samples look best at.
        scheduler: Class (`_class_name`) and config of the scheduler to sample with.
    """

    method: str
    base_model: str
    guidance: Literal["embedded", "distilled", "none"]
    w_min: float
    w_max: float
    recommended_guidance_scale: float
    recommended_num_inference_steps: int
    scheduler: dict


def write_record(record: Record, folder: Path) -> None:
    (folder / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n", "utf-8")


def read_record(
    source: str | Path,
    token: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Record | None:
    """The record in a student's folder or Hub repository; None where there is none.

    Args:
        source: Folder or Hub id.
        token, revision, cache_dir, local_files_only: As for `from_pretrained`.

    Raises:
        ValueError: The file is there but is not a record.
    """
    path = Path(source) / RECORD
    if not Path(source).exists():
        try:
            path = Path(
                hf_hub_download(
                    str(source),
                    RECORD,
                    token=token,
                    revision=revision,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                )
            )
        except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, ValueError):
            return None
    return _parse(path) if path.is_file() else None


def _parse(path: Path) -> Record:
    try:
        content = json.loads(path.read_text("utf-8"))
        return Record(**{field.name: content[field.name] for field in fields(Record)})  # newer ones may hold more
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record of cm_diffusers ({error!r}); get the checkpoint anew.") from error
