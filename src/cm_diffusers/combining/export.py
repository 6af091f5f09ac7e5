"""Averages of a run's weights that need no search: published as its student."""

from dataclasses import dataclass, replace
from pathlib import Path

from transformers.hf_argparser import HfArg

from cm_diffusers.combining.networks import student_of
from cm_diffusers.combining.result import save_combination
from cm_diffusers.combining.runs import CombineConfig, find_run
from cm_diffusers.combining.vectors import ema, one_hot, uniform
from cm_diffusers.engine.averages import rebuild
from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError
from cm_diffusers.models.students import HALF
from cm_diffusers.models.teachers import load_stock
from cm_diffusers.models.time_weight import weights_without_head
from cm_diffusers.places import public
from cm_diffusers.publishing.pipelines import save_pipeline
from cm_diffusers.publishing.provenance import read_provenance
from cm_diffusers.record import read_record


@dataclass
class ExportConfig:
    """Which average, and of which run; of snapshots their mean (SWA, 1803.05407) unless a flag says otherwise."""

    run_dir: str = HfArg(help="Output folder of a finished training with --ema_sigma_rels or --snapshot_steps.")
    sigma_rel: float | None = HfArg(
        default=None,
        help="A power-function average of --ema_sigma_rels (2312.02696, Sec. 3.2): standard deviation over steps, a share of all.",
    )
    ema_rate: float | None = HfArg(default=None, help="An exponential average of the snapshots of --snapshot_steps.")
    window: list[int] | None = HfArg(default=None, help="First and last step of the snapshots; all if not given.")
    step: int | None = HfArg(
        default=None,
        help="With --sigma_rel: of which checkpoint, the last if not given. Alone: the snapshot of this step.",
    )
    lora_rank: int | None = HfArg(default=None, help="Of the average of LoRAs; that of the training if not given.")
    output_dir: str = HfArg(default="runs/average", help="Where the pipeline or LoRA goes.")
    save_fp16: bool = HfArg(default=False, help=f"Store network and VAE, or the LoRA, in half precision: {HALF}.")


def export_average(config: ExportConfig) -> None:
    """
    Raises:
        ValueError: The run keeps nothing of the kind, or the flags do not go together.
    """
    if Path(config.output_dir).exists():
        raise UserError(f"--output_dir {config.output_dir} exists already: give a new folder.")
    _of_snapshots(config) if config.sigma_rel is None else _of_averages(config, Path(config.run_dir) / "pipeline")


def _of_averages(config: ExportConfig, source: Path) -> None:
    refuse_changed(config, "ema_rate window lora_rank", "with --sigma_rel")
    if not (source / "model_index.json").is_file():
        raise UserError(f"{config.run_dir} has no folder pipeline: the training has not ended, or it made a LoRA.")
    average, step = rebuild(Path(config.run_dir), config.sigma_rel, config.step)
    pipe, provenance = load_stock(source), read_provenance(source)
    settings = provenance.settings | {"sigma_rel": config.sigma_rel, "average_of_step": step}
    provenance, network = replace(provenance, name=public(config.output_dir), settings=settings), student_of(pipe)
    network.load_state_dict(network.state_dict() | weights_without_head(average))
    save_pipeline(pipe, Path(config.output_dir), config.save_fp16, read_record(source), provenance)


def _of_snapshots(config: ExportConfig) -> None:
    if config.step is not None:
        refuse_changed(config, "ema_rate window", "with --step, which takes one snapshot")
    given = {name: getattr(config, name) for name in ("run_dir", "window", "lora_rank", "output_dir", "save_fp16")}
    source = find_run(combine := CombineConfig(**given))
    steps = [kept.step for kept in source.kept]
    if config.step is not None and config.step not in steps:
        raise UserError(
            f"{config.run_dir} has no snapshot of step {config.step}; of {', '.join(map(str, steps))} it has."
        )
    vector = uniform(len(steps)) if config.ema_rate is None else ema(len(steps), config.ema_rate)
    vector = vector if config.step is None else one_hot(len(steps), steps.index(config.step))
    told = dict(zip(map(str, steps), vector.tolist(), strict=True))
    provenance = read_provenance(source.result)
    settings = provenance.settings | {"weights_of_steps": {step: weight for step, weight in told.items() if weight}}
    provenance = replace(provenance, name=public(config.output_dir), settings=settings)
    save_combination(source, combine, vector, Path(config.output_dir), provenance)
