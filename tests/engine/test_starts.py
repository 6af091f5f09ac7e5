"""Scripts in two processes that part their networks: the first alone reads these, and all start as one process does."""

import json
from pathlib import Path

import pytest
from processes import run_worker
from safetensors.torch import load_file
from start_worker import starts
from toys import assert_same


# Start -> bytes of heads beside networks that are read, which every process makes.
ADDED = {"ctm": {"critic": 12236}, "scd": {"student": 4 * (128 + 1)}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starts")
    run_worker("start_worker.py", folder)
    return folder


def test_the_first_process_alone_reads_networks(folder: Path) -> None:
    first, second = (json.loads((folder / f"held-{rank}.json").read_text()) for rank in (0, 1))
    assert first.keys() == second.keys() == starts(folder).keys()
    for name, held in second.items():
        assert first[name]["student"] > 10_000
        assert held == dict.fromkeys(first[name], 0) | ADDED.get(name, {}), name


@pytest.mark.parametrize("name", starts(Path()))
def test_parts_are_those_of_a_whole_start(folder: Path, name: str) -> None:
    whole, parts = (
        {key: value for key, value in load_file(folder / f"{start}.safetensors").items() if key.startswith(f"{name}/")}
        for start in ("alone", "parts")
    )
    assert_same(parts, whole)


def test_a_video_student_with_grids_comes_of_it(folder: Path) -> None:
    assert (folder / "run/samples/step-000001.png").is_file()
    assert (folder / "run/student/pytorch_lora_weights.safetensors").is_file()
