"""Stable Diffusion 3 and 3.5 (2403.03206): two streams, of text and of latents, that attend to each other."""

from diffusers import DiffusionPipeline, SD3Transformer2DModel
from torch import Tensor

from cm_diffusers.diffusion.guidance import Conditions
from cm_diffusers.models.families.base import Family
from cm_diffusers.models.families.latents import kl_latents
from cm_diffusers.models.merged_text import merges_zeros


LORA_TARGETS = (  # every linear layer of a block, of either stream and of the second attention of 3.5, but no end
    "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out "
    "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2 norm1.linear norm1_context.linear"
)


def _call(network: SD3Transformer2DModel, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
    """The velocity `(B, C, h, w)`; the network counts times from 0 to 1000."""
    return network(x_t, timestep=1000 * t.to(x_t.device), **cond, return_dict=False)[0]


def _encode(pipe: DiffusionPipeline, prompts: list[str]) -> Conditions:
    """States `(N, L, D)` and pooled `(N, P)`: of both CLIP towers, then T5's, which are zeros where it is left out.

    L is as the pipeline's call has it when it is not told, for nothing is masked: other lengths give other images. A network
    that merges the zeros knows how many there are, and gets none.
    """
    device = pipe.text_encoder.device
    states, _, pooled, _ = pipe.encode_prompt(prompts, None, None, device=device, do_classifier_free_guidance=False)
    if merges_zeros(pipe.transformer):
        states = states[:, : pipe.tokenizer_max_length]
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


FAMILY = Family(
    pipeline=lambda network: "StableDiffusion3Pipeline",
    lora_targets=tuple(LORA_TARGETS.split()),
    guidance=lambda network: "cfg",
    call=_call,
    encode=_encode,
    latents=lambda vae: kl_latents(vae, patch=2),
    comfyui="ModelSamplingSD3",
    sigmas="accepted",
)
