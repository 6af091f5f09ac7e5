"""From a finished run to a published combination of its snapshots: baselines, search, hold-out, result."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from cm_diffusers.combining.log import LOG, Entry, SearchLog
from cm_diffusers.combining.networks import LoraNetwork, WholeNetwork, student_of
from cm_diffusers.combining.objective import Sheet
from cm_diffusers.combining.search import SearchConfig, Tried, find_best
from cm_diffusers.combining.vectors import EMA, KINDS, SINGLE, Baseline
from cm_diffusers.combining.weights import Snapshots
from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.engine.snapshots import Kept, weights_within
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation.candidates import check_output
from cm_diffusers.evaluation.report import Row
from cm_diffusers.measured import weights_digest
from cm_diffusers.models.students import HALF


FOUND = "found"
RESULTS = ("pipeline", "lora")


@dataclass
class CombineConfig:
    """Which weights are combined, and where the result goes."""

    run_dir: str = HfArg(help="Output folder of a finished training with --snapshot_steps.")
    window: list[int] | None = HfArg(
        default=None, help="First and last step of the snapshots to combine; all if not given."
    )
    ema_rates: list[float] = HfArg(
        default_factory=lambda: [0.3, 0.5, 0.7, 0.8, 0.9, 0.95],
        help="Rates of the EMAs over the snapshots that are baselines, and where the search begins.",
    )
    sigma_rels: list[float] = HfArg(
        default_factory=lambda: [0.05, 0.1, 0.2], help="Widths of the power-function averages among the baselines."
    )
    sum_dtype: Literal["float64", "float32"] = HfArg(
        default="float64", help="Precision of the sums; float32 where the device has no other."
    )
    lora_rank: int | None = HfArg(
        default=None, help="Rank of the published LoRA; that of the training if not given. What it loses is measured."
    )
    output_dir: str = HfArg(default="runs/combined", help="Where the result, its tables, plots and search.jsonl go.")
    resume: bool = HfArg(default=False, help=f"Go on with the search whose {LOG} is in --output_dir.")
    save_fp16: bool = HfArg(default=False, help=f"Store network and VAE, or the LoRA, in half precision: {HALF}.")

    def check(self) -> None:
        """
        Raises:
            ValueError: The output is there already.
        """
        folder = Path(self.output_dir)
        check_output(self.output_dir)
        if folder.exists() and not (self.resume and (folder / LOG).is_file()):
            advice = f", or --resume, for it has a {LOG}" if (folder / LOG).is_file() else ""
            raise UserError(f"--output_dir {folder} exists already: give a new folder{advice}.")
        if found := next((name for name in RESULTS if (folder / name).exists()), None):
            raise UserError(f"--output_dir {folder} has its result already, in {found}: give a new folder.")


@dataclass(frozen=True)
class Source:
    """A finished run.

    Attributes:
        result: Folder of what it published.
        is_lora: Whether that is a LoRA.
        kept: The snapshots to combine, at least two.
    """

    result: Path
    is_lora: bool
    kept: list[Kept]

    def on(self, pipe: DiffusionPipeline, config: CombineConfig) -> WholeNetwork | LoraNetwork:
        """The network of its pipeline, to put combinations into."""
        snapshots = Snapshots(self.kept, getattr(torch, config.sum_dtype))
        network = student_of(pipe)
        return LoraNetwork(network, snapshots, config.lora_rank) if self.is_lora else WholeNetwork(network, snapshots)


def find_run(config: CombineConfig) -> Source:
    """
    Raises:
        ValueError: The run has not ended, or has not two snapshots in the window.
    """
    run, window = Path(config.run_dir), config.window
    if window is not None and len(window) != 2:
        raise UserError(f"--window takes the first and the last step, but {len(window)} numbers were given.")
    if len(kept := weights_within(run, window)) < 2:
        where = f" in --window {window[0]} {window[1]}" if window else ""
        raise UserError(f"{run} keeps the weights of step {kept[0].step} alone{where}: at least two are combined.")
    is_lora = (run / "lora").is_dir()
    result = run / ("lora" if is_lora else "pipeline")
    if not is_lora and not (result / "model_index.json").is_file():
        raise UserError(f"{run} has neither a folder pipeline nor a folder lora: the training has not ended.")
    if not is_lora:
        refuse_changed(config, "lora_rank", "on a run that trained the whole network")
    return Source(result, is_lora, kept)


@dataclass(frozen=True)
class Contender:
    """A combination that is measured on the hold-out, too.

    Attributes:
        name: In the tables.
        entry: Of the log.
        value: Of the objective on the hold-out, less is better.
        rows: All columns on the hold-out.
    """

    name: str
    entry: Entry
    value: float
    rows: list[Row]


@dataclass(frozen=True)
class Verdict:
    """What the hold-out decided.

    Attributes:
        contenders: The baselines, and the found one as the last.
        best: The best baseline on the search set.
        differences: Objective of the found one less that of the best, of each resample.
        accepted: Whether the found one is published.
    """

    contenders: list[Contender]
    best: Contender
    differences: np.ndarray
    accepted: bool

    @property
    def published(self) -> Contender:
        return self.contenders[-1] if self.accepted else self.best

    @property
    def share(self) -> float:
        """Of the resamples in which the found one is better."""
        return float((self.differences < 0).mean())


def searched(
    network: WholeNetwork | LoraNetwork, sheet: Sheet, log: SearchLog, known: Sequence[Baseline], config: SearchConfig
) -> tuple[dict[str, Entry], Entry]:
    """Measures the baselines, then searches.

    Returns:
        The entries of the baselines by name, and the best one that the search tried.

    Raises:
        ValueError: Not even a baseline draws images that can be measured.
    """
    bar = tqdm(total=len(known) + config.evaluations, desc="Combinations")

    def measure(vector: np.ndarray) -> tuple[float, list[Row]]:
        network.put(vector)
        rows = sheet.rows(sheet.draw())
        return sheet.value(rows), rows

    def evaluate(name: str, vector: np.ndarray) -> Entry:
        entry = log.evaluate(name, vector, measure)
        bar.set_postfix_str(f"best {sheet.shown(min(one.value for one in log.entries)):.4g}", False)
        bar.update()
        return entry

    with bar:
        found = {one.name: evaluate(one.name, one.vector) for one in known}
        least = min(found.values(), key=lambda entry: entry.value)
        if least.value == np.inf:
            raise UserError(
                f"No average of the snapshots draws images whose {sheet.config.objective} can be measured."
            )
        emas = [found[one.name] for one in known if one.kind == EMA]
        anchor = min(emas, key=lambda entry: entry.value)

        def pulled(entry: Entry) -> float:
            apart = np.square(np.subtract(entry.vector, anchor.vector)).sum()
            return entry.value + config.pull * abs(anchor.value) * float(apart)

        starts = [Tried(pulled(entry), np.array(entry.vector)) for entry in found.values()]
        best = find_best(lambda vector: pulled(evaluate(FOUND, vector)), starts, config)
    tried = (entry for entry in log.entries if entry.name == FOUND)
    return found, next(entry for entry in tried if entry.vector == best.vector.tolist())


def chosen(found: Mapping[str, Entry], known: Sequence[Baseline]) -> dict[str, Entry]:
    """What is told of the baselines: the last snapshot, and the best of each kind."""
    last = [one for one in known if one.kind == SINGLE][-1]
    told = {f"last ({last.which})": found[last.name]}
    for kind in KINDS:
        names = [one.name for one in known if one.kind == kind]
        best = min(names, key=lambda name: found[name].value)
        told[best if len(names) == 1 else f"best {best}"] = found[best]
    return told


def judged(network: WholeNetwork | LoraNetwork, sheet: Sheet, told: Mapping[str, Entry], found: Entry) -> Verdict:
    """Measures, as they would be published, the baselines and the found combination on images that the search did not see."""
    contenders, features = [], {}
    for name, entry in tqdm({**told, FOUND: found}.items(), "Hold-out"):
        network.put_published(entry.vector)
        features[name] = sheet.draw()
        rows = sheet.rows(features[name])
        contenders.append(Contender(name, entry, sheet.value(rows), rows))
    last, best = contenders[-1], min(contenders[:-1], key=lambda one: one.entry.value)
    both = features[FOUND], features[best.name]
    differences = np.array([last.value - best.value]) if None in both else sheet.differences(*both)
    accepted = (differences < 0).mean() >= sheet.config.confidence and last.value < best.value
    return Verdict(contenders, best, differences, bool(accepted))


def identity(source: Source, *configs: object) -> dict[str, Any]:
    """All that the values of a search, and the order of its vectors, depend on."""
    idle = "window evaluations bootstrap_samples confidence holdout_seed cache_dir output_dir resume save_fp16 lora_rank".split()
    settings = {name: value for config in configs for name, value in asdict(config).items() if name not in idle}
    return settings | {"steps": [one.step for one in source.kept], "weights": weights_digest(source.result)}
