"""Students and their targets: copies of a teacher, or adapters on it."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.errors import UserError
from cm_diffusers.models.adapters import WithoutAdapters, add_lora, target_names
from cm_diffusers.models.casting import cast
from cm_diffusers.models.families.base import family_of
from cm_diffusers.models.quantization import QUANTIZATIONS
from cm_diffusers.models.target_input import TARGET_INPUT, add_target_input
from cm_diffusers.models.teachers import is_late
from cm_diffusers.types import Networks


DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class StudentNetworkConfig:
    """What becomes of the teacher's network."""

    lora: bool = HfArg(default=False, help="Train adapters on the teacher itself instead of a copy of it.")
    lora_rank: int = HfArg(default=64, help="Rank of the adapters.")
    lora_alpha: float = HfArg(default=64.0, help="Scale of the adapters, times 1 / rank.")
    lora_dropout: float = HfArg(default=0.0, help="Dropout before the adapters.")
    lora_target_modules: list[str] | None = HfArg(
        default=None, help="Names of the layers that get adapters; those of the teacher's family if not given."
    )
    unet_time_cond_proj_dim: int = HfArg(
        default=256,
        help="Size of the full student's guidance embedding; 0: none, with guidance in the weights as in a LoRA, for programs "
        "that know no embedding.",
    )
    cast_teacher_unet: Literal["no", "bf16", "fp16"] = HfArg(
        default="no",
        help="Keep what does not train in half precision, the full student's teacher or the network below a LoRA (with "
        "--mixed_precision of the same kind).",
        aliases=["--cast_teacher"],
    )

    @property
    def loaded_dtype(self) -> torch.dtype:
        """Of the teacher's network as it is loaded: a full student is copied from the whole weights."""
        return DTYPES[self.cast_teacher_unet if self.lora else "no"]

    def guidance_embedding_dim(self, teacher: nn.Module) -> int | None:
        """Of the student; None where guidance goes into the weights, or the teacher itself is told."""
        family = family_of(teacher)
        adds = not self.lora and family.student is not None and family.guidance(teacher) == "cfg"
        return (self.unet_time_cond_proj_dim or None) if adds else None


HALF = "float16, but a transformer or its LoRA in bfloat16, for several overflow in float16"  # see `HALVES`


@dataclass
class StudentConfig(StudentNetworkConfig):
    """What becomes of the teacher's network, and how it is stored."""

    save_fp16: bool = HfArg(
        default=False, help=f"Store the full student's network and VAE, or the LoRA, in half precision: {HALF}."
    )
    quantize_teacher: Literal["no", *QUANTIZATIONS] = HfArg(
        default="no",
        help="Keep the linear layers below a LoRA in fewer bits, and what else does not train as --cast_teacher_unet says: "
        "bitsandbytes' LLM.int8 or NF4 (on a GPU), or torchao's int8 weights.",
    )


def require_autocast(config: StudentNetworkConfig, mixed_precision: str) -> None:
    """A cast teacher runs under autocast only: latents and conditions are float32."""
    cast = config.cast_teacher_unet
    if cast not in ("no", mixed_precision):
        raise UserError(f"--cast_teacher_unet {cast} needs --mixed_precision {cast}, but that is {mixed_precision}.")


def make_networks(teacher: nn.Module, config: StudentNetworkConfig, target_dim: int | None = None) -> Networks:
    """The networks of a distillation: copy and EMA target, or adapters on the teacher, which is then its own student.

    All is on "meta" if the teacher is.

    Args:
        target_dim: Of a student that is told where its jumps end, which it ignores at first.
    """
    if config.lora:
        cast(teacher, config.loaded_dtype)
        names = config.lora_target_modules
        if target_dim is not None:
            add_target_input(teacher, target_dim)
            names = [*target_names(teacher, names), TARGET_INPUT]
        student = add_lora(teacher, config.lora_rank, config.lora_alpha, config.lora_dropout, names)
        return Networks(student, teacher=WithoutAdapters(student))
    student = make_student(teacher, (config.guidance_embedding_dim(teacher) or 0) + (target_dim or 0) or None)
    cast(teacher, DTYPES[config.cast_teacher_unet])
    return Networks(student, target=frozen_copy(student), teacher=teacher)


def make_student(teacher: nn.Module, guidance_embedding_dim: int | None) -> nn.Module:
    """A copy of the teacher, with a guidance embedding that starts at zero: student = teacher at step 0. On "meta" if that is.

    Args:
        guidance_embedding_dim: Size of the embedding where its family has a choice, e.g. 256; None for none.
    """
    make = family_of(teacher).student
    with init_empty_weights() if is_late(teacher) else nullcontext():
        return trainable(copy.deepcopy(teacher) if make is None else make(teacher, guidance_embedding_dim))


def trainable(network: nn.Module) -> nn.Module:
    """The network, of which all trains that has an effect: of the rest several processes would wait for a gradient."""
    network.requires_grad_(True)
    for path in family_of(network).silent(network):
        network.get_submodule(path).requires_grad_(False)
    return network.train()


class TextConditionedUNet(nn.Module):
    """A UNet and a text tower that train together: conditions are `input_ids` `(B, L)`."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, sample: Tensor, timestep: Tensor, input_ids: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        states = self.text_encoder(input_ids)[0]
        return self.unet(sample, timestep, encoder_hidden_states=states, return_dict=return_dict)


def frozen_copy(module: nn.Module) -> nn.Module:
    """A detached copy that never trains, e.g. the EMA target at step 0."""
    return copy.deepcopy(module).requires_grad_(False)
