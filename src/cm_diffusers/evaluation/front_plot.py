"""Plots of the fronts of a sweep: a panel for each two of their columns."""

from collections.abc import Sequence
from colorsys import hsv_to_rgb
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cm_diffusers.evaluation.front_report import HIGH, KNOBS, LOW, Front, Report, turned, values_of
from cm_diffusers.evaluation.fronts import non_dominated
from cm_diffusers.evaluation.report import Row, write_plot
from cm_diffusers.measured import TEACHER


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # of Okabe and Ito
GREY = "#777777"  # the teacher's
# The letter of a knob, and what it is.
MARKS = {"guidance_scale": "g guidance", "gamma": "γ gamma", "lora_scale": "L scale of the LoRA"}
SIDES = (  # of a point: offset of a text, and which of its corners that is
    ((6, 2), "left", "bottom"),
    ((-6, 2), "right", "bottom"),
    ((6, -2), "left", "top"),
    ((-6, -2), "right", "top"),
)


def write_plots(folder: Path, report: Report) -> None:
    """A file for each front."""
    for front in report.fronts:
        write_plot(folder / front.file, plot(report, front), 150)


def pairs(front: Front) -> list[tuple[str, str]]:
    """Columns across and up of the panels that show a front."""
    return list(combinations(front.axes, 2))


def plot(report: Report, front: Front) -> "Figure":
    """A panel for each pair of a front's columns, better to the right and up, with the front of the pair as a line."""
    from matplotlib.figure import Figure

    panels = pairs(front)
    figure = Figure(figsize=(5.6 * len(panels), 5), layout="constrained")
    figure.subplots(1, len(panels))
    on = [_panel(axes, report, front, pair) for axes, pair in zip(figure.get_axes(), panels, strict=True)]
    figure.get_axes()[0].legend(fontsize="small")
    knobs = [mark for key, mark in MARKS.items() if any(row.get(key) is not None for row in report.rows)]
    words = f"{front.caption(report.columns)}. Beside points: {', '.join(['steps', *knobs])}"
    figure.supxlabel(plain(words), fontsize="small", wrap=True)
    figure.draw_without_rendering()  # now it is known where everything is
    for axes, pair, places in zip(figure.get_axes(), panels, on, strict=True):
        rows = [report.rows[place] for place in places]
        _name(axes, [marked(row, turned(report.rows, row)) for row in rows], values_of(rows, pair))
    return figure


def plain(text: str) -> str:
    """A text that matplotlib shows as it is, dollars included."""
    return text.replace("$", r"\$")


def _panel(axes: "Axes", report: Report, front: Front, pair: tuple[str, str]) -> np.ndarray:
    """Draws all but the knobs; numbers of the rows on the front of the pair, in its order."""
    values, better = values_of(report.rows, pair), [report.columns[key].better for key in pair]
    on = np.flatnonzero(non_dominated(values, better))
    on = on[np.argsort(values[on, 0])]
    best = [*set(on.tolist()).union(front.members if len(front.axes) > 2 else ())]
    for name, colour in colours(report.rows).items():
        own = [place for place, row in enumerate(report.rows) if row["pipeline"] == name]
        style = {"color": colour, "marker": "s" if name == TEACHER else "o", "s": 24, "zorder": 2}
        axes.scatter(*values[own].T, **style, alpha=0.35, linewidths=0)
        axes.scatter(*values[[place for place in best if place in own]].T, **style, label=plain(name))
        for line in curves([report.rows[place] for place in own], pair) if name == TEACHER else []:
            axes.plot(*line.T, color=colour, linestyle="--", linewidth=1, zorder=1)
        _intervals(axes, [report.rows[place] for place in best if place in own], pair, colour)
    if len(front.axes) > 2:
        axes.scatter(
            *values[list(front.members)].T, s=90, facecolors="none", edgecolors="black", linewidths=1, zorder=3
        )
    axes.plot(*values[on].T, color="black", linewidth=0.8, zorder=1)
    axes.set(**dict(zip(("xlim", "ylim"), limits(report.rows, pair).T.tolist(), strict=True)))
    for key, way, invert, label in zip(
        pair, better, (axes.invert_xaxis, axes.invert_yaxis), (axes.set_xlabel, axes.set_ylabel), strict=True
    ):
        label(f"{plain(report.columns[key].heading)} ({'less' if way == 'min' else 'more'} is better)")
        if way == "min":
            invert()
    axes.grid(alpha=0.3)
    return on


def limits(rows: Sequence[Row], pair: tuple[str, str]) -> np.ndarray:
    """Ends (2, 2) of the two axes, so that the points of all pipelines are seen well; the teacher's far ones may lie outside."""
    values = values_of([row for row in rows if row["pipeline"] != TEACHER] or rows, pair)
    values = values[np.isfinite(values).all(1)]
    low, high = (values.min(0), values.max(0)) if len(values) else (np.zeros(2), np.ones(2))
    margin = np.where(high > low, 0.08 * (high - low), 0.08 * np.abs(high) + 0.01)
    return np.stack([low - margin, high + margin])


def marked(row: Row, keys: set[str]) -> str:
    """The knobs of a row that are named, as short as can be."""
    steps = [str(row["num_inference_steps"])] if "num_inference_steps" in keys else []
    others = [mark[0] + f"{row[key]:g}" for key, mark in MARKS.items() if key in keys and row.get(key) is not None]
    return " ".join([*steps, *others])


def _name(axes: "Axes", words: Sequence[str], points: np.ndarray) -> None:
    """Beside each point where there is room, on whichever side; the page names them all."""
    from matplotlib.transforms import Bbox

    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axes.transData.transform(points)]
    for text, point in zip(words, points, strict=True):
        for place, across, up in SIDES:
            note = axes.annotate(text, point, place, textcoords="offset points", ha=across, va=up, fontsize=6)
            box = note.get_window_extent()
            if box.count_overlaps(taken) == 0 and axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1):
                taken.append(box)
                break
            note.remove()


def _intervals(axes: "Axes", rows: Sequence[Row], pair: tuple[str, str], colour: str) -> None:
    for row in rows:
        x, y = (row.get(key) for key in pair)
        ends = [[row.get(key + end) for end in (LOW, HIGH)] for key in pair]
        if None not in (x, y, *ends[0]):
            axes.plot(ends[0], [y, y], color=colour, alpha=0.25, linewidth=1, zorder=0)
        if None not in (x, y, *ends[1]):
            axes.plot([x, x], ends[1], color=colour, alpha=0.25, linewidth=1, zorder=0)


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """Of each pipeline, all different; grey of the teacher."""
    names = [name for name in dict.fromkeys(row["pipeline"] for row in rows) if name != TEACHER]
    hues = [hsv_to_rgb(place / len(names), 0.9, 0.75) for place in range(len(names))]
    rainbow = ["#" + "".join(f"{round(255 * part):02x}" for part in hue) for hue in hues]
    taught = {TEACHER: GREY} if any(row["pipeline"] == TEACHER for row in rows) else {}
    return taught | dict(zip(names, COLOURS if len(names) <= len(COLOURS) else rainbow, strict=False))


def curves(rows: Sequence[Row], pair: tuple[str, str]) -> list[np.ndarray]:
    """Lines (steps, 2) through rows that differ in steps alone, by steps."""
    lines: dict[tuple, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["num_inference_steps"]):
        lines.setdefault(tuple(row[key] for key in KNOBS if key != "num_inference_steps"), []).append(row)
    return [values_of(line, pair) for line in lines.values()]
