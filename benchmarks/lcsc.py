"""Search for combinations of snapshots (LCSC, 2404.02241) of LCM's and CD's trainings at a constant rate: which weights are
best on images that the search has not seen, at one step and at several, and from how few updates.

CD's teacher is what training/recipes/edm_fashion_latents.args trains. What is finished is not done again; a search that was
stopped goes on.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from reporting import write_report
from study_report import cell, grouped, spread
from transformers.hf_argparser import HfArg

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation.report import Row, filled_columns, write_plot
from cm_diffusers.measured import result_folder


CONSTANT = "--lr_scheduler constant_with_warmup --lr_cooldown_steps 0 --export_ema_decay 0"
TRAININGS = {
    "LCM": f"""training/distill_lcm.py --recipe training/recipes/lcm_fashion.args --train_batch_size 48 --max_train_steps 600
        --checkpointing_steps 600 {CONSTANT} --snapshot_steps 30 --snapshot_window 300 600""",
    "CD": f"""training/distill_cd.py --recipe training/recipes/cd_fashion_latents.args --max_train_steps 330
        {CONSTANT} --snapshot_steps 15 --snapshot_window 165 330""",
}
UPDATES = {"LCM": (600, 450), "CD": (330, 240)}  # all, and those of the early search
SAMPLED = {"LCM": "--guidance_scale 2", "CD": ""}
STEPS = (1, 2, 4)
MEASURE = """training/combine.py --num_inference_steps 1 2 4 --num_images 500 --eval_batch_size 100 --resolution 32 --label_column label
    --train_data_dir assets/fashion_captioned/test --feature_extractor assets/fashion_classifier"""
ONE, SEVERAL, EARLY = "one step", "1, 2 and 4 steps", "one step, early"
SEARCHES = {
    ONE: "--step_weights 1 0 0 --evaluations 120",
    SEVERAL: "--evaluations 60",
    EARLY: "--step_weights 1 0 0 --evaluations 120 --window {first} {last}",
}
FOUND = "found"


@dataclass
class LcscConfig:
    """Which trainings, and where their tables go."""

    only: list[str] | None = HfArg(default=None, help=f"Of {', '.join(TRAININGS)}; all if not given.")
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1], help="Seeds of the trainings.")
    work_dir: str = HfArg(default="runs/lcsc", help="Where trainings and searches go.")
    output_dir: str = HfArg(default="assets/results/lcsc", help="Where tables and plot go.")


def command(text: str, *more: str) -> None:
    subprocess.run([sys.executable, *shlex.split(text), *more], check=True)


def train(kind: str, seed: int, folder: Path) -> None:
    if result_folder(folder) is None:
        resumed = list(folder.glob("checkpoint-*"))
        how = ["--resume_from_checkpoint", "latest"] if resumed else ["--overwrite_output_dir"]
        command(TRAININGS[kind], "--seed", str(seed), "--output_dir", str(folder), *how)


def search(kind: str, what: str, run_dir: Path, folder: Path) -> dict[str, Any]:
    """What `training/combine.py` wrote."""
    table = folder / "table.json"
    if not table.is_file():
        last = UPDATES[kind][1]
        flags = f"{MEASURE} {SAMPLED[kind]} {SEARCHES[what].format(first=UPDATES[kind][0] // 2, last=last)}"
        command(flags, "--run_dir", str(run_dir), "--output_dir", str(folder), *["--resume"] * folder.exists())
    return json.loads(table.read_text("utf-8"))


def rows_of(kind: str, seed: int, what: str, found: dict[str, Any]) -> list[Row]:
    """One for each kind of weights: the Fréchet distance on search set and hold-out at each number of steps."""
    rows: dict[str, Row] = {}
    for place in ("search_set", "holdout"):
        for one in found[place]:
            name = one["pipeline"].partition(" (")[0]
            row = rows.setdefault(name, {"training": kind, "seed": seed, "search": what, "weights": name})
            row[f"{place}_{one['num_inference_steps']}"] = one["fid"]
    shared = {"evaluations": found["evaluations"], "minutes": found["minutes"], "hardware": found["hardware"]}
    rows[FOUND] |= {"accepted": found["accepted"], "share": found["share_of_resamples"]}
    return [row | shared for row in rows.values()]


def tables(rows: list[Row]) -> str:
    heads = {
        "training": ("training", "{}"),
        "search": ("chosen and searched at", "{}"),
        "weights": ("weights", "{}"),
        "seeds": ("seeds", "{}"),
        **{f"search_set_{n}": (f"search set, {n} NFE", "{}") for n in STEPS},
        **{f"holdout_{n}": (f"hold-out, {n} NFE", "{}") for n in STEPS},
    }
    lines = []
    for (kind, what, name), group in grouped(rows, "training", "search", "weights").items():
        line = {"training": kind, "search": what, "weights": name, "seeds": len(group)}
        for key in list(heads)[4:]:
            found = spread(group, key)
            line[key] = None if found is None else cell(found, "{:.2f}", len(group) > 1)
        lines.append(line)
    costs = {
        "training": ("training", "{}"),
        "search": ("searched at", "{}"),
        "updates": ("updates", "{}"),
        "accepted": ("accepted", "{}"),
        "share": ("better in resamples", "{}"),
        "evaluations": ("evaluations", "{}"),
        "minutes": ("minutes", "{}"),
    }
    spent = []
    for (kind, what), group in grouped([row for row in rows if row["weights"] == FOUND], "training", "search").items():
        line = {"training": kind, "search": what, "updates": UPDATES[kind][what == EARLY]}
        line["accepted"] = f"{sum(row['accepted'] for row in group)} of {len(group)}"
        line["share"] = cell(spread(group, "share"), "{:.2f}", len(group) > 1)
        line |= {key: cell(spread(group, key), "{:.0f}", len(group) > 1) for key in ("evaluations", "minutes")}
        spent.append(line)
    machines = " or ".join(dict.fromkeys(row["hardware"] for row in rows))
    return (
        f"{filled_columns(lines, heads)}\n\nFD-fashion to data, mean over the seeds ± half the range; 500 images, other noise and other "
        f"real images on the hold-out.\n\n{filled_columns(spent, costs)}\n\nMinutes of all evaluations, on {machines}.\n"
    )


def plot(rows: list[Row]) -> Figure:
    """A panel for each training: the hold-out over the numbers of steps."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    by_training = grouped([row for row in rows if row["search"] != EARLY], "training")
    for axes, ((kind,), group) in zip(
        figure.subplots(1, len(by_training), squeeze=False)[0], by_training.items(), strict=True
    ):
        for (what, name), ones in grouped(group, "search", "weights").items():
            if what == ONE and name != FOUND:
                continue  # the averages stand with those of the other search
            means, halves = zip(*(spread(ones, f"holdout_{n}") for n in STEPS), strict=True)
            label = f"{name} at {what}" if name == FOUND else name
            width = 2.0 if name == FOUND else 1.0
            axes.errorbar([str(n) for n in STEPS], means, halves, marker="o", capsize=3, linewidth=width, label=label)
        axes.set(title=kind, xlabel="NFE (steps)", ylabel="FD-fashion to data, hold-out")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


def main() -> None:
    (config,) = parse_configs((LcscConfig,), __doc__)
    if unknown := [kind for kind in config.only or () if kind not in TRAININGS]:
        raise UserError(f"--only {' '.join(unknown)}: known are {', '.join(TRAININGS)}.")
    work, output, rows = Path(config.work_dir), Path(config.output_dir), []
    for kind in config.only or TRAININGS:
        for seed in config.seeds:
            folder = work / f"{kind}-{seed}"
            train(kind, seed, folder)
            for what in SEARCHES:
                found = search(kind, what, folder, work / f"{folder.name}-{what.replace(', ', '_').replace(' ', '_')}")
                rows += rows_of(kind, seed, what, found)
    text = tables(rows)
    write_report(output, "lcsc", text, {"rows": rows})
    write_plot(output / "lcsc.png", plot(rows), 120)
    print(text)


if __name__ == "__main__":
    run(main)
