"""What an evaluation leaves behind: a Markdown table, its numbers as JSON, a plot and a grid."""

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from cm_diffusers.errors import UserError
from cm_diffusers.markdown import cell
from cm_diffusers.measured import BASELINES, distance_name, run_name, too_few


if TYPE_CHECKING:
    from matplotlib.figure import Figure


Row = dict[str, str | int | float | None]
Keep = Callable[[list[Row]], object]  # what is to be done with all rows so far after each
PARTIAL = "partial"  # folder with the rows of an evaluation that has not ended

COLUMNS = {  # key of a row -> heading, where the distance on the extractor's features is named, and format
    "pipeline": ("pipeline", "{}"),
    "num_inference_steps": ("NFE", "{}"),
    "guidance_scale": ("guidance", "{:g}"),
    "fid": ("{distance} to data", "{:.2f}"),
    "fid_teacher": ("{distance} to teacher", "{:.2f}"),
    "agreement": ("agreement", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "vendi": ("Vendi", "{:.2f}"),
    "clip_score": ("CLIP score", "{:.2f}"),
    "images_per_second": ("images/s", "{:.1f}"),
    "ms_per_image": ("ms/image", "{:.1f}"),
}


@dataclass(frozen=True)
class Setting:
    """What the numbers of a table depend on besides the pipelines."""

    num_images: int
    seed: int
    extractor: str
    reference: str
    hardware: str
    dtype: str
    batch_size: int
    coverage_ceiling: float


def forget(rows: list[Row]) -> None:
    """Keeps nothing until the end."""


def hardware() -> str:
    """The accelerator, or the CPU's name and threads; and the version of torch."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.is_file() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        device = f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"
    return f"{device}, torch {torch.__version__}"


def row_names(sources: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """What the rows of pipelines are called: as told, or after their runs.

    Raises:
        ValueError: Not a name for each, or two rows would have one name.
    """
    chosen = list(names or map(run_name, sources))
    if len(chosen) != len(sources):
        raise UserError(f"--names gives {len(chosen)} names for {len(sources)} pipelines: give one each.")
    refuse_one_name(chosen)
    return chosen


def refuse_one_name(names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: Two rows would have one name, or one that of real images or of the teacher.
    """
    if baselines := [name for name in names if name in BASELINES]:
        raise UserError(f"{baselines[0]!r} is what a baseline's rows are called: give another name by --names.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"Two rows would be called {twice[0]}: give each pipeline a name of its own by --names.")


def headed(columns: Mapping[str, tuple[str, str]], extractor: str) -> dict[str, tuple[str, str]]:
    """The columns with the name of the Fréchet distance on these features in their headings."""
    distance = distance_name(extractor)
    return {key: (heading.format(distance=distance), form) for key, (heading, form) in columns.items()}


def filled_columns(rows: list[Row], columns: Mapping[str, tuple[str, str]]) -> str:
    """A Markdown table of the columns, key -> heading and format, in which some row has a value."""
    keys = [key for key in columns if any(row.get(key) is not None for row in rows)]
    lines = [[columns[key][0] for key in keys], ["---"] + ["---:"] * (len(keys) - 1)]
    lines += [
        ["–" if row.get(key) is None else cell(columns[key][1].format(row[key])) for key in keys] for row in rows
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_table(rows: list[Row], setting: Setting) -> str:
    """The table with the columns that hold a value, warnings, and the setting in words below it."""
    sizes = sorted({row["resolution"] for row in rows if row.get("resolution")})
    columns = headed(COLUMNS, setting.extractor) | ({"resolution": ("px", "{}")} if len(sizes) > 1 else {})
    warnings = [OF_SIZES] * (len(sizes) > 1) + ([few] if (few := too_few(setting.num_images)) else [])
    return (
        f"{filled_columns(rows, columns)}\n\n"
        + "".join(f"**{warning}**\n\n" for warning in warnings)
        + f"{setting.num_images} images, seed {setting.seed}, extractor {setting.extractor}, "
        f"reference {cell(setting.reference)}. Coverage of real by real images: {setting.coverage_ceiling:.3f}. "
        f"Speed on {setting.hardware}, {setting.dtype}, batch size {setting.batch_size}. "
        "NFE counts steps: classifier-free guidance runs the network on both branches in each.\n"
    )


OF_SIZES = (
    "Rows have images of different sizes (px), which the extractor brings to one: distances and speed compare them only "
    "roughly; --resolution draws all at one."
)


def plot(rows: list[Row], setting: Setting) -> "Figure":
    """Fréchet distance to the data over steps, both logarithmic: one line per pipeline and guidance scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["num_inference_steps"] is None:
            axes.axhline(row["fid"], linestyle=":", color="grey", label=row["pipeline"])
        else:
            lines.setdefault((row["pipeline"], row["guidance_scale"]), []).append(row)
    for (name, guidance), points in lines.items():
        points = sorted(points, key=lambda row: row["num_inference_steps"])
        steps = [row["num_inference_steps"] for row in points]
        label = name if guidance is None else f"{name}, guidance {guidance:g}"
        axes.plot(steps, [row["fid"] for row in points], marker="o", label=label)
    ticks = sorted({row["num_inference_steps"] for points in lines.values() for row in points})
    axes.set(xscale="log", yscale="log", xlabel="NFE (steps)", ylabel=headed(COLUMNS, setting.extractor)["fid"][0])
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    warn_of_few(figure, setting.num_images)
    return figure


def warn_of_few(figure: "Figure", count: int, what: str = "images") -> None:
    """Says above a plot of Fréchet distances that these are too few, if they are."""
    if too_few(count):
        figure.suptitle(f"{count} {what}: too few for Fréchet distances to be compared", color="firebrick", fontsize=9)


def table_json(rows: list[Row], setting: object, weights: Mapping[str, str | None]) -> str:
    """What `read_measured` reads.

    Args:
        setting: Dataclass.
        weights: Name of each pipeline and the digest of its weights; None where they are not here.
    """
    known = {name: digest for name, digest in weights.items() if digest is not None}
    return json.dumps({"setting": asdict(setting), "rows": rows, "weights": known}, indent=1) + "\n"


def write_report(
    folder: Path, rows: list[Row], setting: Setting, grid: Image.Image, weights: Mapping[str, str | None]
) -> str:
    """Writes `table.md`, `table.json`, `grid.png` and `plot.png`; returns the Markdown table.

    Args:
        weights: As for `table_json`.
    """
    table = markdown_table(rows, setting)
    write_table(folder, table, table_json(rows, setting, weights))
    replace_file(folder / "grid.png", lambda path: grid.save(path, format="PNG", optimize=True))
    write_plot(folder / "plot.png", plot(rows, setting), 150)
    remove_partial(folder)
    return table


def write_table(folder: Path, table: str, numbers: str) -> None:
    """`table.md` and `table.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "table.md", lambda path: path.write_text(table, "utf-8"))
    replace_file(folder / "table.json", lambda path: path.write_text(numbers, "utf-8"))


def remove_partial(folder: Path) -> None:
    """The table of the rows so far, when that of all is written."""
    for name in ("table.md", "table.json"):
        (folder / PARTIAL / name).unlink(missing_ok=True)
    if (folder / PARTIAL).is_dir() and not any((folder / PARTIAL).iterdir()):
        (folder / PARTIAL).rmdir()


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Has a file written aside and puts it in place whole."""
    aside = path.with_name(f".{path.name}.partial")
    write(aside)
    os.replace(aside, path)


def write_plot(path: Path, figure: "Figure", dpi: int) -> None:
    """See `write_small`."""
    whole = BytesIO()
    figure.savefig(whole, dpi=dpi, format="png")
    with Image.open(whole) as image:
        write_small(path, image)


def write_small(path: Path, image: Image.Image) -> None:
    """As PNG of at most 256 colours, a third of the bytes of all."""
    few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    replace_file(path, lambda aside: few.save(aside, format="PNG", optimize=True))
