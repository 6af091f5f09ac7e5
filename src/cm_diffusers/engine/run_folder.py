"""The folder of a run: which run it belongs to, and where to continue."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from cm_diffusers.engine import checkpoints


IDENTITY = "run.json"
# Settings a resumed run may change: they say how long, where and how fast, not what.
MAY_CHANGE = set(
    "output_dir overwrite_output_dir max_train_steps gradient_checkpointing compile allow_tf32 checkpointing_steps "
    "checkpoints_total_limit resume_from_checkpoint report_to tracker_project_name logging_steps "
    "cache_dir latent_cache_dir cache_latents dataloader_num_workers encode_batch_size save_fp16".split()
)


def run_identity(objective: str, num_processes: int, *settings: object, **optims: object) -> dict:
    """Which run this is: what a resume must share, flat, as JSON types.

    Args:
        settings: The dataclasses of the run.
        optims: Those of its players, by name.
    """
    shared = {"objective": objective, "num_processes": num_processes}
    for config in settings:
        shared |= {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    for player, optim in optims.items():
        shared |= {f"{player}/{name}": value for name, value in asdict(optim).items()}
    return json.loads(json.dumps(shared))


def open_run_folder(output_dir: Path, identity: dict, overwrite: bool, resume: str | None) -> Path | None:
    """Make the folder ready and return the checkpoint to continue from, or None for a fresh start.

    Args:
        identity: JSON that says which run this is; what a resume must not change.

    Raises:
        ValueError: The folder holds another run, or the checkpoint asked for is missing or of another run.
    """
    if resume:
        path = checkpoints.find_checkpoint(output_dir, resume)
        _refuse_other_run(path, checkpoints.read_state(path)["identity"], identity)
    elif overwrite:
        shutil.rmtree(output_dir, ignore_errors=True)
    elif output_dir.is_file() or (output_dir.exists() and any(output_dir.iterdir())):
        raise ValueError(
            f"--output_dir {output_dir} already holds the files of another run; choose another folder, continue it with "
            "--resume_from_checkpoint latest, or give --overwrite_output_dir to delete them."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / IDENTITY).write_text(json.dumps(identity, indent=1))
    return path if resume else None


def _refuse_other_run(path: Path, saved: dict, identity: dict) -> None:
    changed = [name for name in identity.keys() | saved.keys() if identity.get(name) != saved.get(name)]
    if changed:
        differences = ", ".join(
            f"{name} was {saved.get(name)!r}, now {identity.get(name)!r}" for name in sorted(changed)
        )
        raise ValueError(
            f"{path} belongs to a run with other settings ({differences}); use the same ones, or start afresh."
        )
