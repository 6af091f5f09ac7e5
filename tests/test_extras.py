"""Every optional package is in an extra, and is missed before anything is loaded, in a sentence that names the extra."""

import ast
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from scripts import script
from test_style import RECIPES, SOURCES, each, load, script_of, tree

from cm_diffusers import extras
from cm_diffusers.engine import cli
from cm_diffusers.engine.cli import parse_configs
from cm_diffusers.extras import Need, check_installed, needs_of


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
KNOWN = {need for need in vars(extras).values() if isinstance(need, Need)} | set(extras.OF_TRAINING)
KNOWN |= {need for values in extras.NEEDS.values() for need in values.values()}


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", line)[0].lower() for line in requirements}


@pytest.mark.parametrize("need", sorted(KNOWN), ids=lambda need: need.package)
def test_an_extra_brings_it(need: Need) -> None:
    assert need.package.lower() in names(PROJECT["optional-dependencies"][need.extra])


@each(RECIPES)
def test_what_a_recipe_needs_beyond_training_is_known(path: Path) -> None:
    configs = parse_configs(load(script_of(path)).CONFIGS, "", ["--recipe", str(path)])
    assert {need.extra for _, need in needs_of(configs)} <= PROJECT["optional-dependencies"].keys()
    eight_bit = "--optimizer adamw_8bit" in path.read_text()
    assert eight_bit == ("bnb" in {need.extra for _, need in needs_of(configs)})


@each(SOURCES)
def test_no_other_package_is_imported_late(path: Path) -> None:
    """What a function imports is optional."""
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]
    late = [
        node for function in functions for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    found = {alias.name for node in late if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in late if isinstance(node, ast.ImportFrom)}
    required = {name.replace("-", "_") for name in names(PROJECT["dependencies"])} | {"cm_diffusers"}
    required |= {need.module for need in KNOWN} | set(sys.stdlib_module_names)
    assert {name for name in found if name.split(".")[0] not in required} == set()


@dataclass
class Flags:
    optimizer: str = "adamw_8bit"
    rewards: tuple[str, ...] = ("jpeg_compressibility",)


def test_the_sentence(monkeypatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    check_installed([Flags("adamw")])
    with pytest.raises(
        ValueError, match="--optimizer adamw_8bit needs bitsandbytes, which is not installed: pip install "
    ) as e:
        check_installed([Flags()])
    assert str(e.value).endswith('pip install "cm_diffusers[bnb]".')
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"datasets, which is not installed: pip install .cm_diffusers\[train\]"
    ):
        extras.require_training()


def test_it_is_missed_before_anything_is_loaded(monkeypatch) -> None:
    """The teacher of the recipe is not even looked for."""
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "training" / "distill_lcm.py"), "--recipe", "lcm_lora_sd15"])
    with pytest.raises(SystemExit, match="error: --optimizer adamw_8bit needs bitsandbytes"):
        cli.run(script("distill_lcm").main)
