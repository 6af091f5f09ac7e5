"""What a run says at its start and end, and that what it says can be run; students remember the size they were trained at."""

import json
import logging
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from diffusers import LCMScheduler
from PIL import Image
from scripts import FOLDER, data_flags, image_folder, models_folder, run_script, script

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.engine.cli import parse_configs
from cm_diffusers.evaluation.candidates import Candidate
from cm_diffusers.evaluation.reference import ReferenceConfig
from cm_diffusers.publishing.pipelines import lcm_record
from cm_diffusers.record import RECORD, read_record, write_record
from cm_diffusers.tasks.callbacks import SampleGrids, show_end
from cm_diffusers.tasks.reward_runs import RewardModelConfig, load_tuned
from cm_diffusers.tasks.summary import conclude


TRAINING = [path for path in sorted(FOLDER.glob("*.py")) if "TrainConfig" in path.read_text("utf-8")]
RUN = {
    "lora": True, "lora_rank": 2, "w_min": 2.0, "w_max": 2.0, "num_ddim_timesteps": 20, "max_train_steps": 2,
    "validation_seeds": [0], "validation_nfe": [1], "validation_teacher_steps": 2, "validation_steps": 500,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = models_folder(tmp_path_factory.mktemp("signs"))
    image_folder(home / "images")
    return home


@pytest.fixture(scope="module")
def said(home) -> str:
    """The log of a run at 64 pixels from a teacher of 32."""
    lines, handler, logger = [], logging.Handler(), logging.getLogger("cm_diffusers")
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    data = data_flags(home / "images", home / "cache") | {"resolution": 64}
    values = {"pretrained_teacher_model": home / "teacher", "validation_prompts": ['a "red" bag'], **RUN, **data}
    run_script("distill_lcm", **values, output_dir=home / "wide")
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)
    return "\n".join(lines)


def test_a_run_begins_with_what_it_is(home, said) -> None:
    begin = said.index("distill_lcm:\n")
    lines = dict(re.findall(r"^  (\w+) +(.*)$", said[begin : said.index("Done:")], re.MULTILINE))
    assert lines["from"] == f"teacher {home / 'teacher'}"
    assert re.fullmatch(r"student, a LoRA of rank 2 on \w+, [\d,]+ of [\d,]+ parameters", lines["trains"])
    assert str(home / "images") in lines["data"]
    assert lines["batch"] == "2 of 64 px: 2 at once x 1 accumulated x 1 process"
    assert (lines["steps"], lines["precision"]) == ("2", "float32")
    assert lines["samples"] == "samples/ at the end alone: --validation_steps 500 is more than 2 steps"
    assert lines["writes"].startswith(f"{home / 'wide' / 'lora'}; ")


def test_a_run_ends_with_commands_that_run(home, said, tmp_path, monkeypatch) -> None:
    done = said[said.index("Done: ") :]
    assert done.startswith(f"Done: the result is in {home / 'wide' / 'lora'}.\n")
    commands = {words[0]: words[1:] for line in done.splitlines()[1:] if (words := shlex.split(line))}
    monkeypatch.chdir(tmp_path)
    assert commands["sample"][:2] == ["python", "-c"]
    exec(commands["sample"][2], {})
    assert Image.open("sample.png").size == (64, 64)
    for kind, name in (("measure", "evaluate"), ("share", "share")):
        python, path, *flags = commands[kind]
        assert (python, Path(path)) == ("python", FOLDER / f"{name}.py")
        parse_configs(script(name).CONFIGS, "", flags)
    assert commands["measure"][2:6] == ["--pipelines", str(home / "wide/lora"), "--teacher", str(home / "teacher")]


def test_a_student_remembers_the_size_of_its_training(home, said) -> None:
    lora, cell = home / "wide" / "lora", 128
    assert read_record(lora).resolution == 64
    assert read_record(lora).num_frames is None
    with Image.open(home / "wide" / "samples" / "step-000002.png") as grid:  # though validation_steps is 500
        assert grid.height > 2 * cell
    assert (lora / "samples.png").is_file()
    assert "height=64, width=64" in (lora / "README.md").read_text("utf-8")
    pipe = ConsistencyPipeline.from_pretrained(lora)
    assert pipe("a bag", num_inference_steps=1, output_type="pt").images.shape[-2:] == (64, 64)
    assert pipe("a bag", num_inference_steps=1, height=32, width=32, output_type="pt").images.shape[-2:] == (32, 32)
    assert (Candidate.of(str(lora)).side, Candidate.of(str(home / "teacher")).side) == (64, 32)


def test_tuning_keeps_the_size_of_its_start(home) -> None:
    folder = home / "student"
    content = json.loads((folder / RECORD).read_text("utf-8"))
    (folder / RECORD).write_text(json.dumps(content | {"resolution": 64}), "utf-8")
    tuned = load_tuned(RewardModelConfig(str(folder)), 0.0)
    assert tuned.side(None) == 64
    assert tuned.side(32) == 32
    assert tuned.shape(64) == tuned.shape(None) != tuned.shape(32)


def test_older_records_do_not_tell_a_size(tmp_path) -> None:
    write_record(lcm_record("base", "distilled", 1.0, 1.0, 1.0, LCMScheduler()), tmp_path)
    content = json.loads((tmp_path / RECORD).read_text("utf-8"))
    for name in ("resolution", "num_frames"):
        del content[name]
    (tmp_path / RECORD).write_text(json.dumps(content | {"of_tomorrow": 3}), "utf-8")
    assert read_record(tmp_path).resolution is read_record(tmp_path).num_frames is None
    (tmp_path / RECORD).write_text(json.dumps(content | {"resolution": "64"}), "utf-8")
    with pytest.raises(ValueError, match="resolution must be a whole number of at least 1 or null"):
        read_record(tmp_path)


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_every_script_says_what_it_does(path: Path) -> None:
    """By itself, or by what it calls."""
    text = path.read_text("utf-8")
    shared = any(name in text for name in ("distill(", "train_images(")) or path.stem == "estimate_memory"
    assert shared or "announce(trainer, " in text
    assert shared or any(name in text for name in ("conclude(trainer, ", "publish(trainer, ", "publish_run("))


def ended(folder: Path, **values: object) -> SimpleNamespace:
    config = SimpleNamespace(validation_steps=500, max_train_steps=4, **values)
    accelerator = SimpleNamespace(
        num_processes=1, is_main_process=True, trackers=[], device="cpu", reduce=lambda value, reduction: value
    )
    return SimpleNamespace(
        accelerator=accelerator, output_dir=folder, step=4, stopping="", config=config, callbacks=[], takes_part=True
    )


@pytest.mark.parametrize(
    ("result", "next_script"),
    [
        ("vae", "train_diffusion"), ("classifier", "evaluate"), ("motion_adapter", "evaluate_video"),
        ("student", "evaluate_video"), ("pipeline", "evaluate"), ("controlnet", None),
    ],
)  # fmt: skip
def test_next_commands_parse(result: str, next_script: str | None, tmp_path, caplog, monkeypatch) -> None:
    (tmp_path / result).mkdir()
    record = lcm_record("base", "none" if result == "pipeline" else "distilled", 1.0, 1.0, 1.0, LCMScheduler())
    if result in ("student", "pipeline"):
        write_record(record, tmp_path / result)
    monkeypatch.setattr("sys.argv", [str(FOLDER / "distill_lcm.py")])
    with caplog.at_level("INFO"):
        conclude(ended(tmp_path), [ReferenceConfig(train_data_dir="my images", label_column="label")], result)
    lines = [shlex.split(line) for line in caplog.messages[-1].splitlines()[1:]]
    for _, _, path, *flags in [words for words in lines if words[2] != "-c"]:
        parse_configs(script(Path(path).stem).CONFIGS, "", flags)
    assert [Path(words[2]).stem for words in lines if words[2] != "-c"][:1] == ([next_script] if next_script else [])
    for code in [words[3] for words in lines if words[2] == "-c"]:
        compile(code, "sampling", "exec")


def test_the_last_grid_is_drawn_once(tmp_path, caplog) -> None:
    drawn, trainer = [], ended(tmp_path, report_to="none")
    grids = SampleGrids(500, lambda trainer: drawn.append(trainer.step) or Image.new("RGB", (8, 8)))
    trainer.callbacks = [grids, lambda trainer, loss: drawn.append("other")]
    show_end(trainer)  # as after a kill between the last checkpoint and its grid
    show_end(trainer)
    assert drawn == [4]
    trainer.callbacks, trainer.step = [SampleGrids(500, lambda trainer: 1 / 0)], 5
    show_end(trainer)
    assert "The last grid failed" in caplog.text
    trainer.step = 3
    grids(trainer, None)
    assert drawn == [4]
    trainer.stopping = "a guard says so"
    grids(trainer, None)
    assert drawn == [4, 3]
