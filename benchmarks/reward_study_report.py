"""Table, curves and grid of a study of reward fine-tuning; every number is the mean over the seeds, with half its range."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from study_report import dumped, grouped, rounded, spread
from torch import Tensor

from cm_diffusers.evaluation.grids import image_grid
from cm_diffusers.evaluation.report import Row, filled_columns, replace_file, write_plot
from cm_diffusers.measured import distance_name


WINDOW = 5  # roll-outs of a running mean
GRID_COLUMNS = 10
COLUMNS = {  # of a reward's block: key -> heading and format
    "method": ("", "{}"),
    "seeds": ("seeds", "{}"),
    "steps": ("steps", "{}"),
    "reward": ("reward before → after", "{}"),
    "agreement": ("agreement before → after", "{}"),
    "vendi": ("Vendi before → after", "{}"),
    "fid": ("{distance} before → after", "{}"),
    "passes": ("network evaluations", "{}"),
    "cpu_minutes": ("CPU minutes", "{}"),
    "reached_passes": ("evaluations to {baseline}'s best reward", "{}"),
    "share_passes": ("share of {baseline}'s", "{}"),
    "share_seconds": ("share of its time", "{}"),
}
FORMATS = {"reward": "{:.3f}", "agreement": "{:.3f}", "vendi": "{:.2f}", "fid": "{:.1f}"}
Rollouts = list[dict[str, float]]  # of rewards.json


@dataclass(frozen=True)
class Setting:
    """What the numbers depend on besides the trainings."""

    num_images: int
    seed: int
    extractor: str
    reference: str
    hardware: str


class Run(NamedTuple):
    """A finished training.

    Attributes:
        row: `method`, `reward`, `seed`, `steps`, `cpu_minutes`, and each of `FORMATS` with _before and _after.
        rollouts: From its rewards.json.
        before, after: What to call them in the grid, and images `(N, 3, H, W)`.
    """

    row: Row
    rollouts: Rollouts
    before: tuple[str, Tensor]
    after: tuple[str, Tensor]

    def is_of(self, method: str, reward: str, seed: int) -> bool:
        return (self.row["method"], self.row["reward"], self.row["seed"]) == (method, reward, seed)


def smoothed(rollouts: Rollouts) -> list[float]:
    """Mean reward of each roll-out and those before it, `WINDOW` in all; the first value is of the first full window."""
    rewards, size = [row["reward"] for row in rollouts], min(WINDOW, len(rollouts))
    return [mean(rewards[end - size : end]) for end in range(size, len(rewards) + 1)]


def first_reaching(rollouts: Rollouts, level: float) -> dict[str, float] | None:
    """The first roll-out at which the smoothed reward is at least so high; None if it never is."""
    values = smoothed(rollouts)
    ends = rollouts[len(rollouts) - len(values) :]
    return next((row for row, value in zip(ends, values, strict=True) if value >= level), None)


def cost_of_reaching(rollouts: Rollouts, baseline: Rollouts) -> dict[str, float | None]:
    """Passes and seconds until the reward is the baseline's best one, None if it never is.

    `share_` is of what the baseline itself needs to get there.
    """
    level = max(smoothed(baseline))
    here, there, found = first_reaching(rollouts, level), first_reaching(baseline, level), {}
    for cost in ("passes", "seconds"):
        found[f"reached_{cost}"] = here and here[cost]
        found[f"share_{cost}"] = here and here[cost] / there[cost]
    return found


def with_costs(runs: list[Run], baseline: str) -> list[Row]:
    """Rows with what the curves say; with the costs of reaching the baseline where that has been trained."""
    rows = []
    for run in runs:
        last = run.rollouts[-1]
        row = run.row | {
            "passes": last["passes"],
            "seconds": last["seconds"],
            "best_reward": max(smoothed(run.rollouts)),
        }
        for other in runs:
            if other.is_of(baseline, row["reward"], row["seed"]):
                row |= cost_of_reaching(run.rollouts, other.rollouts)
        rows.append(row)
    return rows


def write_reward_study(
    folder: Path, runs: list[Run], special: tuple[str, str], setting: Setting, prompts: Sequence[str]
) -> str:
    """Writes table.md, rows.json, and if there are trainings curves.png and grid.png; returns the table.

    Args:
        special: Methods, the one that others are compared with and the one without anything to learn from.
        prompts: Of the images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = rounded(with_costs(runs, special[0]))
    table = markdown(rows, special[0], setting)
    numbers = dumped({"setting": asdict(setting)}, rows)
    replace_file(folder / "table.md", lambda path: path.write_text(table, "utf-8"))
    replace_file(folder / "rows.json", lambda path: path.write_text(numbers, "utf-8"))
    if runs:
        figure, picture = plot(runs, *special), grid(runs, prompts)
        write_plot(folder / "curves.png", figure, 120)
        replace_file(folder / "grid.png", lambda path: picture.save(path, format="PNG", optimize=True))
    return table


def markdown(rows: list[Row], baseline: str, setting: Setting) -> str:
    """A block for each reward, and what the numbers are."""
    names = {"baseline": baseline, "distance": distance_name(setting.extractor)}
    columns = {key: (head.format(**names), form) for key, (head, form) in COLUMNS.items()}
    blocks = []
    for (reward,), of_reward in grouped(rows, "reward").items():
        groups = grouped(of_reward, "method", "steps")
        lines = [{"method": method, "steps": steps} | _cells(group) for (method, steps), group in groups.items()]
        blocks.append(f"**{reward}**\n\n{filled_columns(lines, columns)}\n\n")
    return "".join(blocks) + (
        f"Mean over the seeds ± half the range. Before and after: {setting.num_images} images a row by stock pipelines, "
        f"from the same noise, seeds from {setting.seed}; extractor {setting.extractor}, reference {setting.reference}; Vendi: of "
        f"10 images of one prompt. Network evaluations: each of one sample; one with a gradient counts three times, guidance doubles "
        f"them. {baseline}'s best reward: the highest mean of {WINDOW} roll-outs in a row, reached at the first roll-out at which "
        f"that of the last {WINDOW} is as high, same seed; shares are of what {baseline} needs for it. CPU minutes: of the "
        f"training, on {setting.hardware}.\n"
    )


def _cells(group: list[Row]) -> Row:
    """Of the seeds of one method."""
    cells = {"seeds": len(group)}
    for key, form in FORMATS.items():
        before, after = (_cell(group, f"{key}_{when}", form) for when in ("before", "after"))
        cells[key] = None if after is None else f"{before} → {after}"
    for key, form in {"passes": "{:,.0f}", "cpu_minutes": "{:.1f}"}.items():
        cells[key] = _cell(group, key, form)
    compared = [row for row in group if "reached_passes" in row]
    reached = [row for row in compared if row["reached_passes"] is not None]
    if not reached:
        return cells | {"reached_passes": "never" if compared else None}
    some = "" if len(reached) == len(compared) else f" ({len(reached)} of {len(compared)} seeds)"
    cells["reached_passes"] = _cell(reached, "reached_passes", "{:,.0f}") + some
    return cells | {key: _cell(reached, key, "{:.3f}") for key in ("share_passes", "share_seconds")}


def _cell(group: list[Row], key: str, form: str) -> str | None:
    found = spread(group, key)
    if found is None:
        return None
    middle, half = (form.format(value) for value in found)
    return f"{middle} ±{half}" if half != form.format(0) else middle


def plot(runs: list[Run], baseline: str, control: str) -> Figure:
    """A column for each reward; a line for each training, in its method's colour, and the baseline's best reward."""
    rewards = list(dict.fromkeys(run.row["reward"] for run in runs))
    methods = [name for name in dict.fromkeys(run.row["method"] for run in runs) if name != control]
    colours = {name: f"C{place}" for place, name in enumerate(methods)} | {control: "black"}
    figure = Figure(figsize=(5 * len(rewards), 8), layout="constrained")
    axes = figure.subplots(2, len(rewards), squeeze=False)
    for column, reward in enumerate(rewards):
        chosen = [run for run in runs if run.row["reward"] == reward]
        for row, (cost, unit) in enumerate((("passes", 1), ("seconds", 60))):
            _draw(axes[row, column], chosen, cost, unit, colours)
            best = [max(smoothed(run.rollouts)) for run in chosen if run.row["method"] == baseline]
            if best:
                axes[row, column].axhline(mean(best), color=colours[baseline], linestyle="--", linewidth=1)
        axes[0, column].set(title=reward, xscale="log", xlabel="network evaluations")
        axes[1, column].set(xlabel="minutes")
    lines = {line.get_label(): line for each in axes[0] for line in each.get_lines() if line.get_label() in colours}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4)
    return figure


def _draw(axes: Axes, runs: list[Run], cost: str, unit: float, colours: dict[str, str]) -> None:
    for run in runs:
        values, name = smoothed(run.rollouts), run.row["method"]
        places = [row[cost] / unit for row in run.rollouts[len(run.rollouts) - len(values) :]]
        axes.plot(places, values, color=colours[name], linewidth=1, label=name)
    low, high = min(smoothed(run.rollouts)[0] for run in runs), max(max(smoothed(run.rollouts)) for run in runs)
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 2 * low - high))  # or one that falls apart would flatten the others
    axes.set_ylabel(f"reward, mean of {WINDOW} roll-outs")
    axes.grid(alpha=0.3)


def grid(runs: list[Run], prompts: Sequence[str]) -> Image.Image:
    """The same prompts and noise before training, and after each with its first seed."""
    rewards, strips = list(dict.fromkeys(run.row["reward"] for run in runs)), {}
    tuned = sorted(runs, key=lambda run: rewards.index(run.row["reward"]))
    for name, images in [*(run.before for run in runs), *(run.after for run in tuned)]:
        strips.setdefault(name, images[:GRID_COLUMNS])
    return image_grid(list(strips.values()), list(strips), prompts[:GRID_COLUMNS])
