"""A student of one step, distilled with prompts alone."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from diffusers import DiffusionPipeline
from torch import nn

from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.prompts_alone import PromptDataConfig, batches_of_prompts
from cm_diffusers.data.teacher_latents import check_side
from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.sharding import comes_from_the_first
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.errors import UserError
from cm_diffusers.models.critics import CriticConfig
from cm_diffusers.models.families.base import answers_clips, latents_of, network_of
from cm_diffusers.models.quantization import quantization_config
from cm_diffusers.models.students import StudentConfig, make_networks
from cm_diffusers.models.teachers import TeacherConfig, load_network, network_name, release_encoders
from cm_diffusers.objectives.boot import BOOTObjective
from cm_diffusers.publishing.pipelines import lcm_pipeline, lcm_record
from cm_diffusers.publishing.provenance import describe_run
from cm_diffusers.tasks.callbacks import ValidationConfig, sample_grid
from cm_diffusers.tasks.publish import publish, save_student
from cm_diffusers.tasks.summary import announce
from cm_diffusers.tasks.teachings import student_scheduler
from cm_diffusers.tasks.text_to_image import guidance_of
from cm_diffusers.tasks.text_to_image_checks import check_late
from cm_diffusers.tasks.watching import WatchConfig, make_watch
from cm_diffusers.types import Networks


WHAT_A_RUN_IS = (TeacherConfig, StudentConfig, PromptDataConfig)  # beside method and training


def latent_shape(teacher: DiffusionPipeline, resolution: int) -> tuple[int, int, int]:
    """Of what the network sees of a square image of so many pixels, (C, h, w).

    Raises:
        ValueError: Its pipeline would not make images of this size.
    """
    check_side(teacher, resolution)
    latents = latents_of(teacher)
    return latents.channels, resolution // latents.downscale, resolution // latents.downscale


def distill(
    teacher: DiffusionPipeline,
    objective: BOOTObjective,
    optim: OptimConfig,
    configs: Sequence[object],
    repo_id: str | None,
) -> str | None:
    """As the `distill` of `text_to_image`, of prompts alone, which the student answers in one step.

    Args:
        teacher: Without its network (`load_teacher`'s `late`).
        configs: The script's, for its flags and for the card; those of `WHAT_A_RUN_IS` among them.
    """
    given, method = {type(config): config for config in configs}, objective.config
    source, student, data = (given[kind] for kind in WHAT_A_RUN_IS)
    train, validation, watch = given[TrainConfig], given[ValidationConfig], given[WatchConfig]
    refuse_changed(validation, "validation_nfe", "here: the student makes its images in one step")
    refuse_changed(train, "ema_decay", "with boot: it has no averaged target")
    if watch.stop_when and (steps := watch.evaluation()[0].num_inference_steps) != [1]:
        raise UserError(
            f"--stop_evaluation has --num_inference_steps {steps}, but BOOT's student takes one step: give 1."
        )
    scheduler = student_scheduler(teacher, method)

    def make_pipeline(network: nn.Module) -> DiffusionPipeline:
        return lcm_pipeline(teacher, network, scheduler)

    guidance, scale = guidance_of(objective, validation)
    grid = sample_grid(replace(validation, validation_nfe=[1]), make_pipeline, teacher, scale, data.resolution)
    watching = make_watch(watch, make_pipeline, scale, data.resolution)
    quantization = quantization_config(student.quantize_teacher, student.loaded_dtype, network_name(teacher))
    check_late(teacher, student, False, CriticConfig("none"))
    batches = None

    def after_the_prompts(*place: object) -> Networks:
        nonlocal batches
        batches = batches_of_prompts(data, Encoders.from_pipeline(teacher), train.seed, *place)
        if student.lora and not validation.validation_prompts and watch.stop_when is None:
            release_encoders(teacher)
        if not comes_from_the_first():
            load_network(teacher, source, student.loaded_dtype, quantization)
        seed_everything(train.seed)  # adapters start alike, whatever the cache held
        return replace(make_networks(network_of(teacher), student), target=None)  # which BOOT does not have

    settings = [given[kind] for kind in WHAT_A_RUN_IS]
    trainer = Trainer(train, after_the_prompts, objective, optim, settings, callbacks=[grid])
    result, watcher = "lora" if student.lora else "pipeline", watching(trainer)
    trainer.fit(announce(trainer, batches, configs, result))
    base = source.pretrained_teacher_model
    record = lcm_record(base, guidance, method.w_min, method.w_max, scale, scheduler)
    steps = {"one_step": True, "recommended_num_inference_steps": 1}
    frames = 1 if answers_clips(teacher) else None
    record = replace(record, method="boot", resolution=data.resolution, num_frames=frames, **steps)
    describe = partial(describe_run, configs, teacher, base, "prompts alone")
    return publish(
        trainer, result, configs, describe, partial(save_student, student, make_pipeline, record), repo_id, watcher
    )
