"""Several processes that train together, as torchrun starts them, but forks of one that has imported everything."""

import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(number: int, act: Callable[[], None]) -> list[int]:
    """Run it in so many forks, whose ids it gives; this process must not have trained anything, for threads do not survive a fork."""
    port, children = free_port(), []
    for rank in range(number):
        child = os.fork()
        if child == 0:
            os._exit(_as_rank(rank, number, port, act))
        children.append(child)
    return children


def together(number: int, act: Callable[[], None]) -> None:
    """As `start`, to the end.

    Raises:
        RuntimeError: One fails; the others, which would wait for it, are ended.
    """
    children = start(number, act)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, 9)
            raise RuntimeError(f"A process of {number} ended with {os.waitstatus_to_exitcode(status)}.")


def ends(children: list[int], longest: float = 60) -> list[tuple[int, float]]:
    """Of each, in order, its exit code and when it ended, in seconds of `time.monotonic`.

    Raises:
        RuntimeError: One lasts longer than so many seconds; it is ended.
    """
    started, found = time.monotonic(), {}
    while len(found) < len(children):
        for child in [child for child in children if child not in found]:
            if time.monotonic() - started > longest:
                os.kill(child, 9)
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                found[child] = os.waitstatus_to_exitcode(status), time.monotonic()
        time.sleep(0.01)
    if time.monotonic() - started > longest:
        raise RuntimeError(f"A process waited for more than {longest} seconds.")
    return [found[child] for child in children]


def _as_rank(rank: int, number: int, port: str, act: Callable[[], None]) -> int:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    try:
        act()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


def run_worker(name: str, *words: str | Path) -> str:
    """Run a script beside this file, which forks, in a process that has trained nothing; returns what it prints."""
    command = [sys.executable, str(Path(__file__).with_name(name)), *map(str, words)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout
