"""Recipes by path and by name, from a checkout and from an installed package; wrong words; whose error is told."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from scripts import FOLDER, script
from transformers.hf_argparser import HfArg

from cm_diffusers.data.sources import DataConfig
from cm_diffusers.engine import cli, flag_names
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.recipes import shipped
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.models.teachers import TeacherConfig
from cm_diffusers.tasks.reward_runs import RewardConfig


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


LCM = script("distill_lcm").CONFIGS


def values(*words: str) -> dict[str, object]:
    """Of all flags of distill_lcm.py, by name."""
    return {name: value for config in parse_configs(LCM, "", list(words)) for name, value in vars(config).items()}


def test_a_recipe_shrinks_with_its_steps(installed, caplog) -> None:
    caplog.set_level("INFO")
    assert [values("--recipe", "lcm_demo")[name] for name in ("lr_warmup_steps", "lr_cooldown_steps")] == [50, 150]
    found = values("--recipe", "lcm_demo", "--max_train_steps", "200")
    assert (found["lr_warmup_steps"], found["lr_cooldown_steps"]) == (50, 150)
    assert caplog.messages == []
    found = values("--recipe", "lcm_demo", "--max_train_steps=100")
    assert (found["lr_warmup_steps"], found["lr_cooldown_steps"], found["max_train_steps"]) == (12, 37, 100)
    assert caplog.messages[0] == "--lr_warmup_steps is 12 instead of the recipe's 50, as --max_train_steps is 100."
    found = values("--recipe", "lcm_demo", "--max_train_steps", "100", "--lr-warmup-steps", "70")
    assert (found["lr_warmup_steps"], found["lr_cooldown_steps"]) == (70, 37)  # what is given is not touched


@pytest.mark.parametrize(
    "words",
    [
        ["--dataset_name", "a/b"],
        ["--prompts_file", "prompts.txt"],
        ["--train-shards-path-or-url=shards/{0..3}.tar"],
        ["--train_data_dir", "mine"],
    ],
)
def test_a_source_of_data_takes_the_place_of_the_recipes(installed, words) -> None:
    found = values("--recipe", "lcm_demo", *words)
    name = words[0][2:].partition("=")[0].replace("-", "_")
    sources = ("dataset_name", "prompts_file", "train_shards_path_or_url", "train_data_dir")
    assert [source for source in sources if found[source] is not None] == [name]
    assert found["center_crop"] is (name != "prompts_file")  # which has no effect on what is sampled
    assert found["resolution"] == 32


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("--pretrained_model_name_or_path", "--pretrained_teacher_model"),
        ("--dataset_config", "--train_data_dir"),
        ("--train_data", "--train_data_dir"),
        ("--lr=1e-4", "--learning_rate"),
        ("--network_dim", "--lora_rank"),
        ("--num_train_epochs", "--max_train_steps"),
    ],
)
def test_a_flag_of_another_project_is_answered_with_ours(word, ours) -> None:
    with pytest.raises(ValueError, match=f"has no such flag; did you mean {ours}\\?$"):
        parse_configs(LCM, "", ["--pretrained_teacher_model", "t", *word.split("="), *([] if "=" in word else ["x"])])


def test_the_page_of_flags_shows_the_tables() -> None:
    page = (FOLDER.parent / "docs" / "api" / "flag_names.md").read_text("utf-8")
    rows = re.findall(r"^\| `--(\w+)` \| (.+) \|$", page, re.MULTILINE)
    tables = [getattr(flag_names, name) for name in ("DIFFUSERS", "KOHYA", "SIMPLETUNER", "TRL", "SHORT")]
    assert [(theirs, " ".join(re.findall(r"`--(\w+)`", ours))) for theirs, ours in rows] == [
        row for table in tables for row in table.items()
    ]


def test_each_of_our_names_exists() -> None:
    scripts = [script(path.stem) for path in FOLDER.glob("*.py")]
    known = {name for one in scripts for config in getattr(one, "CONFIGS", ()) for name in config.__dataclass_fields__}
    assert {name for names in flag_names.OURS.values() for name in names.split()} - known == set()


@pytest.mark.parametrize(("rank", "waits"), [("0", [0.0, 4.0]), ("1", [2.0, 6.0])])
def test_of_several_processes_one_tells_what_is_wrong(monkeypatch, rank, waits) -> None:
    """The sentence of the first comes before all others, and any sentence before what follows from it elsewhere."""
    slept = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")

    def wrong() -> None:
        parse_configs([Settings], "", ["--qqqq"])

    def lost() -> None:
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(SystemExit, match=r"^error: --qqqq"):
        run(wrong)
    with pytest.raises(RuntimeError, match="closed"):
        run(lost)
    assert slept == waits
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SystemExit, match=r"^error: --qqqq"):
        run(wrong)
    assert slept == waits


@pytest.mark.parametrize(
    "words",
    [
        ["--output_dir", "~/runs", "--pretrained_teacher_model", "~/teacher"],
        ["--output_dir=~/runs", "--pretrained_teacher_model=~/teacher"],
        ["--recipe", "~/mine.args"],
    ],
)
def test_home_is_found_where_no_shell_has_read_it(tmp_path, monkeypatch, words) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.args").write_text("--output_dir ~/runs --pretrained_teacher_model '~/teacher'\n")
    train, teacher = parse_configs((TrainConfig, TeacherConfig), "", words)
    assert (train.output_dir, teacher.pretrained_teacher_model) == (f"{tmp_path}/runs", f"{tmp_path}/teacher")


def test_home_in_lists_and_behind_names(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--rewards", "classifier:~/one", "jpeg_compressibility", "--prompts", "a bag ~ a coat", "~/p.txt"]
    words += ["--train_shards_path_or_url", "{~/a,~/b}/x.tar", "--cache_dir", "~"]
    reward, data = parse_configs((RewardConfig, DataConfig), "", words)
    assert reward.rewards == [f"classifier:{tmp_path}/one", "jpeg_compressibility"]
    assert reward.prompts == ["a bag ~ a coat", f"{tmp_path}/p.txt"]
    assert data.train_shards_path_or_url == f"{{{tmp_path}/a,{tmp_path}/b}}/x.tar"
    assert (data.cache_dir, data.latent_cache_dir) == (
        str(tmp_path),
        DataConfig().latent_cache_dir,
    )  # a default stays one
