"""FLUX.2: dev is told its guidance scale, klein is guided by a second pass.

Its latents are what the network sees: squares of 2 x 2 of the VAE's as channels, normalised by the statistics of a batch
norm. klein's class could have a guidance embedding, but its stock pipeline never feeds one: guidance of its students goes
into the weights.
"""

from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from cm_diffusers.diffusion.guidance import Conditions
from cm_diffusers.diffusion.teaching import Guidance
from cm_diffusers.models.families.base import Family, Latents, config_of
from cm_diffusers.models.families.shared import (
    JOINT_ATTENTION,
    places,
    refuse_distilled,
    tokens,
    told_scale,
    untokened,
)


SINGLE_BLOCKS = (
    48  # of dev, the largest; their `attn.to_out` has the name of a list in other blocks, so each is named whole
)


def _pipeline(transformer: nn.Module) -> str:
    return "Flux2Pipeline" if transformer.config.guidance_embeds else "Flux2KleinPipeline"


def _guidance(transformer: nn.Module) -> Guidance:
    return "embedded" if config_of(transformer).guidance_embeds else "cfg"


def _call(transformer: nn.Module, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
    """Velocity of latents `(B, 4 C, h, w)`; `guidance` is a condition of dev alone.

    Places are (image, row, column, place in the text).
    """
    text, (height, width) = cond["prompt_embeds"], x_t.shape[-2:]
    output = transformer(
        hidden_states=tokens(x_t),
        encoder_hidden_states=text,
        timestep=t,
        img_ids=places(1, height, width, 1, like=x_t),
        txt_ids=places(1, 1, 1, text.shape[1], like=x_t),
        guidance=cond.get("guidance"),
        return_dict=False,
    )[0]
    return untokened(output, height, width)


def _encode(pipe: DiffusionPipeline, prompts: list[str]) -> Conditions:
    """States `(N, 512, 3 D)` of three layers of a language model; the padding is not masked, so its length matters."""
    return {"prompt_embeds": pipe.encode_prompt(prompts, pipe.text_encoder.device)[0]}


def _latents(vae: nn.Module) -> Latents:
    def encode(vae: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(pixels).latent_dist
        return pixel_unshuffle(posterior.mean, 2), pixel_unshuffle(posterior.std, 2)

    def decode(vae: nn.Module, x: Tensor) -> Tensor:
        return vae.decode(pixel_shuffle(latents.of_vae(x), 2)).sample

    mean, variance = (values.detach().clone()[:, None, None] for values in (vae.bn.running_mean, vae.bn.running_var))
    scale = (variance + vae.config.batch_norm_eps).rsqrt()
    latents = Latents(encode, decode, mean, scale, 2 ** len(vae.config.block_out_channels), len(mean))
    return latents


def _check(path: str, pipe: DiffusionPipeline) -> None:
    if pipe.config.get("is_distilled"):
        refuse_distilled(path, pipe, "is_distilled")


FAMILY = Family(
    pipeline=_pipeline,
    lora_targets=(
        *JOINT_ATTENTION,
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        "attn.to_qkv_mlp_proj",
        *(f"single_transformer_blocks.{block}.attn.to_out" for block in range(SINGLE_BLOCKS)),
    ),
    guidance=_guidance,
    call=_call,
    encode=_encode,
    latents=_latents,
    told=lambda transformer: told_scale,
    check=_check,
)
