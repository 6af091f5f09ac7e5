"""Loading any pipeline, with prompts or without, and drawing reproducible images from it."""

import inspect
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, TCDScheduler, UNet2DConditionModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from cm_diffusers.errors import UserError
from cm_diffusers.models.adapters import adapter_layers
from cm_diffusers.models.families.base import answers_clips, guided, in_steps
from cm_diffusers.models.single_file import is_single_file
from cm_diffusers.models.teachers import check_finite, first_line, load_stock, stock_pipeline
from cm_diffusers.pipelines import ConsistencyPipeline
from cm_diffusers.pipelines.loading import WITHOUT_PROMPT
from cm_diffusers.pipelines.lora import load_lora
from cm_diffusers.pipelines.manners import refuse_contradiction
from cm_diffusers.pipelines.stock import carried
from cm_diffusers.record import RECORD, base_model_of, read_record
from cm_diffusers.schedulers.scheduling_flow_consistency import FlowConsistencyScheduler


LORA_WEIGHTS = "pytorch_lora_weights.safetensors"


def load_pipeline(
    source: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    lora: str | None = None,
    single_file_config: str | None = None,
) -> DiffusionPipeline:
    """A silent pipeline without safety checker, which would black out images that are to be measured.

    A consistency model without prompts, ours or a published one, is a `ConsistencyImagesPipeline`.

    Args:
        source: Pipeline folder, Hub id or single `.safetensors` file; or the folder of a LoRA, which is put on the base model of its record.
        dtype: Dtype of the weights.
        device: Where the pipeline runs.
        lora: Folder or Hub id of a LoRA to put on `source`.
        single_file_config: Of a single file, see `load_stock`.

    Raises:
        ValueError: if `source` holds neither a whole pipeline as its record says nor a LoRA with its record.
    """
    folder, record = Path(source), read_record(source)
    told = (
        record is not None and record.target_dim is not None
    )  # where each step goes, which stock pipelines do not say
    if not (told or is_single_file(source)) and folder.exists() and not (folder / "model_index.json").is_file():
        return load_pipeline(base_model(folder), dtype, device, source, single_file_config)
    if told or (not folder.is_file() and pipeline_index(source).get("_class_name") in WITHOUT_PROMPT):
        pipe = ConsistencyPipeline.from_pretrained(source, dtype=dtype)
    else:
        pipe = load_stock(source, dtype, single_file_config if folder.is_file() else None)
        _as_recorded(pipe, source)
        if _starts_from_image(pipe):
            pipe = stock_pipeline(pipe)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    if lora is not None:
        _apply_lora(pipe, lora)
    check_finite(lora or source, pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def pipeline_index(source: str) -> dict[str, Any]:
    """The `model_index.json` of a folder or Hub repository.

    Raises:
        ValueError: There is none in reach.
    """
    try:
        index = DiffusionPipeline.load_config(source)
    except OSError as error:
        raise UserError(
            f"{source!r} is neither a pipeline folder here nor a Hub id in reach: {first_line(error)}"
        ) from error
    if not isinstance(index, dict):
        raise UserError(f"The model_index.json of {source!r} holds a {type(index).__name__}; get it anew.")
    return index


def _starts_from_image(pipe: DiffusionPipeline) -> bool:
    """Whether an index names another use, as image-to-image, of a network that needs no image."""
    unet, asked = getattr(pipe, "unet", None), inspect.signature(pipe.__call__).parameters
    takes_text = isinstance(unet, UNet2DConditionModel) and {"image", "prompt"} <= asked.keys()
    return takes_text and unet.config.in_channels == pipe.vae.config.latent_channels


def _as_recorded(pipe: DiffusionPipeline, source: str) -> None:
    """With the scheduler of the training: that which the folder's carries of a flow, or of the record of a single file."""
    if isinstance(scheduler := carried(pipe.scheduler), FlowConsistencyScheduler):
        pipe.scheduler = scheduler
    record = read_record(source) if isinstance(getattr(pipe, "unet", None), UNet2DConditionModel) else None
    if record is None:
        return
    refuse_contradiction(source, record, pipe.unet)
    if Path(source).is_file():
        scheduler = dict(record.scheduler)
        pipe.scheduler = getattr(diffusers, scheduler.pop("_class_name", "LCMScheduler")).from_config(scheduler)


def base_model(folder: Path) -> str:
    """Where the base model of a LoRA in a folder is.

    Raises:
        ValueError: There is no LoRA, or none with a record.
    """
    if not (folder / LORA_WEIGHTS).is_file():
        raise UserError(f"{str(folder)!r} is no pipeline folder: it has neither model_index.json nor {LORA_WEIGHTS}.")
    record = read_record(folder)
    if record is None:
        raise UserError(f"The LoRA in {str(folder)!r} does not name its base model: {RECORD} is missing beside it.")
    return base_model_of(record, folder)


def _apply_lora(pipe: DiffusionPipeline, lora: str) -> None:
    load_lora(pipe, lora)
    record = read_record(lora)
    scheduler = dict(record.scheduler) if record else {}
    scheduler_class = getattr(diffusers, scheduler.pop("_class_name", "LCMScheduler"))
    pipe.scheduler = scheduler_class.from_config({**pipe.scheduler.config, **scheduler})


def set_lora_scale(pipe: DiffusionPipeline, scale: float) -> None:
    """By how much the LoRA that `load_pipeline` put on counts: 1 as it was trained, 0 not at all."""
    for part in pipe.components.values():
        for layer in adapter_layers(part) if isinstance(part, nn.Module) else []:
            for name in layer.active_adapters:
                layer.set_scale(name, scale)


def reads_prompts(pipe: DiffusionPipeline) -> bool:
    return "prompt" in inspect.signature(pipe.__call__).parameters


def takes_classes(pipe: DiffusionPipeline) -> bool:
    told = "class_labels" in inspect.signature(pipe.__call__).parameters
    return told and pipe.unet.config.num_class_embeds is not None


def unchanged(images: Tensor) -> Tensor:
    return images


def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
    resolution: int | None = None,
    see: Callable[[Tensor], Tensor] = unchanged,
    eta: float | None = None,
    num_frames: int | None = None,
) -> tuple[Tensor, float]:
    """One image for each prompt, from its own seed: an image does not depend on the others in its batch.

    Args:
        pipe: Any pipeline with the arguments `prompt`, `generator`, `num_inference_steps`, `height`, `width`.
        prompts: N prompts.
        seeds: N seeds, of CPU generators, so that they mean the same on every device.
        num_inference_steps: Steps; the scheduler's `recommended_sigmas` or `recommended_timesteps` are taken if they are so many.
        guidance_scale: In the pipeline's own convention.
        batch_size: Images drawn at once.
        resolution: Height and width in pixels; None: the pipeline's default.
        see: What is kept of each batch of images, (B, ...).
        eta: Of pipelines that take it, for DDIM's noise; None: the pipeline's default, or gamma of a student's `TCDScheduler`.
        num_frames: Of clips; None for images.

    Returns:
        Images (N, 3, H, W), or clips (N, F, 3, H, W), in [0, 1], rounded to 8 bits and on the CPU, or what `see` makes of them; and the
        seconds that they took after a warm-up, without `see`.
    """

    if eta is None and isinstance(pipe.scheduler, TCDScheduler):
        eta = pipe.scheduler.config.get("gamma")

    def ask(rows: slice, steps: int) -> dict[str, Any]:
        arguments = _schedule(pipe, steps) | guided(pipe, guidance_scale)
        if answers_clips(pipe):
            arguments |= {"num_frames": num_frames or 1}
        if resolution is not None:
            arguments |= {"height": resolution, "width": resolution}
        if eta is not None:
            arguments |= {"eta": eta}
        return {"prompt": list(prompts[rows]), **arguments}

    def seen(samples: Tensor) -> Tensor:
        return see(samples[:, 0] if samples.ndim == 5 and num_frames is None else samples)

    return _drawn(pipe, ask, seeds, num_inference_steps, batch_size, seen)


def generate_unprompted(
    pipe: DiffusionPipeline,
    seeds: Sequence[int],
    num_inference_steps: int,
    batch_size: int,
    class_labels: Sequence[int] | None = None,
    see: Callable[[Tensor], Tensor] = unchanged,
) -> tuple[Tensor, float]:
    """As `generate`, from a pipeline without prompts; grey images are given three equal channels.

    Args:
        pipe: Any pipeline with the arguments `batch_size`, `generator`, `num_inference_steps`.
        seeds: N seeds.
        num_inference_steps: The scheduler's `recommended_sigmas` are taken if they are so many.
        batch_size: Images drawn at once.
        class_labels: N classes, for a network that takes them.
        see: As for `generate`.
    """

    def ask(rows: slice, steps: int) -> dict[str, Any]:
        labels = {} if class_labels is None else {"class_labels": list(class_labels[rows])}
        return {"batch_size": len(seeds[rows]), **_schedule(pipe, steps), **labels}

    def seen(images: Tensor) -> Tensor:
        return see(images.expand(-1, 3, -1, -1))

    return _drawn(pipe, ask, seeds, num_inference_steps, batch_size, seen)


def _schedule(pipe: DiffusionPipeline, steps: int) -> dict[str, Any]:
    for way in ("sigmas", "timesteps"):
        if len(recommended := pipe.scheduler.config.get(f"recommended_{way}") or []) == steps:
            return {way: recommended}
    return in_steps(pipe, steps)


@torch.no_grad()
def _drawn(
    pipe: DiffusionPipeline,
    ask: Callable[[slice, int], dict[str, Any]],
    seeds: Sequence[int],
    num_inference_steps: int,
    batch_size: int,
    see: Callable[[Tensor], Tensor],
) -> tuple[Tensor, float]:
    """What `see` keeps, and seconds; `ask` makes the pipeline's arguments of the rows of a batch and a number of steps."""

    def draw(rows: slice, steps: int) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
        answer = pipe(generator=generators, output_type="pt", **ask(rows, steps))
        images = answer.frames if answers_clips(pipe) else answer.images
        if isinstance(images, np.ndarray):  # DDPMPipeline of diffusers 0.40 knows no "pt"
            images = torch.from_numpy(images).movedim(-1, 1)
        return (images.float() * 255).round().cpu() / 255

    draw(slice(0, batch_size), min(2, num_inference_steps))
    seconds, parts = 0.0, []
    for start in tqdm(range(0, len(seeds), batch_size), desc=f"{num_inference_steps} steps", leave=False):
        started = time.perf_counter()
        images = draw(slice(start, start + batch_size), num_inference_steps)
        seconds += time.perf_counter() - started
        parts.append(see(images))
    return torch.cat(parts), seconds
