"""Loading any text-to-image pipeline and drawing reproducible images from it."""

import time
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from cm_diffusers.record import RECORD, base_model_of, read_record


LORA_WEIGHTS = "pytorch_lora_weights.safetensors"


def load_pipeline(
    source: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", lora: str | None = None
) -> DiffusionPipeline:
    """A silent text-to-image pipeline without safety checker, which would black out images that are to be measured.

    Args:
        source: Pipeline folder or Hub id; or the folder of a LoRA, which is put on the base model of its record.
        dtype: Dtype of the weights.
        device: Where the pipeline runs.
        lora: Folder or Hub id of a LoRA to put on `source`.

    Raises:
        ValueError: if `source` holds neither a pipeline nor a LoRA with its record.
    """
    folder = Path(source)
    if folder.exists() and not (folder / "model_index.json").is_file():
        return load_pipeline(_base_model(folder), dtype, device, lora=source)
    try:
        pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{source!r} is neither a pipeline folder here nor a Hub id in reach: {reason}") from error
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    if lora is not None:
        _apply_lora(pipe, lora)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _base_model(folder: Path) -> str:
    if not (folder / LORA_WEIGHTS).is_file():
        raise ValueError(f"{str(folder)!r} is no pipeline folder: it has neither model_index.json nor {LORA_WEIGHTS}.")
    record = read_record(folder)
    if record is None:
        raise ValueError(f"The LoRA in {str(folder)!r} does not name its base model: {RECORD} is missing beside it.")
    return base_model_of(record, folder)


def _apply_lora(pipe: DiffusionPipeline, lora: str) -> None:
    pipe.load_lora_weights(lora)
    record = read_record(lora)
    scheduler = dict(record.scheduler) if record else {}
    scheduler_class = getattr(diffusers, scheduler.pop("_class_name", "LCMScheduler"))
    pipe.scheduler = scheduler_class.from_config({**pipe.scheduler.config, **scheduler})


@torch.no_grad()
def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
    resolution: int | None = None,
) -> tuple[Tensor, float]:
    """One image for each prompt, from its own seed: an image does not depend on the others in its batch.

    Args:
        pipe: Any pipeline with the arguments `prompt`, `generator`, `num_inference_steps`, `guidance_scale`, `height`,
            `width`.
        prompts: N prompts.
        seeds: N seeds, of CPU generators, so that they mean the same on every device.
        num_inference_steps: Steps of the pipeline's scheduler.
        guidance_scale: In the pipeline's own convention.
        batch_size: Images drawn at once.
        resolution: Height and width in pixels; None: the pipeline's default.

    Returns:
        Images (N, 3, H, W) in [0, 1], rounded to 8 bits and on the CPU, and the seconds they took after a warm-up.
    """

    def draw(rows: slice, steps: int) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
        arguments = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt"}
        if resolution is not None:
            arguments |= {"height": resolution, "width": resolution}
        images = pipe(prompt=list(prompts[rows]), generator=generators, **arguments).images
        return (images.float() * 255).round().cpu() / 255

    draw(slice(0, batch_size), min(2, num_inference_steps))
    started, parts = time.perf_counter(), []
    for start in tqdm(range(0, len(prompts), batch_size), desc=f"{num_inference_steps} steps", leave=False):
        parts.append(draw(slice(start, start + batch_size), num_inference_steps))
    return torch.cat(parts), time.perf_counter() - started
