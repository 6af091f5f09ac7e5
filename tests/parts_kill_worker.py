"""Kills processes that hold networks in parts: `parts_kill_worker.py FOLDER KILLS [training]` prints what it found, as JSON.

At random moments it kills one or both of two that write a checkpoint after the other; and before that one of two that train, in the
middle of a step, whose run then goes on with two, one and three; and lets one wait for the other.
"""

import json
import logging
import mmap
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # once, and not in each fork
from processes import ends, start, together
from safetensors.torch import save_file
from sharding_worker import HYBRID, SHARDED, launched, moved
from tasks.test_watching import watched
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from toys import ToyObjective, assert_same, source, toy_trainer

from cm_diffusers.engine.checkpoints import list_checkpoints, prune_checkpoints, read_checkpoint, write_checkpoint
from cm_diffusers.engine.launcher import refuse_lone_processes
from cm_diffusers.engine.own_files import clear_leftovers
from cm_diffusers.engine.sharding import Sharding


STEPS, DEADLY = 6, 3
LONGEST = 0.3  # seconds, in which a few checkpoints are written


def train(folder: Path, resume: str | None = None, dies: int | None = None) -> None:
    """A run to the end, or to a step of which one process sees the beginning alone; what it holds at first is left beside it."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    step = ToyObjective.__call__

    def deadly(objective: ToyObjective, nets, batch, progress):
        if progress.step == DEADLY and rank == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(objective, nets, batch, progress)

    ToyObjective.__call__ = deadly  # of this fork
    with launched(SHARDED if ranks > 1 else {}):
        found = moved(folder, rank, ranks, None if resume is None else Path(resume), STEPS)
    save_file(found, folder.with_name(f"{folder.name}-{rank}.safetensors"))


def kill_in_training(output: Path) -> list[tuple[int, float]]:
    """Exit code of the process that is left over, and how many seconds it lived on; for each one that is killed."""
    together(2, partial(train, output / "whole"))
    found = []
    for dies in (0, 1):
        folder = output / f"killed-{dies}"
        codes, times = zip(*ends(start(2, partial(train, folder, dies=dies))), strict=True)
        assert codes[dies] == -signal.SIGKILL
        found.append((codes[1 - dies], times[1 - dies] - times[dies]))
        for number in (2, 1, 3):
            copy = shutil.copytree(folder, output / f"{folder.name}-at-{number}")
            together(number, partial(train, copy, "latest"))
    return found


def wait(folder: Path, way: str) -> None:
    """The first process looks, or shows, for longer than others wait where nobody asks for more; here for a second."""
    distributed_c10d.default_pg_timeout = timedelta(seconds=1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    slow = lambda *_: time.sleep(1.5 * (rank == 0))  # noqa: E731
    with launched(HYBRID if way == "copies" else {}):
        if way == "script":
            refuse_lone_processes(shares=True)
            trainer, _, comparison = watched(folder, [9.0, 5.0], max_train_steps=2)
            comparison.look = lambda *_: slow() or {"fid": 5.0}
        else:
            trainer = toy_trainer(folder, max_train_steps=2, callbacks=[slow])
    trainer.fit(source(4, rank, ranks))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 257), nn.Linear(257, 63))  # rows that two do not share evenly


def named(weights: dict[str, Tensor], step: int) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint of this step holds, in two files of each process."""
    return {
        "student": {name: value * step for name, value in weights.items()},
        "target": {name: value / step for name, value in weights.items()},
    }


def write_often(folder: Path, counter: mmap.mmap) -> None:
    """Checkpoints until it is killed, or the other one is; the counter has the step of the last that is whole."""
    dist.init_process_group("gloo")
    sharded, step = network(), newest(folder)
    Sharding(init_device_mesh("cpu", (2,)), None, frozenset(), False).shard(sharded, torch.device("cpu"))
    while True:
        step += 1
        tensors = named(sharded.state_dict(), step)
        write_checkpoint(folder, step, tensors, {"step": step, "identity": {}, "players": {}})
        if dist.get_rank() == 0:
            counter[:8] = step.to_bytes(8)
            prune_checkpoints(folder, 3)


def newest(folder: Path) -> int:
    return max((int(path.name.removeprefix("checkpoint-")) for path in list_checkpoints(folder)), default=0)


def kill_while_writing(folder: Path, number: int) -> dict[str, float]:
    """
    Raises:
        AssertionError: A checkpoint is lost, or one that is there does not hold what belongs into it.
    """
    folder.mkdir()
    chance, counter, weights, halves, longest = random.Random(0), mmap.mmap(-1, 8), network().state_dict(), 0, 0.0
    written = lambda: int.from_bytes(counter[:8])  # noqa: E731
    for _ in range(number):
        before, children = written(), start(2, partial(write_often, folder, counter))
        wait_until(lambda before=before: written() > before)
        time.sleep(chance.uniform(0, LONGEST))
        victims, whole = chance.choice([children, children[:1], children[1:]]), written()
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        for child, (code, when) in zip(children, ends(children), strict=True):
            assert code == (-signal.SIGKILL if child in victims else 1)
            longest = max(longest, when - killed)
        assert newest(folder) >= whole
        for path in list_checkpoints(folder):
            files, state = read_checkpoint(path)
            assert path.name == f"checkpoint-{state['step']}"
            for stem, expected in named(weights, state["step"]).items():
                assert_same(dict(files[stem]), expected)
        halves += any(path.name[0] == "." for path in folder.iterdir())
        clear_leftovers(folder)
        assert {path.name[:11] for path in folder.iterdir()} == {"checkpoint-"}
    return {"kills": number, "halves": halves, "written": written(), "longest": longest}


def wait_until(holds: Callable[[], bool], longest: float = 60) -> None:
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < longest
        time.sleep(0.002)


if __name__ == "__main__":
    logging.disable()
    output = Path(sys.argv[1])
    found = {}
    if "training" in sys.argv:
        found["training"] = kill_in_training(output)
        for way, number in (("script", 2), ("trainer", 2), ("copies", 4)):
            found[way] = [code for code, _ in ends(start(number, partial(wait, output / way, way)))]
    found |= kill_while_writing(output / "written", int(sys.argv[2]))
    sys.stdout.write(json.dumps(found))
