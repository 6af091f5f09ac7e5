"""Runs that a signal ends, each in a fork of this process: `interrupted_worker.py FOLDER` prints how each ended."""

import json
import os
import signal
import sys
from pathlib import Path

from toys import source, toy_trainer

from cm_diffusers.engine import checkpoints


def signalled(signum: int):
    """A callback: the signal arrives after step 3."""
    return lambda trainer, loss: os.kill(os.getpid(), signum) if trainer.step == 3 else None


def stopped(folder: Path, signum: int) -> None:
    toy_trainer(folder, callbacks=[signalled(signum)], max_train_steps=6).fit(source())


def killed_while_saving(folder: Path) -> None:
    """SIGKILL after the first file of the second checkpoint."""
    save, names = checkpoints.save_file, []

    def save_file(tensors, path) -> None:
        save(tensors, path)
        names.append(path.parent.name)
        if len(set(names)) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.save_file = save_file
    toy_trainer(folder, checkpointing_steps=2).fit(source())


def ending(run, *arguments) -> int:
    """Exit code of a fork that runs it; negative: the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            run(*arguments)
        except SystemExit as end:
            sys.stderr.write(f"{end.code}\n")
            sys.stderr.flush()
            os._exit(1 if isinstance(end.code, str) else end.code or 0)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    output = Path(sys.argv[1])
    codes = {s.name: ending(stopped, output / s.name, s) for s in (signal.SIGTERM, signal.SIGINT)}
    codes["SIGKILL"] = ending(killed_while_saving, output / "SIGKILL")
    sys.stdout.write(json.dumps(codes))
