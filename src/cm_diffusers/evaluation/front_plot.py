"""Plots of the fronts of a sweep: a panel for each two of their columns."""

from collections.abc import Sequence
from colorsys import hsv_to_rgb
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cm_diffusers.evaluation.front_report import HIGH, KNOBS, LOW, Front, Report, in_words, turned, values_of
from cm_diffusers.evaluation.fronts import non_dominated
from cm_diffusers.evaluation.report import Row, replace_file
from cm_diffusers.measured import TEACHER


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # of Okabe and Ito
GREY = "#777777"  # the teacher's


def write_plots(folder: Path, report: Report) -> None:
    """A file for each front."""
    for front in report.fronts:
        figure = plot(report, front)
        replace_file(folder / front.file, lambda path, figure=figure: figure.savefig(path, dpi=150, format="png"))


def pairs(front: Front) -> list[tuple[str, str]]:
    """Columns across and up of the panels that show a front."""
    return list(combinations(front.axes, 2))


def plot(report: Report, front: Front) -> "Figure":
    """A panel for each pair of a front's columns, better to the right and up, with the front of the pair as a line."""
    from matplotlib.figure import Figure

    panels = pairs(front)
    figure = Figure(figsize=(5.6 * len(panels), 5), layout="constrained")
    for axes, pair in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, report, front, pair)
    figure.get_axes()[0].legend(fontsize="small")
    figure.supxlabel(plain(front.caption(report.columns)), fontsize="small", wrap=True)
    return figure


def plain(text: str) -> str:
    """A text that matplotlib shows as it is, dollars included."""
    return text.replace("$", r"\$")


def _panel(axes: "Axes", report: Report, front: Front, pair: tuple[str, str]) -> None:
    values, better = values_of(report.rows, pair), [report.columns[key].better for key in pair]
    for name, colour in colours(report.rows).items():
        own = [place for place, row in enumerate(report.rows) if row["pipeline"] == name]
        style = {"color": colour, "label": plain(name), "marker": "s" if name == TEACHER else "o"}
        axes.scatter(*values[own].T, **style, s=24, zorder=2)
        for line in curves([report.rows[place] for place in own], pair) if name == TEACHER else []:
            axes.plot(*line.T, color=colour, linestyle="--", linewidth=1, zorder=1)
        _intervals(axes, [report.rows[place] for place in own], pair, colour)
    if len(front.axes) > 2:
        axes.scatter(
            *values[list(front.members)].T, s=90, facecolors="none", edgecolors="black", linewidths=1, zorder=3
        )
    on = np.flatnonzero(non_dominated(values, better))
    axes.plot(*values[on[np.argsort(values[on, 0])]].T, color="black", linewidth=0.8, zorder=1)
    for key, way, invert, label in zip(
        pair, better, (axes.invert_xaxis, axes.invert_yaxis), (axes.set_xlabel, axes.set_ylabel), strict=True
    ):
        label(f"{plain(report.columns[key].heading)} ({'less' if way == 'min' else 'more'} is better)")
        if way == "min":
            invert()
    axes.grid(alpha=0.3)
    for turn, place in enumerate(on[np.argsort(values[on, 0])]):
        row = report.rows[place]
        _name(axes, in_words(row, turned(report.rows, row)), values[place], (3, -7)[turn % 2])


def _name(axes: "Axes", words: str, point: np.ndarray, rise: float) -> None:
    """Beside a point, on the side where there is room."""
    right = axes.transAxes.inverted().transform(axes.transData.transform(point))[0] > 0.5
    style = {"textcoords": "offset points", "ha": "right" if right else "left", "fontsize": 6}
    axes.annotate(words, point, (-6 if right else 6, rise), **style)


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
