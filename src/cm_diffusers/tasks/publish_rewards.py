"""What reward fine-tuning publishes: a student with its record, or a diffusion model; whole or as a LoRA."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.places import public
from cm_diffusers.publishing.folders import write_result
from cm_diffusers.publishing.lora_export import Lora
from cm_diffusers.publishing.other_cards import tuned_card
from cm_diffusers.publishing.pipelines import save_pipeline
from cm_diffusers.publishing.provenance import Provenance, describe_run
from cm_diffusers.tasks.publish import publish, save_student
from cm_diffusers.tasks.reward_runs import RewardModelConfig, Tuned


logger = logging.getLogger(__name__)


def publish_run(
    method: str,
    trainer: Trainer,
    tuned: Tuned,
    configs: Sequence[object],
    resolution: int | None,
    data: str,
    repo_id: str | None,
) -> None:
    """Save what a script of reward fine-tuning has trained, and push it where that was asked for.

    Args:
        method: For the record.
        configs: The script's, for its flags and for the card.
        resolution: Side of the images, where one was asked for.
        data: What it was trained on, in words or as a folder.
        repo_id: On the Hub; None to save alone.
    """
    given = {type(config): config for config in configs}
    source = given[RewardModelConfig]
    unused = ["validation_guidance_scale", "validation_teacher_steps"]
    unused += ["eta"] * (tuned.record is not None) + ["ema_decay"] * (trainer.nets.target is None)
    describe = partial(describe_run, configs, tuned.pipe, source.pretrained_student_model, data, left_out=unused)
    save = partial(publish_tuned, method, tuned, source, tuned.side(resolution))
    if address := publish(trainer, result_name(source), configs, describe, save, repo_id):
        logger.info("Published: %s", address)


def result_name(config: RewardModelConfig) -> str:
    """Of the folder."""
    return "lora" if config.lora else "pipeline"


def publish_tuned(
    method: str,
    tuned: Tuned,
    config: RewardModelConfig,
    side: int | None,
    network: nn.Module,
    folder: Path,
    provenance: Provenance,
) -> None:
    """A LoRA, or a whole pipeline; of a student with its record and card.

    Args:
        method: For the record.
        side: Of the images in pixels; None of those that are not square.
    """
    if tuned.record is not None:
        record = replace(
            tuned.record,
            method=method,
            base_model=config.pretrained_student_model,
            recommended_num_inference_steps=tuned.policy.num_steps,
            recommended_guidance_scale=tuned.guidance_scale,
            resolution=side,
        )
        save_student(config, tuned.pipeline, record, network, folder, provenance)
        return
    card = tuned_card(method, provenance, config.lora, tuned.policy)
    if config.lora:
        title = f"{method}_lora_{public(config.pretrained_student_model).rstrip('/').rpartition('/')[2]}"
        prediction = tuned.pipe.scheduler.config.prediction_type
        write = Lora.of(network).writer(title, prediction, config.save_fp16)
        write_result(folder, [write], provenance=provenance, card=card)
    else:
        save_pipeline(tuned.pipeline(network), folder, config.save_fp16, provenance=provenance, card=card)
