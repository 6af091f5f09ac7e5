"""Text-to-image students, distilled from a teacher."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from cm_diffusers.data.clip_config import ClipConfig
from cm_diffusers.data.generated import GenerationConfig, training_batches
from cm_diffusers.data.sources import DataConfig, source_name
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.sharding import comes_from_the_first
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.models.critics import CriticConfig, make_critic
from cm_diffusers.models.families.base import network_of
from cm_diffusers.models.quantization import quantization_config
from cm_diffusers.models.students import StudentConfig, make_networks
from cm_diffusers.models.teachers import (
    TeacherConfig,
    load_network,
    network_name,
    release_encoders,
)
from cm_diffusers.objectives.lcm import LCMObjective
from cm_diffusers.objectives.pcm import PCMObjective
from cm_diffusers.objectives.scott import SCottObjective
from cm_diffusers.objectives.tcd import TCDObjective
from cm_diffusers.pipelines import ConsistencyPipeline
from cm_diffusers.publishing.pipelines import lcm_pipeline, lcm_record
from cm_diffusers.publishing.provenance import describe_run
from cm_diffusers.record import Record
from cm_diffusers.tasks.callbacks import ValidationConfig, sample_grid
from cm_diffusers.tasks.finished_students import FinetuneConfig
from cm_diffusers.tasks.publish import publish, save_student
from cm_diffusers.tasks.summary import announce
from cm_diffusers.tasks.teachings import student_scheduler
from cm_diffusers.tasks.text_to_image_checks import check_late, checked_frames
from cm_diffusers.tasks.watching import WatchConfig, make_watch
from cm_diffusers.types import Networks


OF_A_DISTILLATION = (
    TeacherConfig, StudentConfig, DataConfig, GenerationConfig, ClipConfig, TrainConfig, ValidationConfig, WatchConfig,
)  # fmt: skip
WHAT_A_RUN_IS = (
    TeacherConfig,
    StudentConfig,
    DataConfig,
    GenerationConfig,
    ClipConfig,
    CriticConfig,
)  # beside method and training
MakePipeline = Callable[[nn.Module], DiffusionPipeline]


def distill(
    name: str,
    teacher: DiffusionPipeline,
    objective: LCMObjective | SCottObjective | PCMObjective | TCDObjective,
    optim: OptimConfig | dict[str, OptimConfig],
    configs: Sequence[object],
    repo_id: str | None,
) -> str | None:
    """Train a student, save it with record and card, and push it where that was asked for.

    Args:
        name: Of the method, in the record.
        teacher: Without its network (`load_teacher`'s `late`), of which the networks are made once VAE and text towers have
            done their work; or whole.
        optim: As for `Trainer`.
        configs: The script's, for its flags and for the card; those of `OF_A_DISTILLATION` among them, and a `CriticConfig`
            where there may be a critic.
        repo_id: On the Hub; None to save alone.

    Returns:
        As `publish`.
    """
    given, method = {type(config): config for config in configs}, objective.config
    source, student, data, generation, clips, train, validation, watch = (given[kind] for kind in OF_A_DISTILLATION)
    scheduler = student_scheduler(teacher, method)
    make_pipeline = partial(lcm_pipeline, teacher, scheduler=scheduler)
    guidance, scale = guidance_of(objective, validation)
    judge = given.get(CriticConfig, CriticConfig("none"))
    frames = checked_frames(clips, data, teacher, bool(generation.prompts_file), judge)
    base, target_dim = source.pretrained_teacher_model, objective.teaching.target_dim
    record = lcm_record(base, guidance, method.w_min, method.w_max, scale, scheduler)
    record = replace(record, method=name, resolution=data.resolution, num_frames=frames, target_dim=target_dim)
    told = telling(make_pipeline, record)
    grid = sample_grid(validation, told, teacher, scale, data.resolution, clips.sample_n_frames)
    watching = make_watch(watch, told, scale, data.resolution)
    settings = [config for kind, config in given.items() if kind in WHAT_A_RUN_IS]
    quantization = quantization_config(student.quantize_teacher, student.loaded_dtype, network_name(teacher))
    check_late(teacher, student, bool(generation.prompts_file), judge)
    complete, batches = partial(load_network, teacher, source, student.loaded_dtype, quantization), None

    def after_the_data(*place: object) -> Networks:
        nonlocal batches
        if generation.prompts_file:  # the teacher draws the data
            complete()
        batches = training_batches(data, generation, teacher, train.seed, *place, clips)
        if not needs_encoders(student, data, validation, judge, watch):
            release_encoders(teacher)
        if not comes_from_the_first():
            complete()
        seed_everything(train.seed)  # adapters start alike, whatever the cache held
        nets = make_networks(network_of(teacher), student, target_dim)
        return replace(nets, critic=make_critic(nets, judge, teacher.vae))

    trainer = Trainer(train, after_the_data, objective, optim, settings, callbacks=[grid])
    result, watcher = "lora" if student.lora else "pipeline", watching(trainer)
    trainer.fit(announce(trainer, batches, configs, result))
    describe = partial(describe_run, configs, teacher, base, source_name(data) or generation.prompts_file)
    save = partial(save_student, student, make_pipeline, record)
    return publish(trainer, result, configs, describe, save, repo_id, watcher)


def guidance_of(objective: Any, validation: ValidationConfig) -> tuple[str, float]:
    """What guidance is to the student, as in `Record`, and the scale to sample it with."""
    if objective.teaching.guiding.told is None:
        return "distilled", 1.0
    low, high = objective.config.w_min + 1, objective.config.w_max + 1
    return "embedded", min(max(validation.validation_guidance_scale, low), high)


def telling(make_pipeline: MakePipeline, record: Record) -> MakePipeline:
    """Makes a pipeline of ours where stock ones would not tell a student where each step goes."""
    if record.target_dim is None:
        return make_pipeline
    return lambda network: ConsistencyPipeline.from_pipe(make_pipeline(network), record=asdict(record))


def needs_encoders(
    student: StudentConfig | FinetuneConfig,
    data: DataConfig,
    validation: ValidationConfig,
    judge: CriticConfig | None = None,
    watch: WatchConfig | None = None,
) -> bool:
    """Whether VAE or text towers are called after the cache is filled, or are part of the result."""
    judges_images = judge is not None and judge.critic == "vision"
    draws = bool(validation.validation_prompts) or (watch is not None and watch.stop_when is not None)
    return not student.lora or data.streaming or draws or judges_images


def text_dtype(configs: Sequence[object]) -> torch.dtype:
    """Of the teacher's text towers: bfloat16 in such a run, where they encode captions for the cache and are done."""
    given = {type(config): config for config in configs}
    _, student, data, generation, _, train, validation, watch = (given[kind] for kind in OF_A_DISTILLATION)
    kept = generation.prompts_file or needs_encoders(student, data, validation, given.get(CriticConfig), watch)
    return torch.bfloat16 if train.mixed_precision == "bf16" and not kept else torch.float32


def critic_optim(config: CriticConfig, student: OptimConfig) -> OptimConfig:
    """How the critic learns."""
    return replace(
        student,
        learning_rate=config.critic_learning_rate,
        adam_beta1=config.critic_adam_beta1,
        adam_beta2=config.critic_adam_beta2,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        lr_cooldown_steps=0,
        lr_cooldown_shape="1-sqrt",
    )
