"""The folder of a run: which run it belongs to, where to continue, and what becomes of an earlier run in it."""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cm_diffusers.engine import checkpoints
from cm_diffusers.engine.own_files import FOLDERS, is_run_file, move_own, remove
from cm_diffusers.places import without_secrets


logger = logging.getLogger(__name__)

IDENTITY, PARTIAL, LOGS = "run.json", ".run.json.partial", "tracker_project_name"
REPLACED = ".replaced-"  # and a number: an earlier run, until the one that replaces it has ended
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
    return {name: without_secrets(value) for name, value in json.loads(json.dumps(shared)).items()}


class RunFolder:
    """Nothing in it is touched before training starts; an earlier run is set aside then, and removed at the end.

    Args:
        config: The `TrainConfig`; with "latest" to resume from and no checkpoint a run starts afresh.
        identity: JSON that says which run this is; what a resume must not change.
        inputs: Dataclasses that name what the run reads.
        accelerator: Only the main process writes and moves.

    Attributes:
        checkpoint: To continue from; None for a fresh start.
        continues: Whether that is of the run in this very folder.

    Raises:
        ValueError: The folder holds another run or no run, or the checkpoint asked for is missing or of another run.
    """

    def __init__(self, config: Any, identity: dict, inputs: Iterable[object], accelerator: Accelerator) -> None:
        self.path, self.identity, self.logs = Path(config.output_dir), identity, config.tracker_project_name
        self.is_main, self.claims, path = accelerator.is_main_process, True, self.path
        resume, overwrite = config.resume_from_checkpoint, config.overwrite_output_dir
        if overwrite:
            refuse_inputs_inside(config.output_dir, inputs)
        if resume == "latest" and not checkpoints.list_checkpoints(path):
            if self.is_main:
                logger.info("--resume_from_checkpoint latest: %s has no checkpoint, so training starts afresh.", path)
            resume = None
        self.checkpoint = checkpoints.find_checkpoint(path, resume) if resume else None
        if self.checkpoint:
            _refuse_other_run(self.checkpoint, checkpoints.read_state(self.checkpoint)["identity"], identity)
        self.continues = self.checkpoint is not None and self.checkpoint.parent.resolve() == path.resolve()
        if not self.continues:
            _refuse_used(path, overwrite)
        accelerator.wait_for_everyone()  # all have looked before the main process changes anything

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """The folder is this run's inside the block; an earlier one comes back if it fails before its first checkpoint."""
        replaced = self._claim() if self.is_main and self.claims else None
        self.claims = False
        try:
            yield
        except BaseException:
            if replaced and not checkpoints.list_checkpoints(self.path):
                self._restore(replaced)
            raise

    def end(self) -> None:
        """Remove what this run has replaced: it has ended well."""
        for replaced in self.path.glob(f"{REPLACED}*") if self.is_main else ():
            if replaced.name.removeprefix(REPLACED).isdigit():
                remove(replaced)

    def _claim(self) -> Path | None:
        self.path.mkdir(parents=True, exist_ok=True)
        replaced = None if self.continues else self._set_aside()
        content = json.dumps(self.identity | {LOGS: self.logs}, indent=1)
        (self.path / PARTIAL).write_text(content)
        os.replace(self.path / PARTIAL, self.path / IDENTITY)
        return replaced

    def _set_aside(self) -> Path | None:
        """The files of an earlier run; its `run.json` is copied, so that the folder is never without one."""
        if not (self.path / IDENTITY).is_file():
            return None
        number = next(i for i in range(1, 10**6) if not (self.path / f"{REPLACED}{i}").exists())
        replaced = self.path / f"{REPLACED}{number}"
        replaced.mkdir()
        text = (self.path / IDENTITY).read_text()
        (replaced / IDENTITY).write_text(text)
        move_own(self.path, replaced, partial(is_run_file, logs=_logs_of(text)))
        logger.info("The files of an earlier run are kept in %s until this one has ended.", replaced)
        return replaced

    def _restore(self, replaced: Path) -> None:
        failed = self.path / f"{REPLACED}0"
        failed.mkdir(exist_ok=True)
        move_own(self.path, failed, partial(is_run_file, logs=self.logs))
        move_own(replaced, self.path, partial(is_run_file, logs=_logs_of((replaced / IDENTITY).read_text())))
        os.replace(replaced / IDENTITY, self.path / IDENTITY)
        remove(replaced)
        remove(failed)


def _logs_of(identity: str) -> str:
    """Name of the tracker's folder, from the text of a `run.json`."""
    try:
        return json.loads(identity).get(LOGS, "cm_diffusers")
    except ValueError:  # cut short by a kill of an earlier release
        return "cm_diffusers"


def _refuse_used(path: Path, overwrite: bool) -> None:
    """A folder with `run.json` and no more than traces of a run that failed is free."""
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"--output_dir {path} is a link to {os.readlink(path)}, which is not there: make that folder."
        )
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output_dir {path} is a file: give a folder.")
    names = sorted({entry.name for entry in path.iterdir()} - {PARTIAL}) if path.exists() else []
    if names and not (path / IDENTITY).is_file():
        raise ValueError(
            f"--output_dir {path} holds files, such as {names[0]}, but no {IDENTITY}, so it is not the folder of a run and "
            "nothing in it is deleted: give another folder."
        )
    kept = [
        name for name in names if FOLDERS.fullmatch(name.strip(".").removesuffix(".replaced")) and name != "samples"
    ]
    if kept and not overwrite:
        raise ValueError(
            f"--output_dir {path} already holds the files of another run, such as {kept[0]}; choose another folder, "
            "continue it with --resume_from_checkpoint latest, or give --overwrite_output_dir to replace them."
        )


def refuse_inputs_inside(output_dir: str, configs: Iterable[object]) -> None:
    """What `--overwrite_output_dir` acts on holds nothing that the run reads, nor the working directory.

    Args:
        configs: Dataclasses, whose texts may be paths.

    Raises:
        ValueError: It does.
    """
    folder = Path(os.path.realpath(output_dir))
    places = {"the working directory": os.getcwd()}
    for config in configs:
        for name, value in asdict(config).items():
            texts = value if isinstance(value, list) else [value]
            if name not in ("output_dir", "resume_from_checkpoint"):
                places |= {f"--{name} {text}": text for text in texts if isinstance(text, str) and _may_be_path(text)}
    for name, text in places.items():
        place = Path(os.path.realpath(os.path.expanduser(text)))
        if folder.is_dir() and folder in (place, *place.parents):
            raise ValueError(
                f"--overwrite_output_dir would replace files of {output_dir}, but {name} lies in it: give another "
                "--output_dir."
            )


def _may_be_path(text: str) -> bool:
    return "\0" not in text and "://" not in text and len(text) < 4096


def _refuse_other_run(path: Path, saved: dict, identity: dict) -> None:
    saved = {name: without_secrets(value) for name, value in saved.items()}  # of an earlier release
    changed = [name for name in identity.keys() | saved.keys() if identity.get(name) != saved.get(name)]
    if changed:
        differences = ", ".join(
            f"{name} was {saved.get(name)!r}, now {identity.get(name)!r}" for name in sorted(changed)
        )
        raise ValueError(
            f"{path} belongs to a run with other settings ({differences}); use the same ones, or start afresh."
        )
