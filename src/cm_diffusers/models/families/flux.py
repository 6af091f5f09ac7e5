"""Flux.1: dev is told its guidance scale; schnell knows none.

A student of dev is told the same guidance as its teacher: there is no second pass, and no embedding to add.
"""

from functools import partial
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cm_diffusers.diffusion.guidance import Conditions
from cm_diffusers.diffusion.process import as_like
from cm_diffusers.models.families.base import Family
from cm_diffusers.models.families.latents import kl_latents
from cm_diffusers.models.families.shared import (
    JOINT_ATTENTION,
    pack,
    told_scale,
    unpack,
)


def _guidance(transformer: nn.Module) -> Literal["embedded", "none"]:
    return "embedded" if transformer.config.guidance_embeds else "none"


def _call(transformer: nn.Module, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
    """Velocity of latents `(B, C, h, w)`, h and w even; `guidance` is a condition of dev alone."""
    text = cond["prompt_embeds"]
    return unpack(
        transformer(
            hidden_states=pack(x_t),
            encoder_hidden_states=text,
            pooled_projections=cond["pooled_prompt_embeds"],
            timestep=as_like(t, x_t),
            img_ids=_places(x_t),
            txt_ids=torch.zeros(text.shape[1], 3, device=x_t.device),
            guidance=cond.get("guidance"),
            return_dict=False,
        )[0],
        like=x_t,
    )


def _places(x_t: Tensor) -> Tensor:
    """(0, row, column) of each token, `(h w / 4, 3)`."""
    sizes = (1, x_t.shape[-2] // 2, x_t.shape[-1] // 2)
    return torch.cartesian_prod(*(torch.arange(size, device=x_t.device) for size in sizes))


def _encode(pipe: DiffusionPipeline, prompts: list[str]) -> Conditions:
    """T5's states `(N, 512, D)`, whose padding is not masked, so that its length matters; CLIP's summary `(N, P)`."""
    states, pooled, _ = pipe.encode_prompt(prompts, prompts, max_sequence_length=512)
    return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}


FAMILY = Family(
    pipeline=lambda transformer: "FluxPipeline",
    lora_targets=(
        *JOINT_ATTENTION,
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
    guidance=_guidance,
    call=_call,
    encode=_encode,
    latents=partial(kl_latents, patch=2),
    told=lambda transformer: told_scale,
    comfyui=True,
)
