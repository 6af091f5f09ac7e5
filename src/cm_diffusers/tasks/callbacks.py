"""What happens after an optimizer step, beside learning: `(trainer, loss) -> None`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.tracking import GeneralTracker
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.data.encoders import placed
from cm_diffusers.engine.accelerator import any_rank
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.errors import UserError, optional
from cm_diffusers.evaluation.grids import image_grid
from cm_diffusers.evaluation.report import replace_file
from cm_diffusers.evaluation.sampling import generate, generate_unprompted
from cm_diffusers.models.adapters import adapter_layers, adapters_off
from cm_diffusers.models.families.base import network_of
from cm_diffusers.ranges import check_ranges
from cm_diffusers.schedulers.stepping import ToldScheduler
from cm_diffusers.types import Loss


SHOWN_FRAMES = 4  # of a clip, from the first to the last
AT_ONCE = 4  # images of a grid, beside all that training keeps in memory


@dataclass
class ValidationConfig:
    """Grids of samples while training: fixed prompts and seeds, a row for each number of steps."""

    validation_prompts: list[str] | None = HfArg(default=None, help="Prompts to sample; none, no grids.")
    validation_steps: int = HfArg(default=500, help="Optimizer steps between grids; one more at the end.")
    validation_seeds: list[int] = HfArg(default_factory=lambda: [0, 1], help="Seeds sampled for each prompt.")
    validation_nfe: list[int] = HfArg(
        default_factory=lambda: [1, 2, 4, 8], help="Sampling steps, a row of the grid each."
    )
    validation_guidance_scale: float = HfArg(
        default=8.0, help="Guidance scale of the samples; the record beside the weights recommends it."
    )
    validation_teacher_steps: int = HfArg(default=50, help="Sampling steps of the teacher's row.")

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class SampleGrids:
    """A callback that saves `samples/step-<n>.png` and shows it in the tracker: at intervals, and when training ends.

    Attributes:
        interval: Optimizer steps between grids.
        draw: The grid of what the trainer has.
        wanted: Whether anything is to be drawn.
    """

    interval: int
    draw: Callable[[Trainer], Image.Image]
    wanted: bool = True

    def __call__(self, trainer: Trainer, loss: Loss) -> None:
        if trainer.step % self.interval == 0 or has_ended(trainer):
            self.show(trainer)

    def show(self, trainer: Trainer) -> None:
        if self.wanted and trainer.takes_part:
            grid = self.draw(trainer)
            if trainer.accelerator.is_main_process:
                publish_grid(trainer, grid)


def has_ended(trainer: Trainer) -> bool:
    """Whether the step just taken is the last."""
    return trainer.step == trainer.config.max_train_steps or bool(trainer.stopping)


def show_end(trainer: Trainer) -> None:
    """The grid of a training's end, where a run that was stopped after its last checkpoint has not drawn it; asked by all.

    One that cannot be drawn is a warning: the result is worth more.
    """
    missing = trainer.accelerator.is_main_process and not grid_path(trainer).is_file()
    missing = any_rank(trainer.accelerator, missing)  # others may look before it is written
    for callback in trainer.callbacks:
        if isinstance(callback, SampleGrids) and missing:
            with optional("The last grid"):
                callback.show(trainer)


def sample_grid(
    config: ValidationConfig,
    make_pipeline: Callable[[nn.Module], DiffusionPipeline],
    teacher: DiffusionPipeline | None = None,
    guidance_scale: float | None = None,
    resolution: int | None = None,
    num_frames: int | None = None,
) -> SampleGrids:
    """Grids of a text-to-image student, or of a text-to-video one.

    Args:
        make_pipeline: Student network -> the pipeline it will be published in; there is no other sampling path.
        teacher: Sampled once, for the top row.
        guidance_scale: The student's, where it is not the teacher's (LoRA).
        resolution: Side of the samples; the pipelines' own default if not given.
        num_frames: Of clips, of which `SHOWN_FRAMES` are shown; None for images.
    """
    shown = [] if num_frames is None else np.linspace(0, num_frames - 1, SHOWN_FRAMES).round().astype(int).tolist()
    prompts = [prompt for prompt in config.validation_prompts or [] for _ in config.validation_seeds]
    seeds = config.validation_seeds * len(config.validation_prompts or [])
    rows: list[Tensor] = []

    def sample(pipe: DiffusionPipeline, steps: int, scale: float) -> Tensor:
        with beside(network_of(pipe), pipe):
            at_once = 1 if shown else AT_ONCE
            samples, _ = generate(pipe, prompts, seeds, steps, scale, at_once, resolution, num_frames=num_frames)
            return samples[:, shown].flatten(0, 1) if shown else samples

    def draw(trainer: Trainer) -> Image.Image:
        names = [f"{steps} step{'s' * (steps > 1)}" for steps in config.validation_nfe]
        if teacher is not None:
            names.insert(0, f"teacher, {config.validation_teacher_steps}")
            if not rows:
                with adapters_off(adapter_layers(network_of(teacher))), trainer.accelerator.autocast():
                    rows.append(sample(teacher, config.validation_teacher_steps, config.validation_guidance_scale))
        scale = config.validation_guidance_scale if guidance_scale is None else guidance_scale
        with trainer.export_weights() as student, precision(trainer, student):
            pipe = make_pipeline(student)
            samples = [sample(pipe, steps, scale) for steps in config.validation_nfe]
        heads = [f"{p} ({s})" for p, s in zip(prompts, seeds, strict=True)]
        heads = [f"{head}, frame {number}" for head in heads for number in shown] or heads
        return image_grid(rows + samples, names, heads)

    return SampleGrids(config.validation_steps, draw, bool(prompts))


@dataclass
class ImageValidationConfig:
    """Grids of samples while training: fixed seeds, a row for each number of steps."""

    validation_images: int = HfArg(default=8, help="Images in a row; 0, no grids.")
    validation_prompts: list[str] | None = HfArg(
        default=None, help="Prompts of a model that reads text, one after the other; none, no grids of it."
    )
    validation_steps: int = HfArg(default=500, help="Optimizer steps between grids; one more at the end.")
    validation_nfe: list[int] | None = HfArg(
        default=None,
        help="Sampling steps, a row of the grid each; if not given, 1 and 2, or where a step is no jump to the data, as many "
        "as the result recommends.",
    )

    def __post_init__(self) -> None:
        check_ranges(self)


def image_grids(
    config: ImageValidationConfig,
    make_pipeline: Callable[[nn.Module], DiffusionPipeline],
    scheduler: ToldScheduler,
    resolution: int | None = None,
    guidance_scale: float = 1.0,
) -> SampleGrids:
    """As `sample_grid`, for models in EDM's coordinates, which most often take no prompts.

    Args:
        scheduler: The pipeline's.
        resolution: Of a model that reads text; None for one that does not.
        guidance_scale: Of a model that reads text.

    Raises:
        ValueError: The scheduler has not so many steps, or prompts are for nobody.
    """
    points, known = scheduler.config.num_train_timesteps, len(scheduler.config.recommended_sigmas)
    nfe = config.validation_nfe or ([known] if scheduler.config.gamma == 0 else [1, 2])
    if too_many := [steps for steps in nfe if steps > points and steps != known]:
        raise UserError(f"--validation_nfe {too_many[0]} is more than the {points} points of the grid; give fewer.")
    if config.validation_prompts and resolution is None:
        raise UserError("--validation_prompts are for a model that reads text: leave them out.")
    count, prompts = config.validation_images, config.validation_prompts or []
    captions = [prompts[i % len(prompts)] for i in range(count)] if prompts else [f"seed {i}" for i in range(count)]

    def sample(pipe: DiffusionPipeline, steps: int) -> Tensor:
        with beside(pipe.unet if resolution is None else network_of(pipe), pipe):
            if resolution is not None:
                return generate(pipe, captions, range(count), steps, guidance_scale, AT_ONCE, resolution)[0]
            return generate_unprompted(pipe, range(count), steps, AT_ONCE)[0]

    def draw(trainer: Trainer) -> Image.Image:
        with trainer.export_weights() as student, precision(trainer, student):
            pipe = make_pipeline(student)
            samples = [sample(pipe, steps) for steps in nfe]
        names = [f"{steps} step{'s' * (steps > 1)}" for steps in nfe]
        return image_grid(samples, names, captions)

    return SampleGrids(config.validation_steps, draw, bool(count and (resolution is None or prompts)))


def beside(network: nn.Module, pipe: DiffusionPipeline) -> AbstractContextManager:
    """The other parts of a pipeline are on its network's device inside the block, and back where they were after it."""
    others = [part for part in pipe.components.values() if isinstance(part, nn.Module) and part is not network]
    return placed(tuple(others), network.device)


def precision(trainer: Trainer, network: nn.Module) -> AbstractContextManager:
    """That of training; but of fp16, in which some VAEs overflow, only for a network that cannot do without."""
    is_cast = next(network.parameters()).dtype != torch.float32  # below a LoRA
    wanted = is_cast or trainer.config.mixed_precision != "fp16"
    return trainer.accelerator.autocast() if wanted else nullcontext()


def publish_grid(trainer: Trainer, grid: Image.Image) -> None:
    """Saves `samples/step-<n>.png` and shows it in the tracker."""
    path = grid_path(trainer)
    path.parent.mkdir(exist_ok=True)
    replace_file(path, partial(grid.save, format="PNG"))
    pixels, name = np.asarray(grid.convert("RGB")), trainer.config.report_to
    for tracker in trainer.accelerator.trackers:
        TRACK_IMAGE[name](tracker, pixels, trainer.step)


def grid_path(trainer: Trainer) -> Path:
    return trainer.output_dir / "samples" / f"step-{trainer.step:06d}.png"


def _to_trackio(tracker: GeneralTracker, pixels: np.ndarray, step: int) -> None:
    import trackio

    tracker.log({"samples": trackio.Image(pixels)}, step=step)


TRACK_IMAGE = {
    "tensorboard": lambda tracker, pixels, step: tracker.log_images(
        {"samples": pixels[None]}, step=step, dataformats="NHWC"
    ),
    "wandb": lambda tracker, pixels, step: tracker.log_images({"samples": [pixels]}, step=step),
    "trackio": _to_trackio,
}
