"""Writing results: whole or not at all, as safetensors, with a record of how the student was made beside the weights."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import (
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    ModelMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from cm_diffusers.models.teachers import is_xl
from cm_diffusers.publishing.lora_export import save_kohya
from cm_diffusers.publishing.model_card import model_card
from cm_diffusers.publishing.portable import forget_origin, lora_metadata, nest_text_encoders
from cm_diffusers.publishing.provenance import Provenance, public, write_provenance
from cm_diffusers.record import Record, write_record


SAMPLES = "samples.png"  # the last validation grid of the training


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well, and vanishes when not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside, replaced = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "replaced"))
    for leftover in (aside, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(aside, folder)
    finally:
        for leftover in (aside, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def lcm_scheduler(teacher: DiffusionPipeline, original_inference_steps: int, timestep_scaling: float) -> LCMScheduler:
    """The stock scheduler whose grid and boundary scalings are those the student was trained with."""
    return LCMScheduler.from_config(
        teacher.scheduler.config, original_inference_steps=original_inference_steps, timestep_scaling=timestep_scaling
    )


def lcm_pipeline(
    teacher: DiffusionPipeline, student: UNet2DConditionModel, scheduler: LCMScheduler
) -> DiffusionPipeline:
    """The stock pipeline a student samples in.

    Stable Diffusion XL's takes students with and without embedded guidance. Of the earlier ones' only LCM's takes an
    embedding; other students keep the teacher's class.
    """
    parts = {**teacher.components, "unet": student, "scheduler": scheduler}
    if is_xl(student):
        pipe = StableDiffusionXLPipeline(
            **parts, force_zeros_for_empty_prompt=teacher.config.force_zeros_for_empty_prompt
        )
    else:
        pipeline_class = LatentConsistencyModelPipeline if student.config.time_cond_proj_dim else type(teacher)
        pipe = pipeline_class(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def lcm_record(
    base_model: str, guidance: str, w_min: float, w_max: float, guidance_scale: float, scheduler: LCMScheduler
) -> Record:
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    entry = {"_class_name": type(scheduler).__name__, **config}
    return Record("lcm", base_model, guidance, w_min, w_max, guidance_scale, 4, entry)


def save_model(model: ModelMixin, folder: Path) -> None:
    with written_aside(folder) as aside:
        model.save_pretrained(aside)


def save_pipeline(
    pipe: DiffusionPipeline,
    folder: Path,
    fp16: bool,
    record: Record | None = None,
    provenance: Provenance | None = None,
) -> None:
    """A complete pipeline folder that plain `DiffusionPipeline.from_pretrained` loads without this package.

    Args:
        fp16: Store UNet and VAE in half precision; diffusers loads them in float32 unless told otherwise.
            The text tower keeps its precision, for transformers computes in whatever it finds.
        record: A student's; with `provenance`, its model card is written, too.
    """
    with written_aside(folder) as aside:
        pipe.save_pretrained(aside)
        nest_text_encoders(aside)
        forget_origin(aside)
        for weights in [*aside.glob("unet/*.safetensors"), *aside.glob("vae/*.safetensors")] if fp16 else ():
            save_file({name: value.half() for name, value in load_file(weights).items()}, weights, {"format": "pt"})
        write_texts(aside, record, provenance)


def save_lora(unet: UNet2DConditionModel, folder: Path, record: Record, provenance: Provenance | None = None) -> None:
    """A LoRA in two forms, with its record; with `provenance`, also with its model card.

    `pytorch_lora_weights.safetensors` for `load_lora_weights` is the raw PEFT state dict, with rank and alpha as
    metadata: diffusers' own conversion loses the attention layers on reload. Without the dropout of training:
    `load_lora_weights` would leave it on when sampling. `comfyui/<name>.safetensors` is for kohya's tools and their
    kin; a folder below, so that no loader takes it for the other.
    """
    name = f"{record.method}_lora_{public(record.base_model).rstrip('/').rpartition('/')[2]}"
    with written_aside(folder) as aside:
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            aside,
            unet_lora_layers=get_peft_model_state_dict(unet),
            unet_lora_adapter_metadata=lora_metadata(unet),
        )
        save_kohya(unet, aside / "comfyui" / f"{name}.safetensors", name, record.scheduler["prediction_type"])
        write_texts(aside, record, provenance)


def write_texts(folder: Path, record: Record | None, provenance: Provenance | None) -> None:
    """Record, provenance and model card, with the last sample grid of the run that `folder` belongs to."""
    if record is not None:
        write_record(record, folder)
    if record is not None and provenance is not None:
        grids = sorted((folder.parent / "samples").glob("step-*.png"))  # those of the run that ends here
        if grids:
            shutil.copyfile(grids[-1], folder / SAMPLES)
        write_provenance(provenance, folder)
        (folder / "README.md").write_text(model_card(record, provenance, grid=SAMPLES if grids else None), "utf-8")
