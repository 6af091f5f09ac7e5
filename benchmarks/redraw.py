"""Write the tables and plots of assets/results anew from the numbers beside them, without measuring anything."""

import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import reward_study_report
import study_report
from matplotlib.figure import Figure
from PIL import Image

from cm_diffusers.evaluation import front_plot, front_report, report, video_report
from cm_diffusers.evaluation.front_columns import known_columns
from cm_diffusers.evaluation.grids import MARGIN, SMALLEST
from cm_diffusers.evaluation.report import replace_file, write_plot, write_small
from cm_diffusers.measured import distance_name


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "assets" / "results"
REWARDS, BASELINE = RESULTS / "rewards", "DDPO"  # its curves need the trainings' histories
SUMMARY = (
    "pipeline",
    "num_inference_steps",
    "guidance_scale",
    "fid",
    "agreement",
    "coverage",
    "recall",
    "vendi",
    "ms_per_image",
)
TEASER = (
    "real",
    ("teacher", 50, 3.0),
    ("teacher", 1, 3.0),
    ("LCM", 1, 3.0),
    ("LCM", 4, 3.0),
    ("LCM-LoRA", 1, 1.0),
    ("SCott", 1, 3.0),
)
Page = tuple[Path, str, Callable[[], Figure] | None]  # file, text, plot


def evaluations() -> Iterator[Page]:
    """Of `training/evaluate.py` and `evaluate_video.py`."""
    for path in sorted(RESULTS.glob("*/table.json")):
        content = json.loads(path.read_text("utf-8"))
        if "fronts" in content:
            continue
        kind = video_report if "num_clips" in content["setting"] else report
        setting = (video_report.VideoSetting if kind is video_report else report.Setting)(**content["setting"])
        rows = content["rows"]
        yield (
            path.with_name("table.md"),
            kind.markdown_table(rows, setting),
            lambda k=kind, r=rows, s=setting: k.plot(r, s),
        )


def sweeps() -> Iterator[tuple[Path, front_report.Report]]:
    """Folder and content of `training/evaluate_fronts.py`, without the images of its points."""
    for path in sorted(RESULTS.glob("*/table.json")):
        content = json.loads(path.read_text("utf-8"))
        if "fronts" in content:
            rows, setting = content["rows"], content["setting"]
            known = known_columns(setting["rewards"], distance_name(setting["extractor"]))
            columns = front_report.filled(known, rows)
            fronts = [front_report.Front(**front) for front in content["fronts"]]
            yield path.parent, front_report.Report(rows, [], [], columns, fronts, setting, content["pipelines"])


def fronts() -> Iterator[Page]:
    """The tables of `sweeps`."""
    for folder, found in sweeps():
        yield folder / "table.md", front_report.markdown(found), None


def summary() -> Iterator[Page]:
    """Of the students of text, at the guidance of their cards: what README.md shows."""
    content = json.loads((RESULTS / "students" / "table.json").read_text("utf-8"))
    setting = report.Setting(**content["setting"])
    columns = report.headed(report.COLUMNS, setting.extractor)
    columns = {key: columns[key] for key in SUMMARY}
    rows = [row for row in content["rows"] if row["guidance_scale"] != 2 and row["num_inference_steps"] != 8]
    said = f"{setting.num_images} images, seed {setting.seed}; {setting.hardware}, {setting.dtype}, batch size {setting.batch_size}."
    yield RESULTS / "students" / "summary.md", f"{report.filled_columns(rows, columns)}\n\n{said}\n", None


def teaser() -> Image.Image:
    """Some rows of the students' grid: what README.md and the first page of the documentation show."""
    students = RESULTS / "students"
    rows = json.loads((students / "table.json").read_text("utf-8"))["rows"]
    drawn = [(row["pipeline"], row["num_inference_steps"], row["guidance_scale"]) for row in rows]
    drawn = ["real", *(row for row in drawn if row[1] is not None)]
    with Image.open(students / "grid.png") as grid:
        height = SMALLEST + MARGIN
        top = grid.height - height * len(drawn)
        bands = [(0, top), *((y := top + height * drawn.index(row), y + height) for row in TEASER)]
        picture = Image.new("RGB", (grid.width, top + height * len(TEASER)), "white")
        for place, (start, end) in enumerate(bands):
            picture.paste(grid.crop((0, start, grid.width, end)), (0, place and top + height * (place - 1)))
    return picture


def studies() -> Iterator[Page]:
    """Of `benchmarks/study.py` and `reward_study.py`."""
    for path in sorted(RESULTS.glob("*/rows.json")):
        content, name = json.loads(path.read_text("utf-8")), path.parent.name
        if path.parent == REWARDS:
            setting = reward_study_report.Setting(**content["setting"])
            yield path.with_name("table.md"), reward_study_report.markdown(content["rows"], BASELINE, setting), None
            continue
        kind = video_report.VideoSetting if "num_clips" in content["setting"] else report.Setting
        tables = tomllib.loads((ROOT / "benchmarks/studies" / f"{name}.toml").read_text("utf-8"))["tables"]
        for page in study_report.pages(tables, content["rows"], kind(**content["setting"])):
            yield path.with_name(f"{page.name}.md"), page.text, page.plot


if __name__ == "__main__":
    for page, text, draw in (*evaluations(), *fronts(), *summary(), *studies()):
        replace_file(page, lambda path, text=text: path.write_text(text, "utf-8"))
        if draw:
            plot = page.with_name("plot.png" if page.stem == "table" else f"{page.stem}.png")
            dpi = 150 if page.stem == "table" else study_report.DPI
            write_plot(plot, draw(), dpi)
    for folder, found in sweeps():
        front_plot.write_plots(folder, found)
    write_small(RESULTS / "students" / "teaser.png", teaser())
