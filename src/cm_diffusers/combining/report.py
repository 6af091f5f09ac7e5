"""What a search leaves behind: tables of the search set and of the hold-out, coefficients, and two plots."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cm_diffusers.combining.log import Entry
from cm_diffusers.combining.objective import ObjectiveConfig
from cm_diffusers.combining.runs import FOUND, Verdict
from cm_diffusers.evaluation.report import (
    COLUMNS,
    Row,
    filled_columns,
    hardware,
    headed,
    replace_file,
    warn_of_few,
    write_table,
)
from cm_diffusers.measured import distance_name, too_few
from cm_diffusers.places import public


if TYPE_CHECKING:
    from matplotlib.figure import Figure


SHOWN = {
    "pipeline": ("weights", "{}"),
    **{name: COLUMNS[name] for name in ("num_inference_steps", "fid")},
    "kid": ("KID", "{:.4g}"),
    **{name: COLUMNS[name] for name in ("agreement", "coverage", "recall", "vendi")},
    "precision": ("precision", "{:.3f}"),
    "density": ("density", "{:.3f}"),
}


class Report(NamedTuple):
    """All that the tables tell.

    Attributes:
        config: The objective.
        reference: Where the real images are from.
        steps: Of the snapshots.
        log: Everything that was tried.
        verdict: Of the hold-out.
        shown: Value of the objective -> as tables have it.
    """

    config: ObjectiveConfig
    reference: str
    steps: list[int]
    log: list[Entry]
    verdict: Verdict
    shown: Callable[[float], float]

    @property
    def objective(self) -> str:
        """In words."""
        objective = self.config.objective
        name = distance_name(self.config.feature_extractor) if objective == "fid" else objective
        return " + ".join(
            f"{weight:.3g} {name} in {steps} step{'s' if steps > 1 else ''}"
            for steps, weight in self.config.weights.items()
        )

    @property
    def conclusion(self) -> str:
        """Whether the found combination is published, and why."""
        verdict = self.verdict
        found, best = self.shown(verdict.contenders[-1].value), self.shown(verdict.best.value)
        measured = (
            f"on the hold-out its objective is {found:.4g}, that of the best baseline, {verdict.best.name}, {best:.4g}, and it is "
            f"better in {verdict.share:.1%} of {self.config.bootstrap_samples} resamples ({self.config.confidence:.0%} are asked for)"
        )
        if verdict.accepted:
            return f"The found combination is published: {measured}."
        return f"The found combination is NOT accepted, and {verdict.best.name} is published instead: {measured}."

    def rows(self, holdout: bool) -> list[Row]:
        return [
            {"pipeline": one.name, **row}
            for one in self.verdict.contenders
            for row in (one.rows if holdout else one.entry.rows)
        ]

    @property
    def text(self) -> str:
        """Markdown."""
        config, columns = self.config, headed(SHOWN, self.config.feature_extractor)
        searched = [entry for entry in self.log if entry.name == FOUND]
        sums = [
            {"pipeline": one.name, "search": self.shown(one.entry.value), "holdout": self.shown(one.value)}
            for one in self.verdict.contenders
        ]
        heads = {"pipeline": ("weights", "{}"), "search": ("search set", "{:.4g}"), "holdout": ("hold-out", "{:.4g}")}
        few = too_few(config.num_images)
        parts = [
            self.conclusion,
            f"## Objective: {self.objective}",
            filled_columns(sums, heads),
            "## On the search set",
            filled_columns(self.rows(False), columns),
            "## On the hold-out",
            filled_columns(self.rows(True), columns),
            "## Coefficients",
            self.coefficients,
            *([f"**{few}**"] if few else []),
            f"{len(self.log)} evaluations, {len(searched)} of them of the search, took "
            f"{sum(entry.seconds for entry in self.log) / 60:.1f} minutes on {hardware()}. {config.num_images} images a row, seeds "
            f"from {config.seed} on, of the hold-out from {config.of_holdout}; extractor {public(config.feature_extractor)}, reference "
            f"{self.reference}, {config.dtype}.",
        ]
        return "\n\n".join(parts) + "\n"

    @property
    def coefficients(self) -> str:
        names = [one.name for one in self.verdict.contenders]
        vectors = [one.entry.vector for one in self.verdict.contenders]
        rows = [
            {"step": step, **dict(zip(names, of_step, strict=True))}
            for step, *of_step in zip(self.steps, *vectors, strict=True)
        ]
        return filled_columns(rows, {"step": ("step", "{}")} | {name: (name, "{:.4f}") for name in names})

    @property
    def numbers(self) -> str:
        """JSON."""
        verdict = self.verdict
        content = {
            "conclusion": self.conclusion,
            "accepted": verdict.accepted,
            "published": verdict.published.name,
            "share_of_resamples": verdict.share,
            "objective": self.objective,
            "steps": self.steps,
            "weights": {one.name: one.entry.vector for one in verdict.contenders},
            "search_set": self.rows(False),
            "holdout": self.rows(True),
            "evaluations": len(self.log),
            "minutes": sum(entry.seconds for entry in self.log) / 60,
            "hardware": hardware(),
        }
        return json.dumps(content, indent=1) + "\n"


def write_report(report: Report, folder: Path) -> None:
    """Writes `table.md`, `table.json`, `coefficients.png` and `history.png`."""
    write_table(folder, report.text, report.numbers)
    for name, draw in (("coefficients", plot_coefficients), ("history", plot_history)):
        replace_file(folder / f"{name}.png", lambda path, draw=draw: draw(report).savefig(path, dpi=150, format="png"))


def plot_coefficients(report: Report) -> "Figure":
    """Of the best baseline and the found combination, over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for one in (report.verdict.best, report.verdict.contenders[-1]):
        axes.plot(report.steps, one.entry.vector, marker="o", label=one.name)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="step of the snapshot", ylabel="coefficient")
    axes.legend()
    return figure


def plot_history(report: Report) -> "Figure":
    """The objective of all that was tried, and the best until then."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    values = np.array([entry.value for entry in report.log])
    known = [i for i, entry in enumerate(report.log) if entry.name != FOUND]
    least = values[known].min()
    shown = np.vectorize(report.shown)
    axes.plot(shown(np.minimum.accumulate(values)), color="black", label="best so far")
    axes.plot(known, shown(values[known]), "s", markersize=3, label="baselines")
    tried = [i for i in range(len(values)) if i not in known]
    axes.plot(tried, shown(values[tried]), ".", markersize=3, label="search")
    axes.axhline(report.shown(least), linestyle=":", color="grey", label="best baseline")
    axes.set(xlabel="evaluation", ylabel="objective on the search set")
    axes.set_title(report.objective, fontsize=8, wrap=True)
    axes.legend()
    warn_of_few(figure, report.config.num_images)
    return figure
