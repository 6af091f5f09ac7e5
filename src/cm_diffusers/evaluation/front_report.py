"""What a sweep leaves behind: its fronts, and tables in JSON, CSV and Markdown."""

import csv
import io
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
from torch import Tensor

from cm_diffusers.evaluation import metrics
from cm_diffusers.evaluation.front_columns import Column
from cm_diffusers.evaluation.front_points import Measured
from cm_diffusers.evaluation.fronts import Better, hypervolume, non_dominated, worst
from cm_diffusers.evaluation.report import OF_SIZES, Row, filled_columns, replace_file, write_table
from cm_diffusers.evaluation.sweep import SHOWN_PROMPTS, Sweep
from cm_diffusers.markdown import cell
from cm_diffusers.measured import too_few
from cm_diffusers.places import public


KNOBS = {  # key of a row -> heading, form in tables, and form in words
    "pipeline": ("pipeline", "{}", "{}"),
    "num_inference_steps": ("steps", "{}", "{} steps"),
    "guidance_scale": ("guidance", "{:g}", "guidance {:g}"),
    "gamma": ("gamma", "{:g}", "gamma {:g}"),
    "lora_scale": ("LoRA scale", "{:g}", "LoRA {:g}"),
}
LOW, HIGH = "_low", "_high"  # behind a column's name: ends of its interval


@dataclass(frozen=True)
class Front:
    """A Pareto front of a table's rows.

    Attributes:
        axes: Two or three columns.
        better: Which way of each.
        members: Numbers of the rows on it.
        reference_point: Where its hypervolumes end, in each column; NaN where no row has all of them.
        hypervolume: Of all rows.
        hypervolumes: Of the rows of each pipeline.
    """

    axes: tuple[str, ...]
    better: tuple[Better, ...]
    members: tuple[int, ...]
    reference_point: tuple[float, ...]
    hypervolume: float
    hypervolumes: dict[str, float]

    @classmethod
    def of(
        cls, rows: Sequence[Row], axes: Sequence[str], columns: Mapping[str, Column], given: Mapping[str, float]
    ) -> Self:
        """
        Args:
            given: Values of the reference point; of other columns it is the worst value of the rows that have all of them.
        """
        better = tuple(columns[key].better for key in axes)
        values = values_of(rows, axes)
        end = np.array([given.get(key, bad) for key, bad in zip(axes, worst(values, better), strict=True)])
        volumes = {}
        for name in dict.fromkeys(row["pipeline"] for row in rows):
            own = [row["pipeline"] == name for row in rows]
            volumes[name] = hypervolume(values[own], better, end)
        members = tuple(np.flatnonzero(non_dominated(values, better)).tolist())
        return cls(tuple(axes), better, members, tuple(end.tolist()), hypervolume(values, better, end), volumes)

    @property
    def file(self) -> str:
        """Of its plot."""
        return plot_file(self.axes)

    def caption(self, columns: Mapping[str, Column]) -> str:
        point = zip(self.axes, self.reference_point, strict=True)
        words = ", ".join(f"{columns[key].heading} {value:.4g}" for key, value in point)
        many = f"; ringed: no other is better in all {len(self.axes)}" if len(self.axes) > 2 else ""
        return f"Hypervolume {self.hypervolume:.4g} from the reference point ({words}){many}"


@dataclass(frozen=True)
class Report:
    """All that tables, plots and page show.

    Attributes:
        rows: A row for each point: knobs, columns, and the ends of their intervals.
        shown: Images of each row (P, E, 3, h, w) in bytes: of P prompts, E of each.
        prompts: The P texts; none where the reference has none.
        columns: Those that a row has.
        fronts: Those asked for.
        setting: What the numbers depend on.
        digests: Of each pipeline, by its name: of all that decides on its images.
    """

    rows: list[Row]
    shown: list[Tensor]
    prompts: list[str]
    columns: dict[str, Column]
    fronts: list[Front]
    setting: dict[str, object]
    digests: dict[str, str]

    def marks(self, place: int) -> str:
        """Numbers of the fronts that a row is on."""
        return " ".join(str(number) for number, front in enumerate(self.fronts, 1) if place in front.members)

    @classmethod
    def of(cls, sweep: Sweep, found: Sequence[Measured]) -> Self:
        rows = [row_of(one) for one in found]
        columns = filled(sweep.columns, rows)
        fronts = [Front.of(rows, axes, sweep.columns, sweep.reference_point) for axes in sweep.axes]
        texts = (sweep.judging.texts or [])[:: sweep.config.images_per_prompt][:SHOWN_PROMPTS]
        digests = {one.point.pipeline: sweep.digests[one.point.source] for one in found}
        setting = setting_of(sweep) | {"speed": "; ".join(sorted({one.machine for one in found}))}
        return cls(rows, [one.shown for one in found], texts, columns, fronts, setting, digests)


def filled(columns: Mapping[str, Column], rows: Sequence[Row]) -> dict[str, Column]:
    """Those that a row has."""
    return {key: one for key, one in columns.items() if any(row.get(key) is not None for row in rows)}


def row_of(found: Measured) -> Row:
    """Knobs, columns and ends of intervals; what is not a number is None."""
    row: Row = dict(found.point.knobs)
    for key, values in found.columns.items():
        named = zip((key, key + LOW, key + HIGH), values, strict=False)
        row |= {name: value if math.isfinite(value) else None for name, value in named}
    return row


def values_of(rows: Sequence[Row], axes: Sequence[str]) -> np.ndarray:
    """The columns (N, A); NaN where a row has none."""
    return np.array([[math.nan if row.get(key) is None else row[key] for key in axes] for row in rows], dtype=float)


def setting_of(sweep: Sweep) -> dict[str, object]:
    config, count = sweep.config, len(sweep.asked.labels)
    named = {name: public(getattr(config, name)) for name in ("clip_model", "cmmd_model", "rewards")}
    return {
        "num_prompts": sweep.num_prompts,
        "images_per_prompt": config.images_per_prompt,
        "num_real_images": sweep.num_real,
        "seed": config.seed,
        "extractor": public(config.feature_extractor),
        **named,
        "reference": public(sweep.data.dataset_name or sweep.data.train_data_dir),
        "dtype": config.dtype,
        "neighbours": metrics.NEIGHBOURS,
        "coverage_ceiling": metrics.coverage_ceiling(sweep.num_real, count),
        "bootstrap_samples": config.bootstrap_samples,
    }


def in_words(row: Row, keys: Collection[str] = tuple(KNOBS)) -> str:
    """The knobs of a row, or those that are named."""
    return ", ".join(KNOBS[key][2].format(row[key]) for key in KNOBS if key in keys and row.get(key) is not None)


def turned(rows: Sequence[Row], row: Row) -> set[str]:
    """The knobs, but the pipeline, that are not alike in all rows of a row's pipeline."""
    own = [other for other in rows if other["pipeline"] == row["pipeline"]]
    return {key for key in KNOBS if len({other[key] for other in own}) > 1}


def number(row: Row, key: str, column: Column) -> str:
    """A column of a row with its interval."""
    if row.get(key) is None:
        return "–"
    ends = [row.get(key + end) for end in (LOW, HIGH)]
    interval = "" if None in ends else " ({} to {})".format(*map(column.form.format, ends))
    return column.form.format(row[key]) + interval


def markdown(report: Report) -> str:
    """The table, in which fronts have numbers, the fronts, and what the numbers depend on."""
    headings = {key: (heading, form) for key, (heading, form, _) in KNOBS.items()}
    headings |= {key: (cell(one.heading), one.form) for key, one in report.columns.items() if key not in KNOBS}
    sizes = {row["resolution"] for row in report.rows}
    headings |= {"resolution": ("px", "{}")} if len(sizes) > 1 else {}
    marked = [row | {"fronts": report.marks(place) or None} for place, row in enumerate(report.rows)]
    few = too_few(report.setting["num_prompts"] * report.setting["images_per_prompt"])
    warnings = [OF_SIZES] * (len(sizes) > 1) + [few] * (few is not None)
    parts = [filled_columns(marked, headings | {"fronts": ("on front", "{}")}), *(f"**{one}**" for one in warnings)]
    for place, front in enumerate(report.fronts, 1):
        own = ", ".join(f"{cell(name)} {volume:.4g}" for name, volume in front.hypervolumes.items())
        parts.append(f"Front {place}: {cell(front.caption(report.columns))}. Of each pipeline alone: {own}.")
    return "\n\n".join([*parts, cell(setting_words(report.setting))]) + "\n"


def setting_words(setting: Mapping[str, object]) -> str:
    """What the numbers depend on."""
    images = (
        f"{setting['images_per_prompt']} images of each of {setting['num_prompts']} prompts, seed {setting['seed']}"
    )
    extractors = f"extractor {setting['extractor']}"
    for name, words in {"clip_model": "CLIP score by", "cmmd_model": "CMMD by"}.items():
        extractors += f", {words} {setting[name]}" if setting[name] else ""
    if setting["bootstrap_samples"]:
        images += f", intervals of {setting['bootstrap_samples']} resamples of prompts"
    return (
        f"{images}; {extractors}; {setting['num_real_images']} real images of {setting['reference']}; neighbour "
        f"metrics with k = {setting['neighbours']}, coverage of real by real images {setting['coverage_ceiling']:.3f}. Speed on "
        f"{setting['speed']}. A step with guidance by a second pass takes two evaluations of the network, any other one."
    )


def comma_separated(report: Report) -> str:
    """The rows as CSV, with a column `front N` for each front: 1 where a row is on it, else 0."""
    text, keys = io.StringIO(), list(dict.fromkeys([*KNOBS, *(key for row in report.rows for key in row)]))
    marks = [f"front {place}" for place in range(1, len(report.fronts) + 1)]
    writer = csv.DictWriter(text, [*keys, *marks], lineterminator="\n")
    writer.writeheader()
    for place, row in enumerate(report.rows):
        on = [int(place in front.members) for front in report.fronts]
        writer.writerow(row | dict(zip(marks, on, strict=True)))
    return text.getvalue()


def as_json(report: Report) -> str:
    """Setting, rows, fronts by the rows' numbers, and digests of the pipelines."""
    fronts = [asdict(front) for front in report.fronts]
    content = {"setting": report.setting, "rows": report.rows, "fronts": fronts, "pipelines": report.digests}
    return json.dumps(content, indent=1) + "\n"


def write_tables(folder: Path, report: Report) -> str:
    """Writes `table.md`, `table.json` and `table.csv`; returns the Markdown.

    Plots that the table there names and this one does not are taken away before it is overwritten: they would look like
    this sweep's.
    """
    table = markdown(report)
    for name in plots_of(folder / "table.json") - {front.file for front in report.fronts}:
        (folder / name).unlink(missing_ok=True)
    write_table(folder, table, as_json(report))
    replace_file(folder / "table.csv", lambda path: path.write_text(comma_separated(report), "utf-8"))
    return table


def plots_of(path: Path) -> set[str]:
    """Files of the plots that a sweep's JSON says it made; none where there is no such JSON."""
    try:
        return {plot_file(front["axes"]) for front in json.loads(path.read_text("utf-8"))["fronts"]}
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def plot_file(axes: Sequence[str]) -> str:
    return "front_" + "_".join(re.sub(r"[^\w.-]+", "-", key) for key in axes) + ".png"
