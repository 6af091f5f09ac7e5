"""The end of a training: its result described, saved and pushed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.publishing.hub import HubConfig, push_folder
from cm_diffusers.publishing.pipelines import save_lora, save_pipeline
from cm_diffusers.publishing.provenance import Provenance
from cm_diffusers.record import Record
from cm_diffusers.tasks.callbacks import show_end
from cm_diffusers.tasks.summary import conclude
from cm_diffusers.tasks.watching import Watch


def publish(
    trainer: Trainer,
    result: str,
    configs: Sequence[object],
    describe: Callable[[str], Provenance],
    save: Callable[[nn.Module, Path, Provenance], None],
    repo_id: str | None,
    watch: Watch | None = None,
) -> str | None:
    """Draw and save what was trained, say where it is and what comes next, push it where that was asked for, and end the run.

    Args:
        result: Name of its folder in that of the run.
        configs: The script's dataclasses, the `HubConfig` among them.
        describe: Name that the card shall give -> provenance.
        save: (trained network, folder, provenance) -> None; by the main process alone.
        repo_id: On the Hub; None to save alone.
        watch: Of the run, whose best weights are the result; None for the last ones.

    Returns:
        The address on the Hub; None where nothing was pushed, and beside the main process.
    """
    address, folder = None, trainer.output_dir / result
    show_end(trainer)
    watch = watch if watch and watch.looks else None  # none of a finished run that is only published
    with trainer.exported() if watch is None else watch.best_weights(trainer) as network:
        if network is not None:
            provenance = describe(repo_id or str(folder))
            if watch is not None:
                best, column = watch.best, f"{watch.config.stop_when}_when_best"
                seen = {"published_step": best["step"], column: best["value"]}
                provenance = replace(provenance, settings=provenance.settings | seen)
            save(network, folder, provenance)
    if trainer.accelerator.is_main_process:
        conclude(trainer, configs, result)
        if repo_id:
            hub = next(config for config in configs if isinstance(config, HubConfig))
            address = push_folder(folder, repo_id, hub)
    trainer.end()
    return address


def save_student(
    config: Any,
    make_pipeline: Callable[[nn.Module], DiffusionPipeline],
    record: Record,
    network: nn.Module,
    folder: Path,
    provenance: Provenance,
) -> None:
    """A text-to-image student: its LoRA, or the whole pipeline.

    Args:
        config: Says which, by `lora`, and how it is stored, by `save_fp16`.
    """
    if config.lora:
        save_lora(network, folder, record, provenance, config.save_fp16)
    else:
        save_pipeline(make_pipeline(network), folder, config.save_fp16, record, provenance)
