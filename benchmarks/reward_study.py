"""Tune a student for rewards by every method that a study lists, and its teacher by DDPO, each with several seeds.

What is finished is not done again: a study can be stopped, taken up, given more methods, and reported at any time.
"""

import json
import os
import runpy
import shlex
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from reward_study_measure import Measuring, Start
from reward_study_report import Run, write_reward_study
from study import cpu_minutes, train
from transformers.hf_argparser import HfArg

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.evaluation.candidates import check_output
from cm_diffusers.measured import result_folder
from cm_diffusers.places import public
from cm_diffusers.publishing.provenance import read_provenance


HERE = Path(__file__).resolve().parent  # where trainings find shuffled rewards
CLASSIFIER = "classifier"  # folder of the study's own, and in it that of its weights


@dataclass
class RewardStudyConfig:
    """Which study, and how much of it."""

    study: str = HfArg(
        default="benchmarks/studies/rewards.toml",
        help="TOML file: an evaluation's flags, rewards, starts, and methods with their commands.",
    )
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1], help="Seeds that each method is trained with.")
    train: bool = HfArg(default=True, help="Train what is not finished; what is finished is reported anyway.")
    only: list[str] | None = HfArg(default=None, help='Train only these, each "METHOD REWARD".')
    work_dir: str = HfArg(default="runs/studies", help="Where trainings go, in a folder named after the study.")
    output_dir: str = HfArg(default="assets/results", help="Where table and plots go, in a folder of that name, too.")


class Variant(NamedTuple):
    """A method with one of its rewards.

    Attributes:
        start: Name of what it tunes.
        steps: To sample with.
    """

    method: str
    reward: str
    start: str
    steps: int
    command: str

    @property
    def name(self) -> str:
        return f"{self.method} {self.reward}"


class RewardStudy(NamedTuple):
    """
    Attributes:
        work_dir: Where its trainings go.
        rewards: Name -> reward as `load_reward` takes it.
        classifier: `command` and `seed` of the training that makes one of the rewards; {} if none does.
        evaluation: Flags of a `Measuring`.
        baseline, control: The methods that others are compared with.
    """

    work_dir: Path
    variants: list[Variant]
    rewards: dict[str, str]
    starts: dict[str, Start]
    classifier: dict
    evaluation: str
    baseline: str
    control: str

    def folder(self, variant: Variant, seed: int) -> Path:
        return self.work_dir / f"{variant.name.replace(' ', '_')}-{seed}"

    @property
    def own_classifier(self) -> Path:
        """Folder of its weights."""
        return self.work_dir / CLASSIFIER / CLASSIFIER

    def train(self, variant: Variant, seed: int) -> None:
        """If it is not finished; and before it, what its reward needs."""
        if str(self.own_classifier) in variant.command and not self.own_classifier.is_dir():
            train(self.classifier["command"], self.classifier["seed"], self.own_classifier.parent)
        train(variant.command, seed, self.folder(variant, seed))


def read_reward_study(path: Path, work_dir: Path) -> RewardStudy:
    """
    Args:
        path: TOML file. Commands may name {reward}, {steps}, what their start says, and pieces; a method's `flags` are
            added for some of its rewards.
        work_dir: Where a folder for it is.

    Raises:
        ValueError: There is no such file, or it has not the method, start or reward that it names.
    """
    if not path.is_file():
        raise ValueError(f"--study {path}: there is no such file; studies lie in benchmarks/studies.")
    study, folder = tomllib.loads(path.read_text("utf-8")), work_dir / path.stem
    methods, starts = study["methods"], {name: Start(**table) for name, table in study["starts"].items()}
    rewards = {
        name: text.format(classifier=folder / CLASSIFIER / CLASSIFIER) for name, text in study["rewards"].items()
    }
    _check_names(path, study)
    variants = []
    for method, table in methods.items():
        for reward in table["rewards"]:
            values = {"reward": rewards[reward], "steps": table["steps"]} | starts[table["start"]]._asdict()
            pieces = {name: text.format(**values) for name, text in study["pieces"].items()}
            more = table.get("flags", {}).get(reward, "")
            command = " ".join(f"{table['command']} {more}".format(**pieces, **values).split())
            variants.append(Variant(method, reward, table["start"], table["steps"], command))
    of_study = study.get("classifier", {}), " ".join(study["evaluation"].split()), study["baseline"], study["control"]
    return RewardStudy(folder, variants, rewards, starts, *of_study)


def _check_names(path: Path, study: dict) -> None:
    named = [("methods", study["baseline"]), ("methods", study["control"])]
    for table in study["methods"].values():
        named += [("starts", table["start"]), *(("rewards", reward) for reward in table["rewards"])]
    for kind, name in named:
        if name not in study[kind]:
            raise ValueError(f"{path} names {name!r}, but its {kind} are {', '.join(study[kind])}.")


def check_command(command: str, made: Path) -> None:
    """
    Args:
        command: Of a training script.
        made: Folder that it ended with.

    Raises:
        ValueError: It was another command.
    """
    script, *flags = shlex.split(command)
    configs = parse_configs(runpy.run_path(script)["CONFIGS"], "", flags)
    wanted = {name: public(value) for config in configs for name, value in asdict(config).items()}
    found = read_provenance(made).settings
    for name in sorted(wanted.keys() & found.keys() - {"seed"}):
        if wanted[name] != found[name]:
            raise ValueError(
                f"{made.parent} was trained with --{name} {found[name]}, but the study now says {wanted[name]}: delete the folder."
            )


def finished(study: RewardStudy, config: RewardStudyConfig) -> list[tuple[Variant, int]]:
    """Trains what is asked for; all that is finished then, and with which seed.

    Raises:
        ValueError: --only names something else, or a training was made by another command than the study's.
    """
    names = [variant.name for variant in study.variants]
    if unknown := sorted(set(config.only or ()) - set(names)):
        raise ValueError(f"--only {unknown[0]!r}: the study has {', '.join(names)}.")
    pairs = [(variant, seed) for seed in config.seeds for variant in study.variants]
    if config.train:
        for variant, seed in pairs:
            if config.only is None or variant.name in config.only:
                study.train(variant, seed)
    pairs = [pair for pair in pairs if result_folder(study.folder(*pair))]
    for variant, seed in pairs:
        check_command(variant.command, result_folder(study.folder(variant, seed)))
    return pairs


def measure(measuring: Measuring, study: RewardStudy, variant: Variant, seed: int) -> Run:
    """A finished training: its start and what became of it, alike; and its curve."""
    folder, start, steps = study.folder(variant, seed), study.starts[variant.start], variant.steps
    row = {"method": variant.method, "reward": variant.reward, "seed": seed, "steps": steps}
    before = measuring.images(study.work_dir / f"start_{variant.start}_{steps}", start, steps)
    after = measuring.images(folder, start, steps, result_folder(folder))
    for when, images in (("before", before), ("after", after)):
        quality = measuring.quality(images, study.rewards[variant.reward])
        row |= {f"{key}_{when}": value for key, value in quality.items()}
    rollouts = json.loads((folder / "rewards.json").read_text("utf-8"))["rollouts"]
    label = f"{variant.start}, {steps} step{'s' * (steps > 1)}"
    return Run(
        row | {"cpu_minutes": cpu_minutes(folder)},
        rollouts,
        (label, before),
        (f"{variant.method}: {variant.reward}", after),
    )


def main() -> None:
    (config,) = parse_configs((RewardStudyConfig,), __doc__)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    path = Path(config.study)
    study = read_reward_study(path, Path(config.work_dir))
    check_output(config.output_dir)
    measuring = Measuring(study.evaluation)
    pairs = finished(study, config)
    runs = [measure(measuring, study, variant, seed) for variant, seed in pairs]
    folder, prompts = Path(config.output_dir) / path.stem, measuring.reference.prompts
    print(write_reward_study(folder, runs, (study.baseline, study.control), measuring.setting, prompts))


if __name__ == "__main__":
    run(main)
