"""Cool a constant-rate run down from checkpoints that it kept, each in a folder of its own, and compare what comes out."""

import cm_diffusers.engine.early
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from cm_diffusers.engine.branching import command_of
from cm_diffusers.engine.checkpoints import list_checkpoints, read_state
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.recipes import shipped
from cm_diffusers.errors import UserError
from cm_diffusers.measured import result_folder


@dataclass
class BranchConfig:
    """Where branches begin and how they end (2405.18392)."""

    checkpoints: list[str] = HfArg(help="Checkpoint folders of runs; --branch_steps of a training keeps them.")
    cooldown_steps: list[int] = HfArg(help="Optimizer steps of the branches: one number for all, or one for each.")
    cooldown_shape: Literal["1-sqrt", "linear", "cosine"] = HfArg(default="1-sqrt", help="How the rate falls to 0.")
    evaluation: str | None = HfArg(
        default=None, help="Flags of evaluate.py, a recipe: the branches are compared in one table."
    )
    output_dir: str = HfArg(default="runs/branches", help="Gets a folder for each branch; finished ones stay.")


CONFIGS = (BranchConfig,)


def run_script(name: str, words: list[str], processes: int = 1) -> None:
    """A script beside this one, in as many processes of its own."""
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", str(processes)] if processes > 1 else []
    if status := subprocess.run([sys.executable, *launcher, str(Path(__file__).with_name(name)), *words]).returncode:
        sys.exit(status)


def main() -> None:
    (config,) = parse_configs(CONFIGS, __doc__)
    places, counts, shape = [Path(place) for place in config.checkpoints], config.cooldown_steps, config.cooldown_shape
    if len(counts) not in (1, len(places)):
        raise UserError(
            f"--cooldown_steps has {len(counts)} for {len(places)} --checkpoints: give one, or one for each."
        )
    counts, scripts = counts * (len(places) // len(counts)), Path(__file__).parent
    commands = [command_of(place, scripts) for place in places]
    states, evaluation = [read_state(place) for place in places], config.evaluation
    ends = [f"{state['step']}+{count}" for state, count in zip(states, counts, strict=True)]
    tail = "" if shape == "1-sqrt" else f"-{shape}"
    names = [f"{place.resolve().parent.name}-{end}{tail}" for place, end in zip(places, ends, strict=True)]
    if len(set(names)) < len(names):
        raise UserError(f"Two branches would be called alike, of {', '.join(names)}: give their runs other names.")
    if evaluation:
        evaluation = str(shipped("--evaluation", evaluation, ".args"))
    folders = [Path(config.output_dir) / name for name in names]
    for place, state, count, (name, *words), folder in zip(places, states, counts, commands, folders, strict=True):
        if not result_folder(folder):
            start = "latest" if list_checkpoints(folder) else place
            more = {"resume_from_checkpoint": start, "output_dir": folder, "max_train_steps": state["step"] + count}
            more |= {"lr_scheduler": "wsd", "lr_cooldown_steps": count, "lr_cooldown_shape": shape}
            words += [word for flag, value in more.items() for word in (f"--{flag}", str(value))]
            run_script(name, words, state["identity"]["num_processes"])
    results = [str(result_folder(folder)) for folder in folders]
    print("\n".join(results))
    if evaluation:
        words = ["--recipe", evaluation, "--output_dir", f"{config.output_dir}/evaluation"]
        run_script("evaluate.py", [*words, "--pipelines", *results, "--names", *names])


if __name__ == "__main__":
    run(main)
