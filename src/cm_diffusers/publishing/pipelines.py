"""The stock pipelines, schedulers and records of latent consistency models; pipelines, LoRAs and motion modules as folders."""

from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    DiffusionPipeline,
    LCMScheduler,
    MotionAdapter,
    SchedulerMixin,
    TCDScheduler,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.hf_argparser import HfArg

from cm_diffusers.models.casting import HALVES, kept_whole
from cm_diffusers.models.families.base import family_of
from cm_diffusers.models.families.unet import is_xl
from cm_diffusers.models.teachers import stock_pipeline
from cm_diffusers.pipelines.portable import make_portable
from cm_diffusers.pipelines.stock import saved_stock
from cm_diffusers.places import public
from cm_diffusers.publishing.folders import model_writer, write_result
from cm_diffusers.publishing.lora_export import Lora
from cm_diffusers.publishing.other_cards import motion_card
from cm_diffusers.publishing.provenance import Provenance
from cm_diffusers.record import Record


@dataclass
class MotionResultConfig:
    """How motion modules are stored."""

    save_fp16: bool = HfArg(default=False, help="Store the motion modules in half precision.")


def lcm_scheduler(teacher: DiffusionPipeline, original_inference_steps: int, timestep_scaling: float) -> LCMScheduler:
    """The stock scheduler whose grid and boundary scalings are those the student was trained with."""
    return LCMScheduler.from_config(
        teacher.scheduler.config, original_inference_steps=original_inference_steps, timestep_scaling=timestep_scaling
    )


def tcd_scheduler(
    teacher: DiffusionPipeline, original_inference_steps: int, gamma: float, timesteps: list[int] | None
) -> TCDScheduler:
    """The stock scheduler of jumps without scalings, in whose config the fields of `ConsistencyScheduler` ride.

    Args:
        timesteps: To sample at, as many as are recommended; None for any number on the grid.
    """
    bounds = {
        "clip_sample": False,
        "thresholding": False,
        "set_alpha_to_one": False,
    }  # as it samples, whatever its config
    scheduler = TCDScheduler.from_config(
        teacher.scheduler.config, original_inference_steps=original_inference_steps, **bounds
    )
    scheduler.register_to_config(gamma=gamma, boundary_scalings="none", recommended_timesteps=timesteps)
    return scheduler


def lcm_pipeline(teacher: DiffusionPipeline, student: nn.Module, scheduler: SchedulerMixin) -> DiffusionPipeline:
    """The stock pipeline a student samples in.

    Stable Diffusion XL's, and those of flows, take students with and without embedded guidance. Of the earlier ones' only
    LCM's takes an embedding; other students keep the teacher's class, and so do those that TCD's scheduler samples, which
    LCM's pipeline hands no eta.
    """
    parts = {family_of(student).network: student, "scheduler": scheduler}
    told = isinstance(student, UNet2DConditionModel) and student.config.time_cond_proj_dim
    told = told and not isinstance(scheduler, TCDScheduler)
    if isinstance(student, UNet2DConditionModel) and not (is_xl(student) or told):
        pipe = type(teacher)(**teacher.components | parts, requires_safety_checker=False)
    else:
        pipe = stock_pipeline(teacher, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def lcm_record(
    base_model: str, guidance: str, w_min: float, w_max: float, guidance_scale: float, scheduler: SchedulerMixin
) -> Record:
    recommended = scheduler.config.get("recommended_timesteps") or scheduler.config.get("recommended_sigmas")
    steps = len(recommended) if recommended else 4
    return Record("lcm", base_model, guidance, w_min, w_max, guidance_scale, steps, scheduler_entry(scheduler))


def scheduler_entry(scheduler: SchedulerMixin) -> dict[str, object]:
    """A scheduler as records have it: class and config, without what the libraries note for themselves."""
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {"_class_name": type(scheduler).__name__, **config}


def save_pipeline(
    pipe: DiffusionPipeline,
    folder: Path,
    fp16: bool,
    record: Record | None = None,
    provenance: Provenance | None = None,
    card: str | None = None,
) -> None:
    """A complete pipeline folder that plain `DiffusionPipeline.from_pretrained` loads without this package.

    Args:
        fp16: Store network and VAE in half precision, see `HALVES`; diffusers loads them in float32 unless told
            otherwise. The text tower keeps its precision, for transformers computes in whatever it finds.
        record, provenance, card: As for `write_result`.
    """

    def write_weights(aside: Path) -> None:
        with saved_stock(pipe):
            pipe.save_pretrained(aside)
        make_portable(aside)
        for name in HALVES if fp16 else ():
            _halve(aside / name, HALVES[name], kept_whole(type(getattr(pipe, name, None))))

    write_result(folder, [write_weights], record, provenance, card)


def _halve(folder: Path, dtype: torch.dtype, whole: Set[str]) -> None:
    """
    Args:
        folder: Of a network; it need not be there.
        whole: Names of modules and weights that stay as they are.
    """
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        halves = {name: value.to(dtype) for name, value in state.items() if whole.isdisjoint(name.split("."))}
        save_file(state | halves, path, {"format": "pt"})


def save_lora(
    network: nn.Module,
    folder: Path,
    record: Record,
    provenance: Provenance | None = None,
    fp16: bool = False,
) -> None:
    """A LoRA in two forms, with its record; with `provenance`, also with its model card.

    Args:
        fp16: As for `Lora.writer`.
    """
    write_result(folder, [lora_writer(Lora.of(network), record, fp16)], record, provenance)


def lora_writer(lora: Lora, record: Record, fp16: bool) -> Callable[[Path], None]:
    """Writes both forms of a student's LoRA, named after method and base model."""
    title = f"{record.method}_lora_{public(record.base_model).rstrip('/').rpartition('/')[2]}"
    return lora.writer(title, record.scheduler.get("prediction_type"), fp16)


def save_motion_adapter(
    adapter: MotionAdapter, scheduler: SchedulerMixin, folder: Path, fp16: bool, provenance: Provenance
) -> None:
    """What `MotionAdapter.from_pretrained` reads, the noise schedule for a scheduler's `from_pretrained`, and the card.

    Args:
        fp16: As for `model_writer`.
    """
    card = motion_card(provenance, scheduler.config.beta_schedule, adapter.config.motion_max_seq_length)
    write_result(folder, [model_writer(adapter, fp16), scheduler.save_config], provenance=provenance, card=card)
