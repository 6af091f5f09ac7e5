"""Distil a Stable Diffusion + AnimateDiff teacher into a 1-8 step video student, stage by stage (AnimateLCM)."""

import cm_diffusers.engine.early
from dataclasses import replace
from functools import partial

from diffusers import LCMScheduler

from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.video import VideoDataConfig, video_batches
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.optimizers import CooledOptimConfig
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.models.motion import MotionConfig, check_frames, load_motion_adapter, motion_scheduler
from cm_diffusers.models.students import require_autocast
from cm_diffusers.models.teachers import TeacherConfig
from cm_diffusers.objectives.lcm import LCMConfig
from cm_diffusers.places import public
from cm_diffusers.publishing.hub import HubConfig, check_hub
from cm_diffusers.publishing.pipelines import lcm_record
from cm_diffusers.publishing.provenance import describe_run
from cm_diffusers.tasks.animatelcm import Parts, StageConfig, idle_settings, make_stage
from cm_diffusers.tasks.callbacks import ValidationConfig
from cm_diffusers.tasks.clip_grids import stage_grid
from cm_diffusers.tasks.motion_base import load_image_model
from cm_diffusers.tasks.publish import publish
from cm_diffusers.tasks.summary import announce


CONFIGS = (
    TeacherConfig, MotionConfig, StageConfig, VideoDataConfig, LCMConfig, CooledOptimConfig, TrainConfig, ValidationConfig, HubConfig,
)  # fmt: skip


def main() -> None:
    source, motion, config, data, method, optim, train, validation, hub = configs = parse_configs(CONFIGS, __doc__)
    seed_everything(train.seed)
    require_autocast(config, train.mixed_precision)
    repo_id = check_hub(hub, train.output_dir, train.report_to)
    image = load_image_model(source)
    ddim = motion_scheduler(motion, image.scheduler)
    grid = {"original_inference_steps": method.num_ddim_timesteps, "timestep_scaling": method.timestep_scaling_factor}
    scheduler = LCMScheduler.from_config(ddim.config, **grid)
    adapter = None if config.stage == "image_lora" else load_motion_adapter(motion)
    if adapter is not None:
        check_frames(data.sample_n_frames, adapter, "--sample_n_frames")
    stage = make_stage(config, method, Parts(image, adapter, scheduler))
    shape = data.sample_n_frames, data.resolution
    samples = stage_grid(config, validation, stage, Parts(image, adapter, ddim), *shape)
    settings = [source, motion, config, data, method]
    trainer = Trainer(train, stage.nets, stage.objective, optim, settings, callbacks=samples)
    batches = video_batches(data, Encoders.from_pipeline(image), train.seed, *trainer.place, **stage.wanted)
    announce(trainer, batches, configs, stage.result)
    trainer.fit(stage.views(batches))
    base, seen = source.pretrained_teacher_model, data.source
    seen = f"single frames of {public(seen)}" if config.stage == "image_lora" else seen
    record = lcm_record(base, "distilled", method.w_min, method.w_max, 1.0, scheduler)
    frames = None if config.stage == "image_lora" else data.sample_n_frames
    record = replace(record, resolution=data.resolution, num_frames=frames)
    describe = partial(describe_run, configs, image, base, seen, left_out=idle_settings(config.stage))

    def save(network, folder, provenance):
        stage.save(network, folder, record, provenance)

    if address := publish(trainer, stage.result, configs, describe, save, repo_id):
        print(address)


if __name__ == "__main__":
    run(main)
