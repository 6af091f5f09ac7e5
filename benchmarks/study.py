"""Train the variants that a study lists, each with several seeds; measure all of them alike; write tables and plots.

A variant's command may name another one's result, of the same seed, as <ITS NAME>, such as a model to start from; that
one stands before it. What is finished is not done again: a study can be stopped, taken up, and given more variants, also
on another machine, where the rows of its last tables count as long as a variant's command is the same.
"""

import json
import os
import resource
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from study_report import write_study
from transformers.hf_argparser import HfArg

from cm_diffusers.data.video import VideoDataConfig
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.evaluation.candidates import check_output
from cm_diffusers.evaluation.comparison import Comparison, EvaluationConfig
from cm_diffusers.evaluation.reference import ReferenceConfig
from cm_diffusers.evaluation.report import hardware, refuse_one_name, row_names
from cm_diffusers.evaluation.video import VideoComparison, VideoEvaluationConfig
from cm_diffusers.measured import result_folder
from cm_diffusers.models.motion import MotionConfig


ROWS, COST = "rows.json", "cost.json"  # what is found beside a finished training
MEASURES = {  # of images or of clips: how an evaluation's flags are read
    "images": (Comparison, (EvaluationConfig, ReferenceConfig)),
    "clips": (VideoComparison, (VideoEvaluationConfig, VideoDataConfig, MotionConfig)),
}


@dataclass
class StudyConfig:
    """Which study, and how much of it."""

    study: str = HfArg(help="TOML file: an evaluation's flags, the variants' commands, and the tables they are in.")
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1], help="Seeds that each variant is trained with.")
    only: list[str] | None = HfArg(default=None, help="Train only these variants; all that is finished is reported.")
    work_dir: str = HfArg(default="runs/studies", help="Where trainings go, in a folder named after the study.")
    output_dir: str = HfArg(default="assets/results", help="Where tables and plots go, in a folder of that name, too.")


def folder_name(variant: str) -> str:
    return variant.replace(" ", "_")


def train(command: str, seed: int, folder: Path) -> None:
    """Runs a training script, or goes on with it, and counts the CPU time it takes."""
    if result_folder(folder):
        return
    resumed = bool(list(folder.glob("checkpoint-*")))
    how = ["--resume_from_checkpoint", "latest"] if resumed else ["--overwrite_output_dir"]
    spent = cpu_minutes(folder) if resumed else 0.0
    (folder / COST).unlink(missing_ok=True)  # it comes back when all is counted
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    flags = ["--seed", str(seed), "--output_dir", str(folder), *how]
    try:
        subprocess.run([sys.executable, *shlex.split(command), *flags], check=True)
    finally:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        more = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60
        if folder.is_dir() and spent is not None:
            _write(folder / COST, {"cpu_minutes": spent + more})


def cpu_minutes(folder: Path) -> float | None:
    """Of a training; None if one of its processes was killed before it could be counted."""
    return json.loads((folder / COST).read_text("utf-8"))["cpu_minutes"] if (folder / COST).is_file() else None


def measure(
    comparison: Comparison | VideoComparison,
    name: str,
    seed: int,
    folder: Path,
    origin: dict[str, object],
    starts: list[Path],
    steps: list[int] | None = None,
    gammas: list[float] | None = None,
) -> None:
    """The rows of one training, kept beside it with their origin.

    Args:
        starts: Folders of what it started from.
        steps: To sample with, instead of the evaluation's.
        gammas: Likewise, of a variant with rows for each.
    """
    if (folder / ROWS).is_file():
        return
    before = len(comparison.rows)
    own = {"gammas": gammas} if gammas else {}
    comparison.measure(str(result_folder(folder)), name, steps or comparison.config.num_inference_steps, **own)
    more = {"seed": seed, "cpu_minutes": cpu_minutes(folder), "hardware": hardware()}
    more |= {"variant": name} if gammas else {}
    if starts:
        costs = [cpu_minutes(start) for start in starts]
        more["start_minutes"] = None if None in costs else sum(costs)
    _write(folder / ROWS, {"origin": origin, "rows": [row | more for row in comparison.rows[before:]]})


def read_rows(folder: Path, origin: dict[str, object]) -> list[dict]:
    """Those of a finished training; none if it is not finished.

    Raises:
        ValueError: They were made by another command or evaluation than the study now names.
    """
    if not (folder / ROWS).is_file():
        return []
    found = json.loads((folder / ROWS).read_text("utf-8"))
    if found["origin"] != origin:
        raise ValueError(
            f"{folder} was made by {found['origin']}, but the study now says {origin}: delete the folder."
        )
    return found["rows"]


def published_rows(folder: Path, name: str, seed: int, origin: dict[str, object]) -> list[dict]:
    """Those in the results of a study whose training lies elsewhere; none if it was made by another command or evaluation."""
    path = folder / ROWS
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if found.get("origins", {}).get(name) != origin:
        return []
    return [row for row in found["rows"] if row["seed"] == seed and row.get("variant", row["pipeline"]) == name]


def _write(path: Path, content: object) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    os.replace(aside, path)


def started_from(command: str, names: Iterable[str]) -> list[str]:
    """The variants whose results a command names."""
    return [name for name in names if f"<{name}>" in command]


class Study(NamedTuple):
    """
    Attributes:
        commands: Of the variants by name. Those that no table names are trained, to start from, and not measured.
        tables: By name, as `write_study` takes them.
        evaluation: Its flags.
        steps: Of variants with their own.
        measures: What the evaluation is of, "images" or "clips".
        gammas: Of variants with a row for each of several.
    """

    commands: dict[str, str]
    tables: dict[str, dict]
    evaluation: str
    steps: dict[str, list[int]]
    measures: str
    gammas: dict[str, list[float]] = {}

    def comparison(self) -> Comparison | VideoComparison:
        compare, configs = MEASURES[self.measures]
        config, *others = parse_configs(configs, __doc__, shlex.split(self.evaluation))
        refuse_one_name([*row_names(config.pipelines, config.names), *self.commands])
        return compare(config, *others)

    def is_measured(self, name: str) -> bool:
        return any(name in table["variants"] for table in self.tables.values())


def read_study(path: Path, only: list[str] | None) -> Study:
    """
    Raises:
        ValueError: There is no such file, or it has not all variants that are named, or its order or kind is wrong.
    """
    if not path.is_file():
        raise ValueError(f"--study {path}: there is no such file; studies lie in benchmarks/studies.")
    study = tomllib.loads(path.read_text("utf-8"))
    commands = {name: " ".join(text.format(**study["pieces"]).split()) for name, text in study["variants"].items()}
    named = {name for table in study["tables"].values() for name in table["variants"]} | set(only or ())
    if unknown := sorted(named - set(commands)):
        raise ValueError(f"{path} has no variant {', '.join(unknown)}: it has {', '.join(commands)}.")
    for place, (name, command) in enumerate(commands.items()):
        if late := started_from(command, list(commands)[place:]):
            raise ValueError(f"{path}: {name} starts from {late[0]}, which must stand before it.")
    spelled = [folder_name(name) for name in commands]
    if twice := [name for name in commands if spelled.count(folder_name(name)) > 1]:
        raise ValueError(f"{path}: {' and '.join(twice)} would be trained in one folder; rename one.")
    measures = study.get("measures", "images")
    if measures not in MEASURES:
        raise ValueError(f"{path}: measures is {measures!r}; one of {', '.join(MEASURES)}.")
    steps, gammas = study.get("steps", {}), study.get("gammas", {})
    return Study(commands, study["tables"], " ".join(study["evaluation"].split()), steps, measures, gammas)


def trained(study: Study, name: str, seed: int, folders: Mapping[str, Path]) -> Path:
    """The result of a variant, which is trained now, and what it starts from before it, if they are not there."""
    command = study.commands[name]
    for other in started_from(command, study.commands):
        command = command.replace(f"<{other}>", shlex.quote(str(trained(study, other, seed, folders))))
    train(command, seed, folders[name])
    return result_folder(folders[name])


def main() -> None:
    (config,) = parse_configs((StudyConfig,), __doc__)
    path = Path(config.study)
    study = read_study(path, config.only)
    check_output(config.output_dir)
    commands, steps, gammas, comparison = study.commands, study.steps, study.gammas, study.comparison()
    origins, output = {}, Path(config.output_dir) / path.stem
    for name, command in commands.items():
        own = {"steps": steps.get(name), "gammas": gammas.get(name)}
        origins[name] = {"command": command, "evaluation": study.evaluation} | {k: v for k, v in own.items() if v}
    rows = [row | {"seed": config.seeds[0]} for row in comparison.run()]
    for seed in config.seeds:
        folders = {name: Path(config.work_dir) / path.stem / f"{folder_name(name)}-{seed}" for name in commands}
        for name, command in commands.items():
            folder, origin = folders[name], origins[name]
            known = read_rows(folder, origin) or published_rows(output, name, seed, origin)
            if not known and (config.only is None or name in config.only):
                trained(study, name, seed, folders)
                if study.is_measured(name):
                    starts = [folders[other] for other in started_from(command, commands)]
                    measure(comparison, name, seed, folder, origin, starts, steps.get(name), gammas.get(name))
            rows += known or read_rows(folder, origin)
    print(write_study(output, study.tables, rows, comparison.setting, origins))


if __name__ == "__main__":
    run(main)
