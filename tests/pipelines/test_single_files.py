"""The files of `pipelines/` are what `make single-files` writes from their sources, and the writer leaves nothing out."""

import runpy
from pathlib import Path

import pytest


WRITER = Path(__file__).parents[2] / "pipeline_sources" / "write.py"
writer = runpy.run_path(str(WRITER))
SOURCES, TARGET, SingleFile = writer["SOURCES"], writer["TARGET"], writer["SingleFile"]
SHARED = '''"""Shared."""

import math

import torch
from diffusers import LCMScheduler, DDIMScheduler, logging
from torch import Tensor

from .deeper import unit


HALF: float = 0.5
OTHER = logging.get_logger(__name__)


# turns per step,
# and back
def turn(x: Tensor) -> Tensor:
    """Turns."""
    return math.pi * HALF * unit(x)  # as in the paper


class Unneeded(DDIMScheduler):
    pass
'''
MAIN = '''"""A pipeline."""

from dataclasses import dataclass

from torch import Tensor

from .shared.turns import HALF, turn


LIMIT = 2


@dataclass
class Thing:
    x: Tensor

    def turned(self) -> Tensor:
        return _twice(self.x) * HALF


def _twice(x: Tensor) -> Tensor:
    return turn(turn(x))
'''
WRITTEN = '''# Written by `make single-files` in cm_diffusers, from pipeline_sources/main.py: change that, not this.
"""A pipeline."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


HALF: float = 0.5


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x)


# turns per step,
# and back
def turn(x: Tensor) -> Tensor:
    """Turns."""
    return math.pi * HALF * unit(x)  # as in the paper


LIMIT = 2


@dataclass
class Thing:
    x: Tensor

    def turned(self) -> Tensor:
        return _twice(self.x) * HALF


def _twice(x: Tensor) -> Tensor:
    return turn(turn(x))
'''
DEEPER = '''"""Deeper."""

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x)
'''


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_single_file_is_what_its_source_gives(path: Path) -> None:
    assert (TARGET / path.name).read_text("utf-8") == str(SingleFile(path)), "run `make single-files`"


def test_files_that_say_so_have_a_source_and_the_others_have_none() -> None:
    written = {path.name for path in TARGET.glob("*.py") if path.read_text("utf-8").startswith("# Written by")}
    assert written == {path.name for path in SOURCES}
    assert len(written) == 5


def single_file(folder: Path, main: str, shared: str = SHARED) -> str:
    (folder / "shared").mkdir()
    for name, text in (("main", main), ("shared/turns", shared), ("shared/deeper", DEEPER)):
        (folder / f"{name}.py").write_text(text)
    return str(SingleFile(folder / "main.py"))


def test_what_is_used_is_written_out_and_nothing_else(tmp_path: Path) -> None:
    assert single_file(tmp_path, MAIN) == WRITTEN


def test_long_imports_are_wrapped_as_ruff_wraps_them(tmp_path: Path) -> None:
    names = ["ONE", "TWO_AND_MORE", *(f"Scheduler{i}OfAKind" for i in range(1, 6)), "a_function_of_it", "lower"]
    imports = f"from torch.things import {', '.join(reversed(names))}\n"
    text = single_file(tmp_path, f'"""A."""\n\n{imports}\n\nALL = ({", ".join(names)})\n')
    assert "from torch.things import (\n" + "".join(f"    {name},\n" for name in names) + ")\n\n\nALL" in text


@pytest.mark.parametrize(
    ("main", "message"),
    [
        (MAIN.replace("HALF", "QUARTER"), "turns.py defines no QUARTER; import what it defines, by its own name"),
        (MAIN.replace("HALF,", "HALF as OTHER_HALF,").replace("* HALF", "* OTHER_HALF"), "defines no OTHER_HALF"),
        (MAIN.replace("LIMIT = 2", "unit = 2"), "unit of deeper.py has the name of something else; rename one"),
        (MAIN.replace("LIMIT = 2", "math = 2"), "math of turns.py has the name of something else"),
        (
            MAIN.replace("import Tensor\n", "import Tensor\nfrom numpy import pi as math\n") + "math",
            "math of main.py has the name",
        ),
    ],
)
def test_refuses_what_would_not_run(tmp_path: Path, main: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        single_file(tmp_path, main)


def test_a_definition_comes_from_the_package(tmp_path: Path) -> None:
    main = '"""A."""\n\nfrom cm_diffusers.record import RECORD\n\n\nNAME = RECORD.upper()\n'
    text = single_file(tmp_path, main)
    assert text.endswith('\n\nRECORD = "cm_diffusers.json"\nNAME = RECORD.upper()\n')
