"""Help and refusals come from the sources alone, without torch, and are those of the imported script."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from scripts import FOLDER, script

from cm_diffusers.engine import early
from cm_diffusers.engine.cli import make_parser


SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
SRC = Path(early.__file__).parents[2]
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "datasets", "numpy"}
OPTIONAL = {"matplotlib", "torchmetrics", "tensorboard", "torchvision", "wandb", "av", "ot", "timm"}


def imported(*words: object, path: Path = SRC) -> tuple[subprocess.CompletedProcess, set[str]]:
    """A run of the interpreter, and the modules that it imported."""
    command = [sys.executable, "-X", "importtime", *map(str, words)]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(path)}, capture_output=True, text=True)
    lines = run.stderr.splitlines()
    return run, {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_sources_tell_what_the_imported_script_does(name) -> None:
    source = early.Source(FOLDER / f"{name}.py", "__main__")
    assert ast.get_docstring(source.tree, clean=False) == script(name).__doc__
    parsers = [make_parser(configs, "") for configs in (source.get("CONFIGS"), script(name).CONFIGS)]
    assert parsers[0].format_help() == parsers[1].format_help()
    early_actions, late = ([dict(vars(action), type=None) for action in p._actions] for p in parsers)
    assert [{k: v for k, v in a.items() if k != "container"} for a in early_actions] == [
        {k: v for k, v in a.items() if k != "container"} for a in late
    ]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_looks_at_its_flags_first(name) -> None:
    body = ast.parse((FOLDER / f"{name}.py").read_text()).body
    assert ast.unparse(body[1]) == "import cm_diffusers.engine.early"


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("train_vae", ["--help"], "--test_data_dir"),
        (
            "distill_lcm",
            ["--pretrained_teacher_model", "a", "--learning_rat", "1"],
            "error: --learning_rat 1: this script has no such flag; did you mean",
        ),
        (
            "evaluate",
            ["--pipelines", "a", "--feature_extractor", "b", "--num_images", "0"],
            "error: --num_images must be at least 2",
        ),
    ],
)
def test_an_answer_costs_no_heavy_import(name, words, told) -> None:
    run, modules = imported(FOLDER / f"{name}.py", *words)
    assert told in run.stdout + run.stderr
    assert run.returncode == (0 if words == ["--help"] else 1)
    assert "Traceback" not in run.stderr
    assert modules & HEAVY == set()


def test_an_installed_script_answers_as_soon(tmp_path) -> None:
    package = tmp_path / "cm_diffusers"
    package.mkdir()
    for path in (SRC / "cm_diffusers").iterdir():
        (package / path.name).symlink_to(path)
    (package / "training").symlink_to(FOLDER)
    run, modules = imported("-m", "cm_diffusers.training.share", "--help", path=tmp_path)
    assert run.stdout.startswith("usage: share.py")
    assert modules & HEAVY == set()


def test_no_module_needs_at_import_what_a_run_may_do_without() -> None:
    roots = {
        (path.name, name.partition(".")[0])
        for path in (SRC / "cm_diffusers").rglob("*.py")
        for node in ast.parse(path.read_text()).body
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in getattr(node, "names", []))]
    }
    assert {(file, root) for file, root in roots if root in OPTIONAL} == set()


@pytest.mark.parametrize("file", [FOLDER / "share.py", FOLDER / "recipes" / "lcm_sd15.args", Path("gone.py"), None])
@pytest.mark.parametrize("name", ["__main__", "__mp_main__"])  # a spawned worker imports the script by the second
def test_only_a_script_that_asks_is_answered(name, file) -> None:
    module = ModuleType(name)
    module.__file__ = file and str(file)
    assert early._asks(module) == (name == "__main__" and file == FOLDER / "share.py")


def test_a_program_that_imports_a_script_has_flags_of_its_own(tmp_path) -> None:
    (tmp_path / "program.py").write_text(
        "CONFIGS = ()\nimport cm_diffusers.engine.early as early\nprint(early.PACKAGE.name)"
    )
    run, _ = imported(tmp_path / "program.py", "--help")
    assert run.stdout == "cm_diffusers\n"


def test_names_are_found_however_a_module_binds_them(tmp_path) -> None:
    (tmp_path / "flags.py").write_text(
        "import math as m\nfrom os import path as where\nif True:\n    SIZE = 3\nfor DEPTH in range(4):\n    pass\n"
        "WIDTH: int = SIZE * DEPTH\nraise RuntimeError\n"
    )
    source = early.Source(tmp_path / "flags.py", "flags")
    assert (source.get("WIDTH"), source.get("m").pi > 3, source.get("where")) == (9, True, os.path)
