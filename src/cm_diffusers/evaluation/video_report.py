"""What an evaluation of videos leaves behind: a Markdown table, its numbers as JSON, a plot, strips and animations."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image
from torch import Tensor

from cm_diffusers.evaluation.grids import image_grid
from cm_diffusers.evaluation.report import (
    Row,
    filled_columns,
    headed,
    remove_partial,
    replace_file,
    table_json,
    warn_of_few,
    write_plot,
    write_table,
)
from cm_diffusers.markdown import cell
from cm_diffusers.measured import clips_of, too_few


if TYPE_CHECKING:
    from matplotlib.figure import Figure


COLUMNS = {  # key of a row -> heading and format
    "pipeline": ("pipeline", "{}"),
    "num_inference_steps": ("NFE", "{}"),
    "guidance_scale": ("guidance", "{:g}"),
    "direction_accuracy": ("direction accuracy", "{:.3f}"),
    "velocity_residual": ("off constant velocity, px", "{:.2f}"),
    "static_rate": ("static", "{:.3f}"),
    "fd_frames": ("{distance} of frames", "{:.2f}"),
    "fd_differences": ("{distance} of differences", "{:.2f}"),
    "fvd": ("FVD", "{:.1f}"),
    "agreement": ("agreement", "{:.3f}"),
    "content_drift": ("content drift", "{:.3f}"),
    "colour_drift": ("colour drift", "{:.3f}"),
    "mass_change": ("brightness change", "{:.3f}"),
    "seconds_per_clip": ("s/clip", "{:.3f}"),
}
PLOTTED = ("direction_accuracy", "fd_frames", "fd_differences")
FRAME_DURATION = 125  # milliseconds, in animations


@dataclass(frozen=True)
class VideoSetting:
    """What the numbers of a table depend on besides the pipelines.

    Attributes:
        static_threshold: Mean `|x_{f+1} - x_f|` below which a clip counts as static.
    """

    num_clips: int
    num_frames: int
    resolution: int
    seed: int
    extractor: str
    video_extractor: str | None
    crop_zoom: float
    frames_per_clip: int
    min_speed: float
    static_threshold: float
    reference: str
    hardware: str
    dtype: str
    batch_size: int


class Shown(NamedTuple):
    """The first clips (S, F, 3, H, W) of a row of the table."""

    pipeline: str
    label: str
    clips: Tensor


def markdown_table(rows: list[Row], setting: VideoSetting) -> str:
    """The table with the columns that hold a value, and the setting in words below it."""
    few = too_few(setting.num_clips * setting.frames_per_clip, "frames")
    return (
        f"{filled_columns(rows, headed(COLUMNS, setting.extractor))}\n\n"
        + (f"**{few}**\n\n" if few else "")
        + f"{setting.num_clips} clips of {setting.num_frames} frames and {setting.resolution} px, seed "
        f"{setting.seed}, extractor {setting.extractor}, reference {cell(setting.reference)}. Direction: at least "
        f"{setting.min_speed:g} px per frame; chance is 0.25 for clips that move and 0 for static ones. Static: mean frame "
        f"change below {setting.static_threshold:.4f}. Drifts: distance to the first frame, of features and of colours. "
        f"Speed on {setting.hardware}, {setting.dtype}, batch size {setting.batch_size}. "
        "The teacher is sampled by DDIM with trailing timesteps. NFE counts steps: classifier-free guidance runs the network on both branches in each.\n"
    )


def plot(rows: list[Row], setting: VideoSetting) -> "Figure":
    """Direction accuracy and Fréchet distances over steps: one line per pipeline and guidance scale, real ones dotted."""
    from matplotlib.figure import Figure

    keys = [key for key in PLOTTED if any(row.get(key) is not None for row in rows)]
    sampled = [row for row in rows if row["num_inference_steps"] is not None]
    figure = Figure(figsize=(5 * len(keys), 4), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for row in rows:
            if row["num_inference_steps"] is None:
                axes.axhline(row[key], linestyle=":", color="grey", label=row["pipeline"])
        for name, guidance in dict.fromkeys((row["pipeline"], row["guidance_scale"]) for row in sampled):
            points = [row for row in sampled if (row["pipeline"], row["guidance_scale"]) == (name, guidance)]
            points.sort(key=lambda row: row["num_inference_steps"])
            steps, values = zip(*((row["num_inference_steps"], row[key]) for row in points), strict=True)
            axes.plot(steps, values, marker="o", label=f"{name}, guidance {guidance:g}")
        ticks = sorted({row["num_inference_steps"] for row in sampled})
        axes.set(xscale="log", xlabel="NFE (steps)", ylabel=headed(COLUMNS, setting.extractor)[key][0])
        axes.set(yscale="linear" if key == "direction_accuracy" else "log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend()
    warn_of_few(figure, setting.num_clips * setting.frames_per_clip, "frames")
    return figure


def write_report(
    folder: Path,
    rows: list[Row],
    setting: VideoSetting,
    shown: Sequence[Shown],
    prompts: Sequence[str],
    weights: Mapping[str, str | None],
) -> str:
    """Writes `table.md`, `table.json`, `plot.png`, `grid.png` and a GIF of each pipeline; returns the Markdown table.

    The grid has the frames of the first clip of every row of the table; a GIF has a row for each number of steps and
    guidance scale, and a column for each of the first prompts. GIFs of pipelines that only an earlier table there names are taken
    away: they would look like this one's.

    Args:
        weights: As for `table_json`.
    """
    table = markdown_table(rows, setting)
    for name in animations_of(folder / "table.json") - {clips_of(part.pipeline) for part in shown}:
        (folder / name).unlink(missing_ok=True)
    write_table(folder, table, table_json(rows, setting, weights))
    frames = [f"frame {number + 1}" for number in range(setting.num_frames)]
    heads = [f"{prompts[0]}: {frames[0]}", *frames[1:]]
    grid = image_grid([part.clips[0] for part in shown], [part.label for part in shown], heads)
    write_plot(folder / "plot.png", plot(rows, setting), 150)
    replace_file(folder / "grid.png", lambda path: grid.save(path, format="PNG", optimize=True))
    for name in dict.fromkeys(part.pipeline for part in shown):
        write_animation(folder / clips_of(name), [part for part in shown if part.pipeline == name], prompts)
    remove_partial(folder)
    return table


def animations_of(path: Path) -> set[str]:
    """Files of the GIFs that an evaluation's JSON says it made; none where there is no such JSON."""
    try:
        rows = json.loads(path.read_text("utf-8"))["rows"]
        return {clips_of(row["pipeline"]) for row in rows if row["num_inference_steps"] is not None}
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def write_animation(path: Path, shown: Sequence[Shown], prompts: Sequence[str]) -> None:
    """A GIF of `animation`."""
    first, *rest = animation(shown, prompts)
    options = {"save_all": True, "append_images": rest, "duration": FRAME_DURATION, "loop": 0}
    replace_file(path, lambda aside: first.save(aside, "GIF", **options))


def animation(shown: Sequence[Shown], prompts: Sequence[str]) -> list[Image.Image]:
    """F pictures of clips side by side: a row for each of `shown`, a column for each prompt."""
    labels, clips = [part.label for part in shown], [part.clips for part in shown]
    return [image_grid([c[:, f] for c in clips], labels, prompts) for f in range(clips[0].shape[1])]
