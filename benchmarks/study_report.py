"""Tables and plots of a study: every number the mean over the seeds, with half its range."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from cm_diffusers.evaluation import report, video_report
from cm_diffusers.evaluation.report import Row, Setting, replace_file, write_plot
from cm_diffusers.evaluation.video_report import VideoSetting
from cm_diffusers.measured import BASELINES, REAL, REAL_CLIPS, TEACHER


COLUMNS = {"precision": ("precision", "{:.3f}")} | report.COLUMNS | video_report.COLUMNS
METRICS = {  # of images and of clips, those that have it
    Setting: ("fid", "fid_teacher", "agreement", "precision", "coverage", "recall", "vendi"),
    VideoSetting: (
        "direction_accuracy", "velocity_residual", "static_rate", "fd_frames", "fd_differences", "agreement", "content_drift", "colour_drift",
    ),
}  # fmt: skip
PLOTTED = {
    Setting: ("fid", "coverage", "recall", "vendi"),
    VideoSetting: ("direction_accuracy", "fd_frames", "fd_differences", "content_drift"),
}
DPI = 120
LOGARITHMIC = ("fid", "fd_frames", "fd_differences")
Rows = list[Row]


def write_study(
    folder: Path, tables: dict[str, dict], rows: Rows, setting: Setting | VideoSetting, origins: Mapping[str, dict]
) -> str:
    """Writes NAME.md and NAME.png for each table, and all rows as rows.json; returns the tables.

    Args:
        tables: By name: `variants`, `num_inference_steps`, and what the `plot` is over: "steps", "variants" or "cost".
        rows: Of all pipelines and seeds.
        origins: Of each variant, what its rows were made by.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = rounded(rows)
    made = list(pages(tables, rows, setting))
    for page in made:
        replace_file(folder / f"{page.name}.md", lambda path, text=page.text: path.write_text(text, "utf-8"))
        write_plot(folder / f"{page.name}.png", page.plot(), DPI)
    made_by = {name: origin for name, origin in origins.items() if any(name == _variant(row) for row in rows)}
    numbers = dumped({"setting": asdict(setting), "origins": made_by}, rows)
    replace_file(folder / "rows.json", lambda path: path.write_text(numbers, "utf-8"))
    return "\n".join(page.text for page in made)


def rounded(rows: Rows) -> Rows:
    """With nine digits of every number, which tell float32 numbers apart."""
    return [
        {key: float(f"{value:.9g}") if isinstance(value, float) else value for key, value in row.items()}
        for row in rows
    ]


def dumped(head: dict, rows: Rows) -> str:
    """`head` and its "rows" as JSON, a row a line: what a row more changes is that line."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    return f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n'


class Page(NamedTuple):
    """A table as Markdown, and what draws its plot."""

    name: str
    text: str
    plot: Callable[[], Figure]


def pages(tables: dict[str, dict], rows: Rows, setting: Setting | VideoSetting) -> Iterator[Page]:
    """Arguments as of `write_study`."""
    titles = report.headed(COLUMNS, setting.extractor)
    metrics = {key: titles[key][0] for key in PLOTTED[type(setting)]}
    for name, table in tables.items():
        chosen = [row for row in rows if _belongs(row, table)]
        yield Page(name, markdown(chosen, setting), partial(PLOTS[table["plot"]], chosen, metrics))


def _belongs(row: Row, table: dict) -> bool:
    if row["pipeline"] in BASELINES:
        return True
    return _variant(row) in table["variants"] and row["num_inference_steps"] in table["num_inference_steps"]


def _variant(row: Row) -> str:
    return row.get("variant", row["pipeline"])  # of several gammas


def grouped(rows: Rows, *keys: str) -> dict[tuple, Rows]:
    """Rows with equal values of `keys`, in the order of their first."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return dict(groups)


def spread(rows: Rows, metric: str) -> tuple[float, float] | None:
    """Mean and half the range; None if no row has the number."""
    values = [row[metric] for row in rows if row.get(metric) is not None]
    return (mean(values), (max(values) - min(values)) / 2) if values else None


def markdown(rows: Rows, setting: Setting | VideoSetting) -> str:
    started = any("start_minutes" in row for row in rows)
    metrics = METRICS[type(setting)]
    heads = ["", "seeds", "CPU minutes", *["of its start"] * started, "NFE", "guidance"]
    heads += [report.headed(COLUMNS, setting.extractor)[key][0] for key in metrics]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for (name, steps, guidance), group in grouped(rows, "pipeline", "num_inference_steps", "guidance_scale").items():
        seeds = "–" if name in BASELINES else str(len(group))
        plain = ["–" if value is None else f"{value:g}" for value in (steps, guidance)]
        costs = ["cpu_minutes", *["start_minutes"] * started]
        several = len(group) > 1
        cells = [cell(spread(group, key), COLUMNS[key][1], several) for key in metrics]
        minutes = [cell(spread(group, cost), "{:.0f}", False) for cost in costs]
        lines.append([name, seeds, *minutes, *plain, *cells])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    machines = dict.fromkeys(row.get("hardware", setting.hardware) for row in _of_variants(rows))
    return (
        f"{table}\n\nMean over the seeds ± half the range. {_protocol(setting)} CPU minutes: of the training, on "
        f"{' or '.join(machines or [setting.hardware])}.\n"
    )


def _protocol(setting: Setting | VideoSetting) -> str:
    common = f"all pipelines from the same noise; extractor {setting.extractor}, reference {setting.reference}."
    if isinstance(setting, VideoSetting):
        return (
            f"{setting.num_clips} clips of {setting.num_frames} frames a row, {common} Direction: at least "
            f"{setting.min_speed:g} px per frame; chance is 0.25 for clips that move."
        )
    return (
        f"{setting.num_images} images a row, {common} Coverage of real by real images, expected: "
        f"{setting.coverage_ceiling:.3f}. Vendi: of 10 images of one prompt."
    )


def cell(found: tuple[float, float] | None, form: str, several: bool) -> str:
    if found is None:
        return "–"
    return form.format(found[0]) + (f" ±{form.format(found[1])}" if several else "")


def plot_over_steps(rows: Rows, metrics: Mapping[str, str]) -> Figure:
    """One panel for each metric, key -> title; one line for each variant."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, metric in zip(figure.subplots(2, 2).flat, metrics, strict=True):
        for (name,), group in grouped(_of_variants(rows), "pipeline").items():
            found = _spreads(sorted(group, key=lambda row: row["num_inference_steps"]), "num_inference_steps", metric)
            means, ranges = _split(found)
            axes.errorbar([str(steps) for steps in found], means, ranges, marker="o", capsize=3, label=name)
        _finish(axes, metric, metrics[metric], rows, axes.axhline)
        axes.set_xlabel("NFE (steps)")
    return _legend(figure)


def plot_over_variants(rows: Rows, metrics: Mapping[str, str]) -> Figure:
    """One panel for each metric, one line of dots for each variant, one colour for each number of steps."""
    height = 2 + 0.3 * len(grouped(_of_variants(rows), "pipeline"))
    figure = Figure(figsize=(12, height), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), sharey=True), metrics, strict=True):
        for (steps,), group in grouped(_of_variants(rows), "num_inference_steps").items():
            found = _spreads(group, "pipeline", metric)
            means, ranges = _split(found)
            axes.errorbar(means, list(found), xerr=ranges, fmt="o", capsize=3, label=f"{steps} NFE")
        _finish(axes, metric, metrics[metric], rows, axes.axvline)
    figure.axes[0].invert_yaxis()
    return _legend(figure)


def plot_over_cost(rows: Rows, metrics: Mapping[str, str]) -> Figure:
    """One panel for each metric, a point for each variant; those named alike up to a comma are joined by a line.

    The cost is that of the training and of what it started from.
    """
    figure, ours = Figure(figsize=(12, 9), layout="constrained"), _of_variants(rows)
    ours = [
        row | {"total": row["cpu_minutes"] + (row.get("start_minutes") or 0)} for row in ours if row["cpu_minutes"]
    ]
    ours = [row | {"method": row["pipeline"].partition(", ")[0]} for row in ours]
    for axes, metric in zip(figure.subplots(2, 2).flat, metrics, strict=True):
        for (steps,), of_steps in grouped(ours, "num_inference_steps").items():
            for place, ((method,), group) in enumerate(grouped(of_steps, "method").items()):
                found = [(spread(one, "total"), spread(one, metric)) for one in grouped(group, "pipeline").values()]
                points = sorted((cost[0], *value) for cost, value in found if cost and value)
                style = {"color": f"C{place}", "linestyle": "-" if steps == 1 else "--", "capsize": 3, "marker": "o"}
                x, y, half = zip(*points, strict=True) if points else ((), (), ())
                axes.errorbar(x, y, half, label=f"{method}, {steps} NFE", **style)
        _finish(axes, metric, metrics[metric], rows, axes.axhline)
        axes.set_xlabel("CPU minutes of training, with those of its start")
    return _legend(figure)


def _of_variants(rows: Rows) -> Rows:
    return [row for row in rows if row["pipeline"] not in BASELINES]


def _spreads(rows: Rows, key: str, metric: str) -> dict[object, tuple[float, float]]:
    found = {value: spread(group, metric) for (value,), group in grouped(rows, key).items()}
    return {value: numbers for value, numbers in found.items() if numbers is not None}


def _split(found: dict[object, tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [mean for mean, _ in found.values()], [half for _, half in found.values()]


def _finish(axes: Axes, metric: str, title: str, rows: Rows, line: Callable[..., object]) -> None:
    """The teacher's best effort and real images as lines; these may lie beyond the end of a logarithmic axis."""
    upright = line == axes.axhline
    teacher = sorted((row for row in rows if row["pipeline"] == TEACHER), key=lambda row: row["num_inference_steps"])
    for row in teacher[-1:]:
        if row[metric] is not None:
            line(row[metric], color="grey", linestyle="--", label=f"{TEACHER}, {row['num_inference_steps']} steps")
    if metric in LOGARITHMIC:
        axis = axes.yaxis if upright else axes.xaxis
        (axes.set_yscale if upright else axes.set_xscale)("log")
        low, high = axes.get_ylim() if upright else axes.get_xlim()
        (axes.set_ylim if upright else axes.set_xlim)(low, high)
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(5))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    for row in rows:
        if row["pipeline"] in (REAL, REAL_CLIPS) and row[metric] is not None:
            line(row[metric], color="grey", linestyle=":", label=row["pipeline"])
    axes.set_title(title)
    axes.grid(alpha=0.3)


def _legend(figure: Figure) -> Figure:
    """With a legend of all panels below them, where no point lies."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    return figure


PLOTS = {"steps": plot_over_steps, "variants": plot_over_variants, "cost": plot_over_cost}
