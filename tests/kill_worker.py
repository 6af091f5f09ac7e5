"""Kills runs at random moments: `kill_worker.py FOLDER NUMBER [back]` prints how many it killed, and what was not right.

Each run is a fork of this process, which trains nothing itself: threads do not survive a fork. It trains to the end after however many kills, forward or back to a random checkpoint each time; what it
ends with must be, to the last bit, what a run ends with that nobody kills.
"""

import json
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

from toys import assert_same, source, tensors, toy_networks, toy_trainer

from cm_diffusers.engine.checkpoints import list_checkpoints, read_state


SETTINGS = {"max_train_steps": 40, "checkpointing_steps": 2, "checkpoints_total_limit": 6, "ema_sigma_rels": [0.1]}
LONGEST = 0.7  # seconds: a run of 40 steps takes about as long


def train(folder: Path, resume: str | None = None) -> None:
    trainer = toy_trainer(folder, toy_networks(0, dropout=0.5), resume_from_checkpoint=resume, **SETTINGS)
    trainer.fit(source())
    trainer.end()


def killed(run, *arguments, after: float | None) -> bool:
    """Whether a fork that runs it was killed after so many seconds; False if it had ended before."""
    child = os.fork()
    if child == 0:
        try:
            run(*arguments)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"The run ended with exit code {code}.")
    return code != 0


def kill_often(folder: Path, number: int, back: bool) -> dict[str, object]:
    chance, kills, wrong = random.Random(int(back)), 0, []
    while kills < number:
        whole = [path.name for path in list_checkpoints(folder)]
        for name in whole:
            try:
                read_state(folder / name)
            except ValueError as error:
                wrong.append(str(error))
        resume = chance.choice(whole) if back and whole else "latest"
        if killed(train, folder, resume, after=chance.uniform(0, LONGEST)):
            kills += 1
    killed(train, folder, "latest", after=None)
    return {"kills": kills, "wrong": wrong, "set aside": len(list(folder.glob("later-*")))}


if __name__ == "__main__":
    logging.disable()
    output, back = Path(sys.argv[1]), "back" in sys.argv
    killed(train, output / "whole", after=None)
    found = kill_often(output / "killed", int(sys.argv[2]), back)
    for part in ("checkpoint-40", "averages/step-40"):
        assert_same(tensors(output / "killed" / part), tensors(output / "whole" / part))
    left = {path.name for path in (output / "killed").iterdir()} - {path.name for path in (output / "whole").iterdir()}
    found["left"] = sorted(name for name in left if not name.startswith("later-"))
    sys.stdout.write(json.dumps(found))
