"""Train the variants that a study lists, each with several seeds; measure all of them alike; write tables and plots.

What is finished is not done again: a study can be stopped, taken up, and given more variants.
"""

import json
import os
import resource
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from study_report import write_study
from transformers.hf_argparser import HfArg

from cm_diffusers.cli import parse_configs, run
from cm_diffusers.evaluation.comparison import Comparison, EvaluationConfig
from cm_diffusers.evaluation.reference import ReferenceConfig


ROWS, COST = "rows.json", "cost.json"  # what is found beside a finished training


@dataclass
class StudyConfig:
    """Which study, and how much of it."""

    study: str = HfArg(help="TOML file: an evaluation's flags, the variants' commands, and the tables they are in.")
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1], help="Seeds that each variant is trained with.")
    only: list[str] | None = HfArg(default=None, help="Train only these variants; all that is finished is reported.")
    work_dir: str = HfArg(default="runs/studies", help="Where trainings go, in a folder named after the study.")
    output_dir: str = HfArg(default="assets/results", help="Where tables and plots go, in a folder of that name, too.")


def train(command: str, seed: int, folder: Path) -> None:
    """Runs a training script, or goes on with it, and counts the CPU time it takes."""
    if (folder / "pipeline").is_dir():
        return
    resume = ["--resume_from_checkpoint", "latest"] if list(folder.glob("checkpoint-*")) else []
    flags = ["--seed", str(seed), "--output_dir", str(folder), *resume]
    spent = cpu_minutes(folder) if resume else 0.0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        subprocess.run([sys.executable, *shlex.split(command), *flags], check=True)
    finally:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        more = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60
        if folder.is_dir() and spent is not None:
            _write(folder / COST, {"cpu_minutes": spent + more})


def measure(comparison: Comparison, name: str, seed: int, folder: Path) -> None:
    """The rows of one training, kept beside it."""
    if (folder / ROWS).is_file():
        return
    before = len(comparison.rows)
    comparison.measure(str(folder / "pipeline"), name, comparison.config.num_inference_steps)
    more = {"seed": seed, "cpu_minutes": cpu_minutes(folder)}
    _write(folder / ROWS, [row | more for row in comparison.rows[before:]])


def cpu_minutes(folder: Path) -> float | None:
    """Of a training; None if one of its processes was killed before it could be counted."""
    return json.loads((folder / COST).read_text("utf-8"))["cpu_minutes"] if (folder / COST).is_file() else None


def _write(path: Path, content: object) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    os.replace(aside, path)


def main() -> None:
    (config,) = parse_configs((StudyConfig,), __doc__)
    path = Path(config.study)
    if not path.is_file():
        raise ValueError(f"--study {path}: there is no such file; studies lie in benchmarks/studies.")
    study = tomllib.loads(path.read_text("utf-8"))
    if unknown := set(config.only or ()) - set(study["variants"]):
        raise ValueError(f"--only {' '.join(sorted(unknown))}: {path} has {', '.join(study['variants'])}.")
    work, folders = Path(config.work_dir) / path.stem, {}
    evaluation = parse_configs((EvaluationConfig, ReferenceConfig), __doc__, shlex.split(study["evaluation"]))
    comparison = Comparison(*evaluation)
    rows = [row | {"seed": config.seeds[0]} for row in comparison.run()]
    for seed in config.seeds:
        for name, command in study["variants"].items():
            command = command.format(**study["pieces"])
            folder = folders[name, seed] = work / f"{name.replace(' ', '_')}-{seed}"
            if config.only is None or name in config.only:
                train(command, seed, folder)
                measure(comparison, name, seed, folder)
    done = [folder / ROWS for folder in folders.values() if (folder / ROWS).is_file()]
    rows += [row for file in done for row in json.loads(file.read_text("utf-8"))]
    print(write_study(Path(config.output_dir) / path.stem, study["tables"], rows, comparison.setting))


if __name__ == "__main__":
    run(main)
