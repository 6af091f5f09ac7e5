"""Frames of sampled clips while a video model trains: a row for each prompt and number of steps."""

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.evaluation.grids import image_grid
from cm_diffusers.models.motion import video_pipeline
from cm_diffusers.tasks.animatelcm import Parts, Stage, StageConfig
from cm_diffusers.tasks.callbacks import SampleGrids, ValidationConfig, beside, sample_grid


def clip_grid(
    config: ValidationConfig,
    make_pipeline: Callable[[nn.Module], DiffusionPipeline],
    num_frames: int,
    resolution: int,
    guidance_scale: float,
    teacher: DiffusionPipeline | None = None,
) -> SampleGrids:
    """As `sample_grid`, of clips.

    Args:
        make_pipeline: Trained network -> the pipeline it samples in.
        num_frames: Of a clip; all are shown.
        guidance_scale: Of the trained network; the teacher's is the config's.
        teacher: Sampled once, above the rest.
    """
    asked = [(prompt, seed) for prompt in config.validation_prompts or [] for seed in config.validation_seeds]
    above: list[tuple[str, Tensor]] = []

    def sample(pipe: DiffusionPipeline, name: str, steps: int, scale: float) -> list[tuple[str, Tensor]]:
        return [(f"{prompt}: {name}", _clip(pipe, prompt, seed, steps, scale)) for prompt, seed in asked]

    def _clip(pipe: DiffusionPipeline, prompt: str, seed: int, steps: int, scale: float) -> Tensor:
        with beside(pipe.unet, pipe):
            frames = pipe(
                prompt,
                num_frames=num_frames,
                height=resolution,
                width=resolution,
                num_inference_steps=steps,
                guidance_scale=scale,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt",
            ).frames
        return frames[0].float().cpu()

    def draw(trainer: Trainer) -> Image.Image:
        if teacher is not None and not above:
            steps = config.validation_teacher_steps
            with trainer.accelerator.autocast():
                above.extend(sample(teacher, f"teacher, {steps}", steps, config.validation_guidance_scale))
        rows = list(above)
        with trainer.export_weights() as network, trainer.accelerator.autocast():
            pipe = make_pipeline(network)
            for steps in config.validation_nfe:
                rows += sample(pipe, str(steps), steps, guidance_scale)
        return image_grid([clip for _, clip in rows], [name for name, _ in rows], [str(i) for i in range(num_frames)])

    return SampleGrids(config.validation_steps, draw, bool(asked))


def stage_grid(
    config: StageConfig, validation: ValidationConfig, stage: Stage, teacher: Parts, num_frames: int, resolution: int
) -> list[SampleGrids]:
    """The callbacks that draw sample grids, the teacher's on top.

    Args:
        teacher: With the scheduler that it is sampled with.

    Raises:
        ValueError: Prompts were given for a stage without grids.
    """
    if stage.make_pipeline is None:
        refuse_changed(validation, "validation_prompts", f"in stage {config.stage}: it takes more than prompts")
        return []
    if config.stage == "image_lora":
        return [sample_grid(validation, stage.make_pipeline, teacher.image, 1.0, resolution)]
    above = video_pipeline(teacher.image, stage.nets.teacher, teacher.adapter, teacher.scheduler)
    return [clip_grid(validation, stage.make_pipeline, num_frames, resolution, 1.0, above)]
