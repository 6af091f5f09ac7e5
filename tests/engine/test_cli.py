"""Recipes by path and by name, from a checkout and from an installed package."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from scripts import FOLDER, script
from transformers.hf_argparser import HfArg

from cm_diffusers.engine.cli import parse_configs, shipped


RECIPES = sorted((FOLDER / "recipes").glob("*.args"))


@dataclass
class Settings:
    seed: int = HfArg(default=0)


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """The folder of a running script with recipes, from another folder that is empty."""
    monkeypatch.setattr("sys.argv", [str(tmp_path / "package" / "training" / "train.py")])
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    shutil.copytree(FOLDER / "recipes", tmp_path / "package" / "training" / "recipes")
    return tmp_path / "package" / "training"


@pytest.mark.parametrize("name", ["lcm_sd15", "lcm_sd15.args"])
def test_a_recipe_is_found_by_its_name(installed, name) -> None:
    configs = script("distill_lcm").CONFIGS
    by_path = parse_configs(configs, "", ["--recipe", str(FOLDER / "recipes" / "lcm_sd15.args")])
    assert parse_configs(configs, "", ["--recipe", name]) == by_path


def test_a_checkout_finds_its_recipes_from_any_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(FOLDER / "distill_lcm.py")])
    assert shipped("--recipe", "lcm_sd15", ".args") == FOLDER.resolve() / "recipes" / "lcm_sd15.args"


def test_a_file_that_is_there_wins_over_a_name(installed) -> None:
    (installed / "recipes" / "mine.args").write_text("--seed 3")
    assert parse_configs([Settings], "", ["--recipe", "mine.args"]) == (Settings(3),)
    Path("mine.args").write_text("--seed 4")
    assert parse_configs([Settings], "", ["--recipe", "mine.args"]) == (Settings(4),)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("lcm_sd1.5", "close to it: lcm_sd15, "),
        ("training/recipes/scott_sd15.args", "close to it: scott_sd15, "),
        ("qqqq", "give the path of one."),
    ],
)
def test_a_wrong_name_is_answered_with_those_close_to_it(installed, name, advice) -> None:
    with pytest.raises(ValueError, match=f"--recipe {name}: there is no such file") as refused:
        parse_configs([Settings], "", ["--recipe", name])
    assert advice in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--sed", "3"], "--sed 3: this script has no such flag; did you mean --seed?"),
        (["--qqqq"], "--qqqq: this script has no such flag; --help lists those it has."),
        (["--see", "3"], "--see 3: this script has no such flag; did you mean --seed?"),  # no prefix is guessed
        (["--seed", "three"], "argument --seed: invalid int value: 'three'; --help explains the flags."),
        (["--seed"], "argument --seed: expected one argument; --help explains the flags."),
    ],
)
def test_a_wrong_word_gets_one_sentence(capsys, words, sentence) -> None:
    with pytest.raises(ValueError, match="flag") as refused:
        parse_configs([Settings], "", words)
    assert str(refused.value) == sentence
    assert capsys.readouterr() == ("", "")


def test_help_explains_recipes(capsys) -> None:
    with pytest.raises(SystemExit):
        parse_configs([Settings], "A script.", ["--help"])
    assert "--recipe NAME" in capsys.readouterr().out


@pytest.mark.parametrize("path", [p for p in RECIPES if "--unet_config" in p.read_text()], ids=lambda p: p.stem)
def test_settings_of_networks_lie_beside_the_recipes(installed, path) -> None:
    words = path.read_text().split()
    name = words[words.index("--unet_config") + 1]
    assert shipped("--unet_config", name, ".json") == installed / "recipes" / name
