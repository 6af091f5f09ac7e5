"""Wan 2.1 and the dense one of Wan 2.2 (2503.20314): clips `(B, C, F, h, w)`, and images as clips of one frame."""

import re

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cm_diffusers.diffusion.guidance import Conditions
from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import Family, default_of
from cm_diffusers.models.families.latents import per_channel_latents


# Those that other programs have names for, too: self_attn, cross_attn and ffn of every block.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
ORIGINAL_PARTS = {"attn1": "self_attn", "attn2": "cross_attn", "ffn": "ffn"}
ORIGINAL_LAYERS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "net.0.proj": "0", "net.2": "2"}


def _call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
    """The velocity, of the shape of x_t: clips `(B, C, F, h, w)` or images `(B, C, h, w)`.

    Where the pipeline tells a time for each token (`expand_timesteps`), all are the same: the network is told it once.

    Args:
        cond: `encoder_hidden_states` `(B, L, D)`, zeros after the prompt: the network sees them, so that L matters.
    """
    if x_t.ndim == 4:
        return _call(network, x_t[:, :, None], t, cond)[:, :, 0]
    return network(x_t, 1000 * t, **cond, return_dict=False)[0]


def _encode(pipeline: DiffusionPipeline, prompts: list[str]) -> Conditions:
    """States `(N, 512, D)`."""
    length, device = default_of(pipeline, "max_sequence_length"), pipeline.text_encoder.device
    states, _ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=length, device=device
    )
    return {"encoder_hidden_states": states}


def _check(path: str, pipeline: DiffusionPipeline) -> None:
    config = pipeline.transformer.config
    if getattr(pipeline, "transformer_2", None) is not None:
        raise UserError(
            f"{path} has two experts, transformer and, below boundary_ratio {pipeline.config.boundary_ratio}, transformer_2, and "
            "each would need a student of its own; give Wan 2.1 or the 5B of Wan 2.2, which have one network."
        )
    if config.in_channels != config.out_channels:
        raise UserError(
            f"The network of {path} takes {config.in_channels} channels and makes {config.out_channels}: it is told an image, too; "
            "give a text-to-video pipeline."
        )


def _lora_name(path: str, network: nn.Module) -> str | None:
    """That of the original code; diffusers takes no alphas outside the blocks."""
    found = re.fullmatch(r"(blocks\.\d+)\.(attn1|attn2|ffn)\.(.+)", path)
    if found is None or found[3] not in ORIGINAL_LAYERS:
        return None
    return f"diffusion_model.{found[1]}.{ORIGINAL_PARTS[found[2]]}.{ORIGINAL_LAYERS[found[3]]}"


FAMILY = Family(
    pipeline=lambda network: "WanPipeline",
    lora_targets=LORA_TARGETS,
    guidance=lambda network: "cfg",
    call=_call,
    encode=_encode,
    latents=lambda vae: per_channel_latents(vae, patch=2, clips=True),
    check=_check,
    lora_name=_lora_name,
    comfyui="ModelSamplingSD3",
    sigmas="unknown",
    clips=True,
)
