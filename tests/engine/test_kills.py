"""Random kills, forward and back to earlier checkpoints, cost nothing but time; `pytest -m slow`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


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
