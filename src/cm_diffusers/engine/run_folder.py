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
from cm_diffusers.engine.averages import SNAPSHOTS
from cm_diffusers.engine.branching import COMMAND, command_line
from cm_diffusers.engine.identity import DATA, FINGERPRINTS, refuse_other_run
from cm_diffusers.engine.lock import FolderLock
from cm_diffusers.engine.own_files import (
    FOLDERS,
    LOCK,
    clear_leftovers,
    is_run_file,
    move_own,
    remove,
    set_later_aside,
)
from cm_diffusers.errors import UserError, writable


logger = logging.getLogger(__name__)

IDENTITY, PARTIAL, LOGS = "run.json", ".run.json.partial", "tracker_project_name"
NO_PROGRESS = ("best", "samples", "snapshots")  # what may lie there without a checkpoint to go on from
REPLACED = ".replaced-"  # and a number: an earlier run, until the one that replaces it has ended


class RunFolder:
    """Nothing in it is touched before training starts; an earlier run is set aside then, and removed at the end.

    A resume holds the folder's lock from here on, a fresh start from when training starts, until `end`.

    Args:
        config: The `TrainConfig`; with "latest" to resume from and no checkpoint a run starts afresh.
        identity: JSON that says which run this is; what a resume must not change.
        defaults: Of the settings in it.
        inputs: Dataclasses that name what the run reads.
        accelerator: Only the main process writes and moves.

    Attributes:
        checkpoint: To continue from; None for a fresh start.
        continues: Whether that is of the run in this very folder.

    Raises:
        ValueError: The folder holds another run or no run, is in use or may not be written to; or the checkpoint asked for
            is missing, damaged or of another run.
    """

    def __init__(
        self, config: Any, identity: dict, defaults: dict, inputs: Iterable[object], accelerator: Accelerator
    ) -> None:
        self.path, self.identity, self.logs = Path(config.output_dir), identity, config.tracker_project_name
        self.defaults, self.is_main, self.claims = defaults, accelerator.is_main_process, True
        self.overwrite, self.lock = config.overwrite_output_dir, FolderLock(self.path)
        if self.overwrite:
            refuse_inputs_inside(config.output_dir, inputs)
        self._enter(config.resume_from_checkpoint)
        accelerator.wait_for_everyone()
        try:
            self._look(config.resume_from_checkpoint)
        except BaseException:
            self.lock.release()
            raise
        accelerator.wait_for_everyone()  # all have looked before the main process changes anything

    def _enter(self, resume: str | None) -> None:
        """Take the lock for a resume, and clear what a kill left; a fresh start only sees whether the folder is in use."""
        here = resume == "latest" or (resume and self._is_here(checkpoints.find_checkpoint(self.path, resume)))
        if self.is_main and (here or self.lock.path.exists()) and (self.path / IDENTITY).is_file():
            with writable(f"--output_dir {self.path}"):
                self.lock.take()
                if here:
                    clear_leftovers(self.path)

    def _is_here(self, checkpoint: Path) -> bool:
        return checkpoint.parent.resolve() == self.path.resolve()

    def _look(self, resume: str | None) -> None:
        """What is in the folder, and where to continue."""
        path = self.path
        if resume == "latest" and not checkpoints.list_checkpoints(path):
            if self.is_main:
                logger.info("--resume_from_checkpoint latest: %s has no checkpoint, so training starts afresh.", path)
            resume = None
        asked = checkpoints.find_checkpoint(path, resume) if resume else None
        self.continues = asked is not None and self._is_here(asked)
        self.latest = resume == "latest"
        self.older = checkpoints.list_checkpoints(path)[:-1] if self.latest else []  # to fall back to
        self.checkpoint = self._checked(asked) if asked else None
        if not self.continues:
            _refuse_used(path, self.overwrite)
        _refuse_read_only(path)

    def _checked(self, checkpoint: Path) -> Path:
        """It, or one before it, that is whole as far as sizes tell, and of this run."""
        try:
            saved = checkpoints.read_state(checkpoint)["identity"]
        except checkpoints.DamagedCheckpointError as error:
            return self.fall_back(error)
        refuse_other_run(
            checkpoint, saved, self.identity, self.defaults, knows_data=False, branches=not self.continues
        )
        return checkpoint

    def fall_back(self, error: checkpoints.DamagedCheckpointError) -> Path:
        """To the checkpoint before, which "latest" may mean, too.

        Raises:
            ValueError: There is none, or a certain one was asked for.
        """
        if not self.older:
            advice = "no checkpoint before it is whole: start afresh" if self.latest else "give another, or latest"
            raise UserError(f"{str(error).rstrip('.')}; {advice}.") from error
        before = self.older.pop()
        if self.is_main:
            logger.warning("%s Training goes on from the checkpoint before, %s.", error, before)
        self.checkpoint = self._checked(before)
        return self.checkpoint

    def know_data(self, fingerprint: str | None) -> None:
        """Whether a resumed run has the data of the one that it continues.

        Args:
            fingerprint: Of the source's content; None if it has none.

        Raises:
            ValueError: They are others.
        """
        if fingerprint:
            self.identity[FINGERPRINTS][DATA] = fingerprint
        if self.checkpoint and self.claims:
            saved = checkpoints.read_state(self.checkpoint)["identity"]
            refuse_other_run(
                self.checkpoint, saved, self.identity, self.defaults, knows_data=True, branches=not self.continues
            )

    @contextmanager
    def claimed(self, step: int) -> Iterator[None]:
        """The folder is this run's inside the block; an earlier one comes back if it fails before its first checkpoint.

        Args:
            step: Where training starts; what the run in this folder had of later ones is set aside.
        """
        replaced = self._claim(step) if self.is_main and self.claims else None
        self.claims = False
        try:
            yield
        except BaseException:
            if replaced and not checkpoints.list_checkpoints(self.path):
                self._restore(replaced)
            self.lock.release()
            raise

    def end(self) -> None:
        """Remove what this run has replaced, for it has ended well, and let others in."""
        for replaced in self.path.glob(f"{REPLACED}*") if self.is_main else ():
            if replaced.name.removeprefix(REPLACED).isdigit():
                remove(replaced)
        self.lock.release()

    def _claim(self, step: int) -> Path | None:
        with writable(f"--output_dir {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.take()
            if not self.continues:
                _refuse_used(self.path, self.overwrite)  # another run may have ended here since
            clear_leftovers(self.path)
            content = json.dumps(self.identity | {LOGS: self.logs, COMMAND: command_line()}, indent=1)
            (self.path / PARTIAL).write_text(content)  # before anything is moved: the disk may be full
            replaced = self._set_later_aside(step) if self.continues else self._set_aside()
            os.replace(self.path / PARTIAL, self.path / IDENTITY)
        return replaced

    def _set_later_aside(self, step: int) -> None:
        if later := set_later_aside(self.path, step):
            logger.warning(
                "What the run had of steps after %d is kept in %s; delete that folder when it is not needed.",
                step,
                later,
            )

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
        raise UserError(f"--output_dir {path} is a link to {os.readlink(path)}, which is not there: make that folder.")
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path} is a file: give a folder.")
    names = sorted({entry.name for entry in path.iterdir()} - {PARTIAL, LOCK}) if path.exists() else []
    if names and not (path / IDENTITY).is_file():
        raise UserError(
            f"--output_dir {path} holds files, such as {names[0]}, but no {IDENTITY}, so it is not the folder of a run and "
            "nothing in it is deleted: give another folder."
        )
    kept = [name for name in names if _is_progress(path, name)]
    if kept and not overwrite:
        raise UserError(
            f"--output_dir {path} already holds the files of another run, such as {kept[0]}; choose another folder, "
            "continue it with --resume_from_checkpoint latest, or give --overwrite_output_dir to replace them."
        )


def _is_progress(path: Path, name: str) -> bool:
    """Whether a run could go on, or somebody choose, from what is there; averages of one step are those of a first checkpoint
    that a kill cut short."""
    if name == SNAPSHOTS:
        return len(list((path / name).glob("step-*"))) > 1
    return bool(FOLDERS.fullmatch(name.strip(".").removesuffix(".replaced"))) and name not in NO_PROGRESS


def _refuse_read_only(path: Path) -> None:
    place = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {path} cannot be written: {place} is read-only; name another place.")


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
            raise UserError(
                f"--overwrite_output_dir would replace files of {output_dir}, but {name} lies in it: give another "
                "--output_dir."
            )


def _may_be_path(text: str) -> bool:
    return "\0" not in text and "://" not in text and len(text) < 4096
