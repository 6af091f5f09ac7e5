"""Loading any pipeline of clips, and drawing reproducible clips from it."""

import inspect
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, MotionAdapter, SchedulerMixin
from torch import Tensor
from tqdm.auto import tqdm

from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation.candidates import Candidate, check_weights
from cm_diffusers.evaluation.sampling import load_pipeline
from cm_diffusers.models.motion import (
    MotionConfig,
    check_frames,
    inflate,
    load_motion_adapter,
    motion_scheduler,
    video_pipeline,
)
from cm_diffusers.pipelines.pipeline_consistency_video import ConsistencyVideoPipeline
from cm_diffusers.record import base_model_of, read_record


logger = logging.getLogger(__name__)
OF_ADAPTER = "motion_adapter_revision beta_schedule"


def load_video_pipeline(
    source: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DiffusionPipeline:
    """A silent pipeline of clips: `ConsistencyVideoPipeline` for a student with its record, or what the folder says.

    Raises:
        ValueError: There is no such pipeline, or one of images.
    """
    if read_record(source) is None:
        pipe = load_pipeline(source, dtype, device)
    else:
        pipe = ConsistencyVideoPipeline.from_pretrained(source, dtype=dtype).to(device)
    if "num_frames" not in inspect.signature(pipe.__call__).parameters:
        raise UserError(f"{source!r} is a {type(pipe).__name__}, which makes no clips; give a video pipeline.")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_video_pipeline(source: str, num_frames: int, resolution: int) -> None:
    """Looks at its files before anything is loaded; logs where it was trained for other clips.

    Raises:
        ValueError: There is no such pipeline, or one of images, or weights are missing or damaged.
    """
    record = read_record(source)
    if record is None:
        kind = Candidate.of(source).index.get("_class_name")
        known = getattr(diffusers, str(kind), None)
        if known is not None and "num_frames" not in inspect.signature(known.__call__).parameters:
            raise UserError(f"{source!r} is a {kind}, which makes no clips; give a video pipeline.")
        return
    Candidate.of(source if (Path(source) / "model_index.json").is_file() else base_model_of(record, source))
    check_weights(Path(source).glob("*.safetensors"))
    trained, asked = (record.num_frames, record.resolution), (num_frames, resolution)
    if any(there not in (None, here) for there, here in zip(trained, asked, strict=True)):
        logger.warning(
            "%s was trained on clips of %s frames and %s px, and is measured on %s frames and %s px: --sample_n_frames and "
            "--resolution say so.",
            source,
            *trained,
            *asked,
        )


def check_video_teacher(source: str, config: MotionConfig, num_frames: int, resolution: int) -> None:
    """As `check_video_pipeline`, of what `load_video_teacher` takes.

    Raises:
        ValueError: As there; or the motion adapter is none, or does not take so many frames.
    """
    if config.pretrained_motion_adapter is None:
        refuse_changed(config, OF_ADAPTER, "without --pretrained_motion_adapter")
        check_video_pipeline(source, num_frames, resolution)
        return
    Candidate.of(source)
    check_weights(Path(config.pretrained_motion_adapter).glob("*.safetensors"))
    most = adapter_config(config).get("motion_max_seq_length", num_frames)
    if num_frames > most:
        raise UserError(
            f"--sample_n_frames {num_frames} is more than the {most} frames that the motion adapter takes."
        )


def adapter_config(config: MotionConfig) -> dict[str, Any]:
    """
    Raises:
        ValueError: There is no motion adapter.
    """
    source = config.pretrained_motion_adapter
    try:
        return MotionAdapter.load_config(source, revision=config.motion_adapter_revision)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{source!r} holds no motion adapter that can be loaded ({reason}).") from error


def load_video_teacher(
    source: str, config: MotionConfig, num_frames: int, dtype: torch.dtype, device: torch.device | str
) -> DiffusionPipeline:
    """A pipeline of AnimateDiff's shape, or an image model with the motion adapter that is named; with DDIM.

    Raises:
        ValueError: They do not load or do not fit, or the motion adapter does not take so many frames.
    """
    if config.pretrained_motion_adapter is None:
        refuse_changed(config, OF_ADAPTER, "without --pretrained_motion_adapter")
        pipe = load_video_pipeline(source, dtype, device)
        pipe.scheduler = _baseline(pipe.scheduler)
        return pipe
    image, adapter = load_pipeline(source), load_motion_adapter(config)
    check_frames(num_frames, adapter, "--sample_n_frames")
    unet, scheduler = inflate(image.unet, adapter), _baseline(motion_scheduler(config, image.scheduler))
    return video_pipeline(image, unet, adapter, scheduler).to(device, dtype)


def _baseline(scheduler: SchedulerMixin) -> DDIMScheduler:
    """DDIM whose first step is at the noisiest timestep, as few steps need it (2305.08891, Sec. 3.4)."""
    return DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing", clip_sample=False)


@torch.no_grad()
def generate_clips(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
    num_frames: int,
    resolution: int,
) -> Iterator[tuple[Tensor, float]]:
    """One clip for each prompt, from its own seed: a clip does not depend on the others in its batch.

    Args:
        pipe: Any pipeline with the arguments of `AnimateDiffPipeline`.
        prompts: N prompts.
        seeds: N seeds, of CPU generators, so that they mean the same on every device.
        num_inference_steps: Steps.
        guidance_scale: In the pipeline's own convention.
        batch_size: Clips drawn at once.
        num_frames: F.
        resolution: Height and width R in pixels.

    Yields:
        Batches (b, F, 3, R, R) in [0, 1], rounded to 8 bits and on the CPU, and their seconds after a warm-up.
    """

    def draw(rows: slice, steps: int) -> Tensor:
        clips = pipe(
            list(prompts[rows]),
            num_frames=num_frames,
            height=resolution,
            width=resolution,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[rows]],
            output_type="pt",
        ).frames
        return (clips.float() * 255).round().cpu() / 255

    draw(slice(0, batch_size), min(2, num_inference_steps))
    for start in tqdm(range(0, len(seeds), batch_size), desc=f"{num_inference_steps} steps", leave=False):
        started = time.perf_counter()
        clips = draw(slice(start, start + batch_size), num_inference_steps)
        yield clips, time.perf_counter() - started
