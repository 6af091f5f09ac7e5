"""Studies: variants trained once each, and tables that are means over seeds."""

import json
import runpy
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import study  # noqa: E402
import study_report  # noqa: E402

from cm_diffusers.engine.cli import parse_configs  # noqa: E402
from cm_diffusers.evaluation.report import Setting  # noqa: E402
from cm_diffusers.evaluation.video_report import VideoSetting  # noqa: E402


STUDIES = sorted(
    set((ROOT / "benchmarks" / "studies").glob("*.toml")) - {ROOT / "benchmarks" / "studies" / "rewards.toml"}
)
SETTING = Setting(8, 3, "net", "data", "a machine", "float32", 4, 0.9693)
METRICS = dict.fromkeys(study_report.METRICS[Setting], 0.5)


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


@pytest.mark.parametrize("kind", sorted(study_report.PLOTS))
def test_a_plot_has_its_legend_beside_the_panels_and_room_for_points_alone(kind):
    figure = study_report.PLOTS[kind](ROWS, {key: key for key in study_report.PLOTTED[Setting]})
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert not any(axes.get_legend() for axes in figure.axes)
    assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)
    assert {"teacher, 50 steps", "other real images"} < {text.get_text() for text in legend.get_texts()}
    low = min(figure.axes[0].get_xlim() if kind == "variants" else figure.axes[0].get_ylim())
    assert 1 < low < 2  # the real images are at 1, the best of the points at 2


def test_rows_keep_nine_digits_and_what_is_no_fraction():
    whole = row("ours", 10_000_001, 1, 9.507718929553107)
    assert study_report.rounded([whole]) == [whole | {"fid": 9.50771893}]


def test_report_holds_the_tables_asked_for(tmp_path):
    tables = {
        "steps": {"variants": ["ours"], "num_inference_steps": [1, 2], "plot": "steps"},
        "parts": {"variants": ["ours", "never trained"], "num_inference_steps": [2], "plot": "variants"},
    }
    study_report.write_study(tmp_path, tables, [*ROWS, row("other", 0, 2, 7.0)], SETTING, {})
    names = {"steps.md", "steps.png", "parts.md", "parts.png", "rows.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    parts = (tmp_path / "parts.md").read_text("utf-8")
    assert parts.count("| ours |") == 1
    assert "| other |" not in parts
    written = (tmp_path / "rows.json").read_text("utf-8")
    rows = json.loads(written)["rows"]
    assert len(rows) == len(ROWS) + 1
    assert all(
        json.loads(line.strip(", ")) in rows for line in written.splitlines()[-2 - len(rows) : -2]
    )  # a row a line
    for name in ("steps.png", "parts.png"):
        with Image.open(tmp_path / name) as image:
            assert len(image.convert("L").getcolors()) > 50


TRAINING = """
import argparse, pathlib
flags = argparse.ArgumentParser()
for name in ("--seed", "--output_dir", "--resume_from_checkpoint"):
    flags.add_argument(name)
flags.add_argument("--overwrite_output_dir", action="store_true")
flags = flags.parse_args()
folder = pathlib.Path(flags.output_dir)
folder.mkdir(parents=True, exist_ok=True)
sum(range(10_000_000))
calls = folder.parent / "calls.txt"
with open(calls, "a") as file:
    print(flags.seed, flags.resume_from_checkpoint, flags.overwrite_output_dir, file=file)
times = len(calls.read_text().splitlines())
if times == 1:
    raise SystemExit(1)  # before its first checkpoint
(folder / "checkpoint-1").mkdir(exist_ok=True)
if times == 2:
    raise SystemExit(1)
(folder / "pipeline").mkdir()
"""


def test_a_training_is_taken_up_and_done_once(tmp_path):
    (tmp_path / "script.py").write_text(TRAINING)
    command, folder, costs = shlex.quote(str(tmp_path / "script.py")), tmp_path / "run", []
    for fails in (True, True, False, False):
        with pytest.raises(subprocess.CalledProcessError) if fails else nullcontext():
            study.train(command, 7, folder)
        costs.append(study.cpu_minutes(folder))
    assert (tmp_path / "calls.txt").read_text().splitlines() == ["7 None True", "7 None True", "7 latest False"]
    assert 0 < costs[1] < 0.7 * costs[2]  # what came before the first checkpoint was done again
    assert costs[2] == costs[3]


def test_a_killed_training_has_no_cost(tmp_path):
    (tmp_path / "script.py").write_text(TRAINING)
    (tmp_path / "calls.txt").write_text("one\ntwo\n")
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    study.train(shlex.quote(str(tmp_path / "script.py")), 7, tmp_path / "run")
    assert study.cpu_minutes(tmp_path / "run") is None


class Measuring:
    """In place of a `Comparison`: one row of what it is asked for."""

    def __init__(self):
        self.rows, self.config = [{"pipeline": "before"}], SimpleNamespace(num_inference_steps=[1, 2])

    def measure(self, source, name, steps):
        self.rows.append({"pipeline": name, "source": source, "steps": steps})


def test_rows_stay_with_what_made_them(tmp_path):
    comparison, origin = Measuring(), {"command": "train", "evaluation": "flags"}
    (tmp_path / "student").mkdir()
    assert study.read_rows(tmp_path, origin) == []
    for _ in range(2):
        study.measure(comparison, "ours", 3, tmp_path, origin, [])
    row = {"pipeline": "ours", "source": str(tmp_path / "student"), "steps": [1, 2], "seed": 3, "cpu_minutes": None}
    row["hardware"] = study.hardware()
    assert study.read_rows(tmp_path, origin) == [row]
    assert len(comparison.rows) == 2
    other = tmp_path / "other"
    (other / "pipeline").mkdir(parents=True)
    study.measure(comparison, "ours", 3, other, origin, [], [35])
    assert study.read_rows(other, origin)[0]["steps"] == [35]
    with pytest.raises(ValueError, match=r"was made by .*'command': 'train'.* now says .*'train --fast'"):
        study.read_rows(tmp_path, origin | {"command": "train --fast"})


def test_every_study_names_what_it_has(tmp_path):
    for path in STUDIES:
        found = study.read_study(path, None)
        commands = found.commands.values()
        assert all(
            command.split()[0].startswith(("training/", "benchmarks/")) and "{" not in command for command in commands
        )
        parse_configs(study.MEASURES[found.measures][1], "", shlex.split(found.evaluation))
    (tmp_path / "a.toml").write_text(
        'evaluation = ""\n[pieces]\n[variants]\none = "x"\n[tables.t]\nvariants = ["two"]\n'
    )
    with pytest.raises(ValueError, match="has no variant three, two: it has one"):
        study.read_study(tmp_path / "a.toml", ["three"])
    (tmp_path / "c.toml").write_text('measures = "sounds"\nevaluation = ""\n[pieces]\n[variants]\n[tables]\n')
    with pytest.raises(ValueError, match="measures is 'sounds'; one of images, clips"):
        study.read_study(tmp_path / "c.toml", None)
    (tmp_path / "d.toml").write_text('evaluation = ""\n[pieces]\n[variants]\n"a b" = "x"\na_b = "y"\n[tables]\n')
    with pytest.raises(ValueError, match="a b and a_b would be trained in one folder; rename one"):
        study.read_study(tmp_path / "d.toml", None)
    one = study.Study({"teacher-like": "x"}, {}, "--pipelines a/b --names teacher-like", {}, "images")
    with pytest.raises(ValueError, match="Two rows would be called teacher-like"):
        one.comparison()
    with pytest.raises(ValueError, match="there is no such file; studies lie in"):
        study.read_study(tmp_path / "b.toml", None)


def test_studies_are_read_flag_by_flag():
    """Their commands parse with their scripts."""
    for command in [c for path in STUDIES for c in study.read_study(path, None)[0].values()]:
        script, *flags = shlex.split(command)
        content = runpy.run_path(str(ROOT / script))
        parse_configs(content["CONFIGS"], "", flags)


def test_a_variant_starts_from_another_s_result(tmp_path):
    text = 'evaluation = ""\n[pieces]\n[variants]\n"a b" = "x"\ntwo = "y --start <a b>"\n[tables]\n'
    (tmp_path / "a.toml").write_text(text)
    commands, *_ = study.read_study(tmp_path / "a.toml", None)
    assert study.started_from(commands["two"], commands) == ["a b"]
    (tmp_path / "b.toml").write_text(text.replace('"x"', '"x <two>"'))
    with pytest.raises(ValueError, match="a b starts from two, which must stand before it"):
        study.read_study(tmp_path / "b.toml", None)


def test_the_start_s_cost_counts(tmp_path):
    for name, minutes in {"start": 5.0, "tuned": 1.0}.items():
        (tmp_path / name / "pipeline").mkdir(parents=True)
        (tmp_path / name / study.COST).write_text(json.dumps({"cpu_minutes": minutes}))
    comparison = Measuring()
    study.measure(comparison, "tuned", 0, tmp_path / "tuned", {}, [tmp_path / "start"])
    (found,) = study.read_rows(tmp_path / "tuned", {})
    assert (found["cpu_minutes"], found["start_minutes"]) == (1.0, 5.0)
    rows = [row("ours", 0, 1, 2.0, 10.0), row("tuned", 0, 1, 3.0, 1.0) | {"start_minutes": 5.0}]
    lines = study_report.markdown(rows, SETTING).splitlines()
    assert [line.split(" | ")[1:4] for line in lines[2:4]] == [["1", "10", "–"], ["1", "1", "5"]]
    axes = study_report.plot_over_cost(rows, dict.fromkeys(study_report.PLOTTED[Setting], "")).axes[0]
    assert [line.get_xdata().tolist() for line in axes.get_lines() if line.get_marker() == "o"] == [[10.0], [6.0]]


def test_a_start_is_trained_where_it_is_missing(tmp_path):
    (tmp_path / "script.py").write_text(TRAINING)
    (tmp_path / "calls.txt").write_text("one\ntwo\n")
    command = shlex.quote(str(tmp_path / "script.py"))
    commands = {"base": command, "tuned": f"{command} --resume_from_checkpoint <base>"}
    found, folders = study.Study(commands, {}, "", {}, "images"), {name: tmp_path / name for name in commands}
    assert study.trained(found, "tuned", 7, folders) == tmp_path / "tuned" / "pipeline"
    calls = ["7 None True", f"7 {tmp_path / 'base' / 'pipeline'} True"]
    assert (tmp_path / "calls.txt").read_text().splitlines()[2:] == calls
    study.trained(found, "tuned", 7, folders)
    assert len((tmp_path / "calls.txt").read_text().splitlines()) == 4


def test_rows_of_another_machine_count_while_the_command_is_the_same(tmp_path):
    origin = {"command": "train", "evaluation": "flags"}
    rows = [*ROWS, row("other", 0, 2, 7.0)]
    text = study_report.write_study(tmp_path, {}, rows, SETTING, {"ours": origin, "other": {}, "never": {}})
    assert not text
    assert study.published_rows(tmp_path, "ours", 1, origin) == ROWS[-2:]
    assert study.published_rows(tmp_path, "ours", 2, origin) == []
    assert study.published_rows(tmp_path, "ours", 1, origin | {"command": "train --fast"}) == []
    assert study.published_rows(tmp_path, "other", 0, {}) == rows[-1:]
    assert study.published_rows(tmp_path / "none", "ours", 1, origin) == []
    assert list(json.loads((tmp_path / "rows.json").read_text("utf-8"))["origins"]) == ["ours", "other"]
    later = [row | {"hardware": "another machine"} for row in ROWS[-2:]]
    assert study_report.markdown([*ROWS[:-2], *later], SETTING).endswith("on a machine or another machine.\n")


def test_metrics_that_nobody_has_are_left_out(tmp_path):
    rows = [row | {"vendi": None} for row in ROWS]
    tables = {name: {"variants": ["ours"], "num_inference_steps": [1], "plot": name} for name in study_report.PLOTS}
    study_report.write_study(tmp_path, tables, rows, SETTING, {})
    assert (tmp_path / "variants.png").stat().st_size > 10_000


CLIPS = VideoSetting(6, 8, 32, 0, "net", None, 1.3, 4, 0.3, 0.01, "clips", "a machine", "float32", 4)


def test_studies_of_clips_have_their_own_columns(tmp_path):
    metrics = study_report.METRICS[VideoSetting]
    rows = [
        {"pipeline": "other real clips", "num_inference_steps": None, "guidance_scale": None}
        | dict.fromkeys(metrics, 0.25)
    ]
    for seed in (0, 1):
        found = dict.fromkeys(metrics, 0.5) | {
            "direction_accuracy": 0.75 + 0.25 * seed,
            "seed": seed,
            "cpu_minutes": 2.0,
        }
        rows.append({"pipeline": "ours", "num_inference_steps": 4, "guidance_scale": 1.0} | found)
    tables = {name: {"variants": ["ours"], "num_inference_steps": [4], "plot": name} for name in study_report.PLOTS}
    text = study_report.write_study(tmp_path, tables, rows, CLIPS, {})
    heads, _, real, ours = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[:4])
    assert heads[5:7] == ["direction accuracy", "off constant velocity, px"]
    assert real[:6] == ["other real clips", "–", "–", "–", "–", "0.250"]
    assert ours[:6] == ["ours", "2", "2", "4", "1", "0.875 ±0.125"]
    assert "6 clips of 8 frames a row" in text


def test_what_no_table_names_is_not_measured():
    commands = {"LoRA": "x", "motion": "y --spatial_lora <LoRA>"}
    found = study.Study(commands, {"t": {"variants": ["motion"]}}, "", {}, "clips")
    assert [name for name in commands if found.is_measured(name)] == ["motion"]
