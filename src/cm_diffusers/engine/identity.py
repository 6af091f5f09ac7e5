"""Which run a checkpoint is of: its settings by name, its data and the models it began with by their content."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from cm_diffusers.engine.branching import is_schedule
from cm_diffusers.errors import UserError
from cm_diffusers.models.stored import header
from cm_diffusers.places import without_secrets
from cm_diffusers.record import base_model_of, read_record


# Settings a resumed run may change: they say how long, where and how fast, not what.
MAY_CHANGE = set(
    "output_dir overwrite_output_dir max_train_steps gradient_checkpointing compile channels_last allow_tf32 checkpointing_steps "
    "checkpoints_total_limit branch_steps snapshot_steps snapshot_window resume_from_checkpoint report_to "
    "tracker_project_name logging_steps "
    "cache_dir latent_cache_dir cache_latents dataloader_num_workers encode_batch_size save_fp16".split()
)
FINGERPRINTS, DATA = "fingerprints", "data"  # key of the identity; and in it that of the data, beside flags of models
NAMES_OF_DATA = set(
    "dataset_name dataset_config_name dataset_split train_data_dir train_shards_path_or_url moving_articles".split()
)
NAMES_OF_PLACES = re.compile(r"pretrained_\w+|spatial_lora|unet_config|(?:held_out_)?rewards|prompts(?:_file)?")
REVISIONS = {  # flag of a model -> that of its revision on the Hub
    "pretrained_teacher_model": "teacher_revision",
    "pretrained_student_model": "student_revision",
    "pretrained_motion_adapter": "motion_adapter_revision",
    "spatial_lora": "spatial_lora_revision",
}
CONFIG = re.compile(r"(?:.*_)?config\.json|model_index\.json")
GLOBAL_BATCH = ("num_processes", "train_batch_size", "gradient_accumulation_steps")  # whose product a step sees
PER_PROCESS = "samples_per_rollout"  # drawn ahead by each, so that their number must stay
VOLATILE = {"architectures", "dtype", "torch_dtype", "transformers_version"}  # of a config: what saving it may change
SAMPLED = 4096  # bytes of every tensor


def run_identity(objective: str, num_processes: int, *settings: object, **optims: object) -> dict:
    """Which run this is: what a resume must share, flat, as JSON types.

    Args:
        settings: The dataclasses of the run.
        optims: Those of its players, by name.
    """
    values = _flat(asdict, settings, optims)
    named = {name: value for name, value in values.items() if value and NAMES_OF_PLACES.fullmatch(name)}
    marks = {name: place_fingerprint(value, values.get(REVISIONS.get(name))) for name, value in named.items()}
    found = {name: mark for name, mark in marks.items() if mark}
    shared = {"objective": objective, "num_processes": num_processes} | values | {FINGERPRINTS: found}
    return {name: without_secrets(value) for name, value in json.loads(json.dumps(shared)).items()}


def run_defaults(*settings: object, **optims: object) -> dict:
    """What these flags are where they are not given: those that a checkpoint of an older release lacks."""
    return json.loads(json.dumps(_flat(_defaults, settings, optims)))


def _flat(values_of: Callable[[Any], dict], settings: Iterable[object], optims: dict[str, object]) -> dict:
    found = {}
    for config in settings:
        found |= {name: value for name, value in values_of(config).items() if name not in MAY_CHANGE}
    for player, optim in optims.items():
        found |= {f"{player}/{name}": value for name, value in values_of(optim).items()}
    return found


def _defaults(config: object) -> dict:
    found = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(config)}
    return {name: value for name, value in found.items() if value is not MISSING}


def place_fingerprint(value: str | list[str], revision: str | None = None) -> str:
    """sha256 of what lies at one or several places; "" if they are no place, or nothing is known of it.

    Args:
        value: A folder or file here, or a Hub id, which stands for its commit.
        revision: On the Hub.
    """
    if isinstance(value, list):  # of prompts, or of rewards, some of which are classifiers in folders
        return _sha256("\n".join(_files_fingerprint(item.removeprefix("classifier:")) or item for item in value))
    if found := _files_fingerprint(value):
        return found
    try:
        return Path(snapshot_download(value, revision=revision, local_files_only=True)).name
    except (LocalEntryNotFoundError, HFValidationError):
        return ""


def _files_fingerprint(name: str) -> str:
    """Of the settings of a model and of a sample of every tensor: reads 4 KiB of each, milliseconds for any model.

    Of a file that is no part of a model it is that of its content; "" if there is nothing.
    """
    place = Path(name).expanduser()
    if not os.path.exists(place):  # which takes texts that can be no path
        return ""
    if place.is_file() and place.suffix not in (".safetensors", ".json"):
        return hashlib.sha256(place.read_bytes()).hexdigest()
    paths = [place] if place.is_file() else sorted([*place.glob("*.*"), *place.glob("*/*.*")])
    parts = []
    for path in paths:
        name = path.relative_to(place).as_posix()
        if path.suffix == ".safetensors" and path.is_file():
            parts.append(f"{name} {_tensors_fingerprint(path)}")
        elif path.suffix == ".json" and (path == place or CONFIG.fullmatch(path.name)):
            parts.append(f"{name} {_settings(path)}")
    if place.is_dir() and not (place / "model_index.json").exists() and (record := read_record(place)):
        parts.append(place_fingerprint(base_model_of(record, place)))  # what a LoRA is put on
    return _sha256("\n".join(parts))


def _settings(path: Path) -> str:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError:  # the model did not need it
        return ""
    if isinstance(content, dict):
        content = {k: v for k, v in content.items() if k not in VOLATILE and (k == "_class_name" or k[:1] != "_")}
    return json.dumps(content, sort_keys=True)


def _tensors_fingerprint(path: Path) -> str:
    """Name, type, shape and the middle of each; nothing of what is no such file."""
    digest, entries = hashlib.sha256(), {}
    with suppress(UserError):
        entries, _ = header(path)
    with path.open("rb") as file:
        first = 8 + int.from_bytes(file.read(8), "little")
        for name, entry in sorted(entries.items()):
            start, end = (first + offset for offset in entry["data_offsets"])
            file.seek(max(start, (start + end - SAMPLED) // 2))
            digest.update(f"{name} {entry['dtype']} {entry['shape']}".encode())
            digest.update(file.read(min(SAMPLED, end - start)))
    return digest.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _batch(identity: dict) -> int:
    """Samples of a step, of all processes, where the run tells their number."""
    return math.prod(identity.get(name) or 1 for name in GLOBAL_BATCH)


def refuse_other_run(
    path: Path, saved: dict, identity: dict, defaults: dict, *, knows_data: bool, branches: bool = False
) -> None:
    """
    Args:
        path: The checkpoint. Of another number of processes it may be, if a step sees as many samples.
        saved: Its identity. What it lacks, of an older release, had the default; flags that are no more do not count.
        identity: Of the run that would go on from it.
        defaults: As `run_defaults`.
        branches: Whether the run is another one, which may schedule its learning rate otherwise; see `check_rates`.
        knows_data: Whether `identity` has the data's fingerprint, if there is one; before that, names are not compared.

    Raises:
        ValueError: Settings, models or data are others.
    """
    saved = {name: without_secrets(value) for name, value in saved.items()}  # of an earlier release
    was, now = saved.get(FINGERPRINTS, {}), identity[FINGERPRINTS]
    both = was.keys() & now.keys()
    by_content = both | {FINGERPRINTS} | (NAMES_OF_DATA if DATA in was and (DATA in both or not knows_data) else set())
    before = {name: saved.get(name, defaults.get(name, value)) for name, value in identity.items()}
    compared = {name for name in identity.keys() - by_content if not (branches and is_schedule(name))}
    if before["num_processes"] != identity["num_processes"] and PER_PROCESS not in identity:
        compared -= {*GLOBAL_BATCH} if _batch(before) == _batch(identity) else set()
    if changed := sorted(name for name in compared if before[name] != identity[name]):
        differences = ", ".join(f"{name} was {before[name]!r}, now {identity[name]!r}" for name in changed)
        advice = "use the same ones, or start afresh"
        if "num_processes" in changed and PER_PROCESS not in identity:
            advice += f"; with other processes keep {' x '.join(GLOBAL_BATCH)}, {_batch(before)}"
        raise UserError(f"{path} belongs to a run with other settings ({differences}); {advice}.")
    for name in sorted(name for name in both if was[name] != now[name]):
        what = (
            "was trained on other data: images or captions were changed, added, left out or put in another order since"
            if name == DATA
            else f"began with other content of --{name}, which has changed, or is another, in {identity[name]}"
        )
        raise UserError(f"{path} {what}; give what it was, or start afresh.")
