"""Flux.1: dev is told its guidance scale; schnell, distilled to few steps, knows none.

A student of dev is told the same guidance as its teacher: there is no second pass, and no embedding to add.
"""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cm_diffusers.diffusion.guidance import Conditions
from cm_diffusers.diffusion.teaching import Guidance
from cm_diffusers.models.families.base import Family, config_of, default_of
from cm_diffusers.models.families.latents import kl_latents
from cm_diffusers.models.families.shared import JOINT_ATTENTION, pack, places, refuse_distilled, told_scale, unpack


def _guidance(transformer: nn.Module) -> Guidance:
    return "embedded" if config_of(transformer).guidance_embeds else "none"


def _call(transformer: nn.Module, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
    """Velocity of latents `(B, C, h, w)`, h and w even; `guidance` is a condition of dev alone."""
    text, (height, width) = cond["prompt_embeds"], x_t.shape[-2:]
    output = transformer(
        hidden_states=pack(x_t),
        encoder_hidden_states=text,
        pooled_projections=cond["pooled_prompt_embeds"],
        timestep=t,
        img_ids=places(1, height // 2, width // 2, like=x_t),
        txt_ids=torch.zeros(text.shape[1], 3, device=x_t.device),
        guidance=cond.get("guidance"),
        return_dict=False,
    )[0]
    return unpack(output, like=x_t)


def _encode(pipe: DiffusionPipeline, prompts: list[str]) -> Conditions:
    """T5's states `(N, 512, D)`, whose padding is not masked, so that its length matters; CLIP's summary `(N, P)`."""
    states, pooled, _ = pipe.encode_prompt(prompts, None, max_sequence_length=default_of(pipe, "max_sequence_length"))
    return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}


def _check(path: str, pipe: DiffusionPipeline) -> None:
    if not pipe.transformer.config.guidance_embeds:
        refuse_distilled(path, pipe, "guidance_embeds of its transformer is false, as schnell's")


FAMILY = Family(
    pipeline=lambda transformer: "FluxPipeline",
    lora_targets=(
        *JOINT_ATTENTION,
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
    guidance=_guidance,
    call=_call,
    encode=_encode,
    latents=lambda vae: kl_latents(vae, patch=2),
    told=lambda transformer: told_scale,
    check=_check,
    rounded_time="time_text_embed.time_proj",
    comfyui="ModelSamplingFlux",
)
