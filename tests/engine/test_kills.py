"""Kills cost nothing but time: of a run again and again (`pytest -m slow`), of one process of several, and while parts are written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import run_worker
from safetensors.torch import load_file
from toys import assert_same, stored


KILLS = 50


@pytest.mark.slow
@pytest.mark.parametrize("ways", [[], ["back"]], ids=["forward", "back"])
def test_random_kills_change_nothing(tmp_path, ways) -> None:
    worker = [sys.executable, str(Path(__file__).parents[1] / "kill_worker.py"), str(tmp_path), str(KILLS), *ways]
    done = subprocess.run(worker, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["kills"], found["wrong"], found["left"]) == (KILLS, [], [])
    assert (found["set aside"] > 0) is bool(ways)


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory) -> tuple[Path, dict]:
    """Where `parts_kill_worker.py` worked, and what it found."""
    folder = tmp_path_factory.mktemp("parts")
    return folder, json.loads(run_worker("parts_kill_worker.py", folder, 5, "training"))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_left_alone_ends_and_the_run_goes_on(in_parts, killed) -> None:
    """With two processes to the same bits as an undisturbed run; with one and with three from what was kept."""
    folder, found = in_parts
    code, seconds = found["training"][killed]
    assert code == 1
    assert seconds < 30
    kept, whole = stored(folder / f"killed-{killed}/checkpoint-3"), folder / "whole"
    assert_same(kept, stored(whole / "checkpoint-3"))
    assert_same(stored(folder / f"killed-{killed}-at-2/checkpoint-6"), stored(whole / "checkpoint-6"))
    for number in (2, 1, 3):
        name = f"killed-{killed}-at-{number}"
        assert (folder / name / "checkpoint-6").is_dir()
        for rank in range(number):
            assert_same(load_file(folder / f"{name}-{rank}.safetensors"), kept)


@pytest.mark.parametrize(("way", "processes"), [("script", 2), ("trainer", 2), ("copies", 4)])
def test_a_process_that_works_alone_is_waited_for(in_parts, way, processes) -> None:
    """Longer than torch's default: while it looks at the student, and while it shows something, also to copies of parts."""
    assert in_parts[1][way] == [0] * processes


def test_kills_while_parts_are_written_lose_no_checkpoint(in_parts) -> None:
    assert in_parts[1]["kills"] == 5


@pytest.mark.slow
def test_many_kills_while_parts_are_written_lose_no_checkpoint(tmp_path) -> None:
    found = json.loads(run_worker("parts_kill_worker.py", tmp_path, KILLS))
    assert found["kills"] == KILLS
    assert 0 < found["halves"] < KILLS, "some fell into the writing of a checkpoint"
