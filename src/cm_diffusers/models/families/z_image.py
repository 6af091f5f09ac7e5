"""Z-Image: it is shown lists and 1 - t, and answers the velocity from noise to data, which is minus ours.

Its pipeline guides v_c + g (v_c - v_u): its `guidance_scale` g is our w, one less than that of other pipelines, and 0 is none.
The pipeline's optional cap on the length of a guided velocity is off, as it is there by default.
"""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cm_diffusers.diffusion.guidance import Conditions
from cm_diffusers.models.families.base import Family, default_of
from cm_diffusers.models.families.latents import kl_latents
from cm_diffusers.models.families.shared import padded


def _call(transformer: nn.Module, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
    """Velocity of latents `(B, C, h, w)`, h and w even."""
    prompts = zip(cond["prompt_embeds"], cond["prompt_embeds_mask"], strict=True)
    frames, texts = list(x_t[:, :, None]), [states[mask] for states, mask in prompts]
    output = transformer(frames, 1 - t, texts, return_dict=False)[0]
    return -torch.stack(output)[:, :, 0]


def _encode(pipe: DiffusionPipeline, prompts: list[str]) -> Conditions:
    length, own = default_of(pipe, "max_sequence_length"), list(prompts)  # for the pipeline writes into it
    texts, _ = pipe.encode_prompt(own, do_classifier_free_guidance=False, max_sequence_length=length)
    return padded(texts, length)


FAMILY = Family(
    pipeline=lambda transformer: "ZImagePipeline",
    lora_targets=(
        *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    ),
    guidance=lambda transformer: "cfg",
    call=_call,
    encode=_encode,
    latents=lambda vae: kl_latents(vae, patch=2),
    guided=lambda scale: {"guidance_scale": scale - 1},
    lora_name=lambda path, network: f"diffusion_model.{path}",
    comfyui="ModelSamplingAuraFlow",
)
