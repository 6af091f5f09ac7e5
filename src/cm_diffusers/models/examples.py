"""Random inputs for networks of diffusers, made from their configs alone."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import Tensor

from cm_diffusers.diffusion.denoisers import for_frames, unet_arguments
from cm_diffusers.errors import UserError


TOKENS, FRAMES, SIDE = 8, 4, 32  # where the config does not say
Arguments = dict[str, Tensor]


@dataclass(frozen=True)
class Example:
    """What a network is called with.

    Attributes:
        x: Noisy samples `(B, ...)` of unit variance.
        t: Their times `(B,)` as the network is told them.
        time_range: The length of all times, in the same unit.
        arguments: All else, by name.
    """

    x: Tensor
    t: Tensor
    time_range: float
    arguments: Arguments


def example_of(
    network: ModelMixin, batch_size: int = 2, time_range: float | None = None, time_start: float = 0.0
) -> Example:
    """At times from a quarter to three quarters of the range, drawn from torch's generator.

    Args:
        network: One of `EXAMPLES`.
        time_start: The least time; below 0 where the network is told a logarithm.
        time_range: If not given, 1 for Flux and for Sana with guidance, which multiply it themselves, and 1000 for others.

    Raises:
        ValueError: It is another network.
    """
    kind = type(network).__name__
    if kind not in EXAMPLES:
        raise UserError(
            f"No example can be made for {kind}, only for {', '.join(EXAMPLES)}: call check_jvp with an Example of your own."
        )
    x, arguments = EXAMPLES[kind](network.config, batch_size)
    told = 1.0 if kind.startswith("Flux") or (kind.startswith("Sana") and "guidance" in arguments) else 1000.0
    length = told if time_range is None else time_range
    return Example(x, time_start + torch.linspace(0.25, 0.75, batch_size) * length, length, arguments)


def _unet2d(config: object, n: int) -> tuple[Tensor, Arguments]:
    known = config.num_class_embeds
    return _images(config, n), {"class_labels": torch.arange(n) % known} if known else {}


def _unet(config: object, n: int) -> tuple[Tensor, Arguments]:
    x, arguments = _unet2d(config, n)
    return x, unet_arguments(arguments | image_text(config, n))


def _motion_unet(config: object, n: int) -> tuple[Tensor, Arguments]:
    frames = _images(config, n * FRAMES).unflatten(0, (n, FRAMES)).movedim(1, 2).contiguous()
    return frames, unet_arguments(for_frames(image_text(config, n), frames))


def image_text(config: object, n: int, tokens: int = TOKENS) -> Arguments:
    """Text states, guidance embedding and the conditions of SDXL, as far as a UNet has them."""
    width = config.cross_attention_dim
    width = getattr(config, "encoder_hid_dim", None) or (width if isinstance(width, int) else max(width))
    found = {"encoder_hidden_states": torch.randn(n, tokens, width)}
    if config.time_cond_proj_dim:
        found["timestep_cond"] = torch.randn(n, config.time_cond_proj_dim)
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        found |= {"text_embeds": torch.randn(n, pooled), "time_ids": torch.tensor([[512.0, 512, 0, 0, 512, 512]] * n)}
    return found


def _dit(config: object, n: int) -> tuple[Tensor, Arguments]:
    return _images(config, n), {"class_labels": torch.arange(n) % config.num_embeds_ada_norm}


def _sd3(config: object, n: int) -> tuple[Tensor, Arguments]:
    return _images(config, n), joint_text(config, n)


def _flux(config: object, n: int) -> tuple[Tensor, Arguments]:
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0))
    arguments = joint_text(config, n) | {"img_ids": places, "txt_ids": torch.zeros(TOKENS, 3)}
    if config.guidance_embeds:
        arguments["guidance"] = torch.full((n,), 3.5)
    return torch.randn(n, len(places), config.in_channels), arguments


def _sana(config: object, n: int) -> tuple[Tensor, Arguments]:
    arguments = {"encoder_hidden_states": torch.randn(n, TOKENS, config.caption_channels)}
    return _images(config, n), arguments | ({"guidance": torch.full((n,), 0.45)} if config.guidance_embeds else {})


def joint_text(config: object, n: int, tokens: int = TOKENS) -> Arguments:
    """States and summaries of the text of Stable Diffusion 3 and Flux."""
    states = torch.randn(n, tokens, config.joint_attention_dim)
    return {"encoder_hidden_states": states, "pooled_projections": torch.randn(n, config.pooled_projection_dim)}


def _images(config: object, n: int) -> Tensor:
    size = config.sample_size or SIDE
    return torch.randn(n, config.in_channels, *((size, size) if isinstance(size, int) else size))


EXAMPLES: dict[str, Callable[[object, int], tuple[Tensor, Arguments]]] = {
    "UNet2DModel": _unet2d,
    "UNet2DConditionModel": _unet,
    "UNetMotionModel": _motion_unet,
    "DiTTransformer2DModel": _dit,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "SanaTransformer2DModel": _sana,
}
