"""Images as prompts (IP-Adapter, 2308.06721)."""

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import PipelineImageInput
from diffusers.models import ImageProjection
from torch import Tensor

from cm_diffusers.pipelines.latents import dtype_of
from cm_diffusers.pipelines.pictures import check_values, readable
from cm_diffusers.pipelines.starts import repeated


def image_embeddings(
    pipe: DiffusionPipeline,
    image: PipelineImageInput | None,
    embeds: list[Tensor] | None,
    batch: int,
    guided: bool,
    device: torch.device,
) -> list[Tensor] | None:
    """What each loaded IP-Adapter reads, (B, N, ...) with N images each; (2B, N, ...), unconditional first, if guided.

    Args:
        pipe: A pipeline whose UNet has IP-Adapters.
        image: For each adapter an image, or a list of them.
        embeds: Instead, for each adapter (1, N, ...), or where guided (2, N, ...), or the same for each of B.
        batch: B.
        guided: Whether both branches of classifier-free guidance are evaluated.
        device: Where the image encoder runs.

    Raises:
        ValueError: There are not as many images as adapters, or embeddings of a number that does not fit.
    """
    if image is None and embeds is None:
        return None
    layers = pipe.unet.encoder_hid_proj.image_projection_layers
    given = embeds if embeds is not None else image if isinstance(image, list) else [image]
    if len(given) != len(layers):
        raise ValueError(f"{len(layers)} IP-Adapters are loaded, but {len(given)} images given; give one for each.")
    if embeds is None:
        pairs = [_encode(pipe, one, layer, device) for one, layer in zip(given, layers, strict=True)]
    else:
        pairs = [_halves(one.to(device), guided) for one in given]
    return [
        torch.cat([repeated(part, batch) for part in (pair if guided else pair[1:])]).to(dtype_of(pipe.unet))
        for pair in pairs
    ]


def _encode(
    pipe: DiffusionPipeline, image: PipelineImageInput, layer: torch.nn.Module, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Unconditional and conditional embeddings, each (1, N, ...)."""
    if not isinstance(image, Tensor):
        image = pipe.feature_extractor(_bytes(image), return_tensors="pt").pixel_values
    pixels = image.to(device, pipe.image_encoder.dtype)
    if isinstance(layer, ImageProjection):
        positive = pipe.image_encoder(pixels).image_embeds
        return torch.zeros_like(positive)[None], positive[None]
    both = (pipe.image_encoder(x, output_hidden_states=True) for x in (torch.zeros_like(pixels), pixels))
    unconditional, conditional = (output.hidden_states[-2][None] for output in both)
    return unconditional, conditional


def _bytes(image: PipelineImageInput) -> PipelineImageInput:
    """PIL images as training sees them, and arrays in bytes: the feature extractor divides all by 255."""
    if isinstance(image, list | tuple):
        return [_bytes(one) for one in image]
    if isinstance(image, Tensor):
        return image
    image = readable(image)
    if not isinstance(image, np.ndarray):
        return image
    check_values(image, 0)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def _halves(embeds: Tensor, guided: bool) -> tuple[Tensor, Tensor]:
    if not guided:
        return embeds[:0], embeds
    if len(embeds) % 2:
        raise ValueError(
            f"With guidance ip_adapter_image_embeds hold the unconditional and the conditional half; found {len(embeds)}."
        )
    return embeds.chunk(2)
