"""Writing video students: motion modules, the LoRA of the image layers, and the record, as stock diffusers reads them."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    LCMScheduler,
    MotionAdapter,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.models.image_to_video import ImageToVideoAdapter
from cm_diffusers.pipelines.pipeline_consistency import ConsistencyPipeline
from cm_diffusers.publishing.pipelines import write_texts, written_aside
from cm_diffusers.publishing.portable import forget_origin, lora_metadata
from cm_diffusers.publishing.provenance import Provenance, public, write_provenance
from cm_diffusers.publishing.video_card import condition_card, motion_card
from cm_diffusers.record import Record


@dataclass
class MotionResultConfig:
    """How motion modules are stored."""

    save_fp16: bool = HfArg(default=False, help="Store the motion modules in half precision.")


class SpatialLora(NamedTuple):
    """A LoRA on the image layers: raw PEFT tensors and the fields that say how they are put on."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]

    @classmethod
    def of(cls, unet: nn.Module) -> "SpatialLora":
        """The one that is on a network."""
        (name,) = unet.peft_config
        tensors = {key: value.cpu() for key, value in get_peft_model_state_dict(unet, adapter_name=name).items()}
        return cls(tensors, lora_metadata(unet))


def fused(
    image: DiffusionPipeline, lora: str, **options: str | None
) -> tuple[UNet2DConditionModel, SpatialLora, Record | None]:
    """A copy of an image model's network with a LoRA in its weights, that LoRA, and its record.

    Args:
        options: `weight_name` and `revision`, as for `load_lora_weights`; None where they are not given.

    Raises:
        ValueError: It does not load or does not fit.
    """
    pipe = ConsistencyPipeline.from_pipe(image, unet=copy.deepcopy(image.unet), record=None)
    pipe.load_lora_weights(lora, **{name: value for name, value in options.items() if value is not None})
    if others := sorted(set(pipe.get_list_adapters()) - {"unet"}):
        raise ValueError(f"The LoRA {lora} also has layers for {' and '.join(others)}: give one of the UNet alone.")
    spatial, record = SpatialLora.of(pipe.unet), pipe.record
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe.unet, spatial, record


def save_motion_adapter(
    adapter: MotionAdapter, scheduler: SchedulerMixin, folder: Path, fp16: bool, provenance: Provenance
) -> None:
    """What `MotionAdapter.from_pretrained` reads, the noise schedule for a scheduler's `from_pretrained`, and the card.

    Args:
        fp16: Store half precision; diffusers loads float32 unless told otherwise.
    """
    with written_aside(folder) as aside:
        _save_motion(adapter, scheduler, aside, fp16)
        write_provenance(provenance, aside)
        card = motion_card(provenance, scheduler.config.beta_schedule, adapter.config.motion_max_seq_length)
        (aside / "README.md").write_text(card, "utf-8")


def save_video_student(
    adapter: MotionAdapter,
    lora: SpatialLora,
    scheduler: LCMScheduler,
    folder: Path,
    fp16: bool,
    record: Record,
    provenance: Provenance,
) -> None:
    """Motion modules and noise schedule as `save_motion_adapter`, the LoRA beside them, the record and the card."""
    with written_aside(folder) as aside:
        _save_motion(adapter, scheduler, aside, fp16)
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            aside, unet_lora_layers=lora.tensors, unet_lora_adapter_metadata=lora.metadata
        )
        write_texts(aside, record, provenance)


def save_condition(
    condition: ImageToVideoAdapter | ControlNetModel, folder: Path, fp16: bool, student: str, provenance: Provenance
) -> None:
    """What was trained in front of a video student, with its card.

    Args:
        fp16: Store half precision.
        student: Folder or Hub id.
    """
    kind = "controlnet" if isinstance(condition, ControlNetModel) else "image_adapter"
    with written_aside(folder) as aside:
        (condition.half() if fp16 else condition).save_pretrained(aside)
        forget_origin(aside)
        write_provenance(provenance, aside)
        (aside / "README.md").write_text(condition_card(provenance, kind, public(student)), "utf-8")


def _save_motion(adapter: MotionAdapter, scheduler: SchedulerMixin, folder: Path, fp16: bool) -> None:
    (adapter.half() if fp16 else adapter).save_pretrained(folder)
    forget_origin(folder)
    scheduler.save_config(folder)
