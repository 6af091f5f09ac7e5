"""The walks of docs/concepts/walks.md are what a trace sees, and go down the wings.

A file of one wing enters files of its own wing or of those before it. The one thing that calls up is the trainer: into
the objective and the data source, which the script handed to it.
"""

from functools import cache
from pathlib import Path

import pytest
from test_style import floor
from walks import BLOCK, PAGE, WALKS, Walk


HANDED_IN = {("engine/trainer.py", wing) for wing in ("objectives", "data", "tasks")}


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory):
    return cache(lambda name: WALKS[name](tmp_path_factory.mktemp(name)))


def wing(name: str) -> str:
    return Path(name).parts[0].removesuffix(".py")


def ups(walk: Walk) -> list[tuple[str, str]]:
    return [(origin, name) for origin, name in walk.calls if origin and floor(wing(name)) > floor(wing(origin))]


@pytest.mark.parametrize("name", WALKS)
def test_a_walk_goes_down_the_wings(walked, name):
    walk = walked(name)
    assert len(walk.steps) > 5
    assert [step for step in walk.steps if step[1] and floor(wing(step[0])) > floor(wing(step[1]))] == []
    assert {(origin, wing(entered)) for origin, entered in ups(walk)} == (
        HANDED_IN if name == "to_the_loss" else set()
    )


@pytest.mark.parametrize("name", WALKS)
def test_the_page_lists_the_walk(walked, name):
    """`PYTHONPATH=src python tests/walks.py` writes it anew."""
    (block,) = [match for match in BLOCK.finditer(PAGE.read_text("utf-8")) if match[2] == name]
    assert block[0] == f"{block[1]}{walked(name).table()}{block[3]}"
