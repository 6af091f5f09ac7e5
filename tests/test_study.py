"""Studies: variants trained once each, and tables that are means over seeds."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import study  # noqa: E402
import study_report  # noqa: E402

from cm_diffusers.evaluation.report import Setting  # noqa: E402


SETTING = Setting(8, 3, "net", "data", "a machine", "float32", 4, 0.9693)
METRICS = dict.fromkeys(study_report.METRICS, 0.5)


def row(name, seed, steps, fid, minutes=None):
    found = {"pipeline": name, "num_inference_steps": steps, "guidance_scale": None if steps is None else 3.0}
    return found | METRICS | {"fid": fid, "seed": seed, **({} if minutes is None else {"cpu_minutes": minutes})}


ROWS = [row("other real images", 0, None, 1.0), row("teacher", 0, 50, 4.0), row("teacher", 0, 2, 9.0)]
ROWS += [row("ours", seed, steps, 2.0 * steps + seed, 10.0 + 4 * seed) for seed in (0, 1) for steps in (1, 2)]


def test_numbers_are_means_over_seeds_with_half_their_range():
    lines = study_report.markdown(ROWS, SETTING).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:7]]
    assert [row[:6] for row in cells] == [
        ["other real images", "–", "–", "–", "–", "1.00"],
        ["teacher", "–", "–", "50", "3", "4.00"],
        ["teacher", "–", "–", "2", "3", "9.00"],
        ["ours", "2", "12", "1", "3", "2.50 ±0.50"],
        ["ours", "2", "12", "2", "3", "4.50 ±0.50"],
    ]


def test_report_holds_the_tables_asked_for(tmp_path):
    tables = {
        "steps": {"variants": ["ours"], "num_inference_steps": [1, 2], "plot": "steps"},
        "parts": {"variants": ["ours", "never trained"], "num_inference_steps": [2], "plot": "variants"},
    }
    study_report.write_study(tmp_path, tables, [*ROWS, row("other", 0, 2, 7.0)], SETTING)
    names = {"steps.md", "steps.png", "parts.md", "parts.png", "rows.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    parts = (tmp_path / "parts.md").read_text("utf-8")
    assert parts.count("| ours |") == 1
    assert "| other |" not in parts
    assert len(json.loads((tmp_path / "rows.json").read_text("utf-8"))["rows"]) == len(ROWS) + 1
    for name in ("steps.png", "parts.png"):
        with Image.open(tmp_path / name) as image:
            assert len(image.convert("L").getcolors()) > 50


TRAINING = """
import argparse, pathlib
flags = argparse.ArgumentParser()
for name in ("--seed", "--output_dir", "--fail", "--resume_from_checkpoint"):
    flags.add_argument(name)
flags = flags.parse_args()
folder = pathlib.Path(flags.output_dir)
(folder / "checkpoint-1").mkdir(parents=True, exist_ok=True)
sum(range(10_000_000))
with open(folder / "calls.txt", "a") as file:
    print(flags.seed, flags.resume_from_checkpoint, file=file)
if flags.fail and not flags.resume_from_checkpoint:
    raise SystemExit(1)
(folder / "pipeline").mkdir()
"""


def test_a_training_is_taken_up_and_done_once(tmp_path):
    (tmp_path / "script.py").write_text(TRAINING)
    command, folder = f"{shlex.quote(str(tmp_path / 'script.py'))} --fail yes", tmp_path / "run"
    with pytest.raises(subprocess.CalledProcessError):
        study.train(command, 7, folder)
    first = json.loads((folder / "cost.json").read_text())["cpu_minutes"]
    study.train(command, 7, folder)
    both = json.loads((folder / "cost.json").read_text())["cpu_minutes"]
    assert both > 1.3 * first > 0
    study.train(command, 7, folder)
    (folder / "cost.json").unlink()
    assert study.cpu_minutes(folder) is None
    assert (folder / "calls.txt").read_text().splitlines() == ["7 None", "7 latest"]
