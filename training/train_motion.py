"""Make an image model a video model: train motion modules between its frozen layers on clips with captions (AnimateDiff)."""

import cm_diffusers.engine.early
from dataclasses import replace
from functools import partial

from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.video import VideoDataConfig, video_batches
from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.engine.cli import parse_configs, refuse_changed, run
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.models.motion import (
    MotionConfig,
    NewMotionConfig,
    inflate,
    motion_adapter_of,
    motion_scheduler,
    starting_adapter,
    train_motion,
    video_pipeline,
)
from cm_diffusers.models.teachers import TeacherConfig
from cm_diffusers.objectives.diffusion import DiffusionConfig, DiffusionObjective
from cm_diffusers.publishing.hub import HubConfig, check_hub
from cm_diffusers.publishing.pipelines import MotionResultConfig, save_motion_adapter
from cm_diffusers.publishing.provenance import describe_run
from cm_diffusers.tasks.callbacks import ValidationConfig
from cm_diffusers.tasks.clip_grids import clip_grid
from cm_diffusers.tasks.motion_base import load_image_model
from cm_diffusers.tasks.publish import publish
from cm_diffusers.tasks.summary import announce
from cm_diffusers.types import Networks


CONFIGS = (
    TeacherConfig, MotionConfig, NewMotionConfig, VideoDataConfig, DiffusionConfig, OptimConfig, TrainConfig, ValidationConfig,
    MotionResultConfig, HubConfig,
)  # fmt: skip


def main() -> None:
    configs = parse_configs(CONFIGS, __doc__)
    source, motion, new, data, method, optim, train, validation, result, hub = configs
    seed_everything(train.seed)
    repo_id = check_hub(hub, train.output_dir, train.report_to)
    refuse_changed(data, "proportion_empty_prompts", "here: --condition_dropout does that")
    refuse_changed(method, "prediction_type", "here: it is the image model's")
    refuse_changed(validation, "validation_teacher_steps", "without a teacher")
    if motion.pretrained_motion_adapter:
        refuse_changed(new, "motion_num_attention_heads motion_max_seq_length", "with --pretrained_motion_adapter")
    image = load_image_model(source)
    scheduler = motion_scheduler(motion, image.scheduler)
    adapter = starting_adapter(motion, new, image.unet, data.sample_n_frames)
    unet = train_motion(inflate(image.unet, adapter))
    method = replace(method, prediction_type=scheduler.config.prediction_type)
    objective = DiffusionObjective(method, DiscreteVP.from_scheduler(scheduler))

    def make_pipeline(network):
        return video_pipeline(image, network, adapter, scheduler)

    shape = data.sample_n_frames, data.resolution, validation.validation_guidance_scale
    grid = clip_grid(validation, make_pipeline, *shape)
    trainer = Trainer(train, Networks(unet), objective, optim, [source, motion, new, data], callbacks=[grid])
    batches = video_batches(data, Encoders.from_pipeline(image), train.seed, *trainer.place)
    trainer.fit(announce(trainer, batches, configs, "motion_adapter"))

    def save(network, folder, provenance):
        save_motion_adapter(motion_adapter_of(network, adapter), scheduler, folder, result.save_fp16, provenance)

    describe = partial(describe_run, configs, image, source.pretrained_teacher_model, data.source)
    if address := publish(trainer, "motion_adapter", configs, describe, save, repo_id):
        print(address)


if __name__ == "__main__":
    run(main)
