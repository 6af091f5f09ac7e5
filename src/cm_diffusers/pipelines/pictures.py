"""Pictures and masks that callers give, of any type, as the image processors read them right."""

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import PipelineImageInput
from torch import Tensor

from cm_diffusers.pixels import mask_levels, mask_of, upright_rgb


ROUNDING = 0.01  # by which resizing may leave the range of an image


def readable(image: PipelineImageInput) -> PipelineImageInput:
    """PIL images upright as RGB, as training sees them, and arrays and tensors of bytes or booleans as floats in [0, 1].

    Raises:
        ValueError: They hold integers of another type, or numbers that nothing tells the colours of.
    """
    if isinstance(image, list | tuple):
        return [readable(one) for one in image]
    if isinstance(image, PIL.Image.Image):
        return upright_rgb(image)
    if not isinstance(image, np.ndarray | Tensor):
        return image
    tensor = torch.as_tensor(image)
    if tensor.is_floating_point():
        return image
    if tensor.dtype not in (torch.uint8, torch.bool):
        raise ValueError(f"An image of integers must be uint8, from 0 to 255, got {tensor.dtype}; or use floats to 1.")
    floats = tensor.float() / (255 if tensor.dtype == torch.uint8 else 1)
    return floats.numpy() if isinstance(image, np.ndarray) else floats


def readable_mask(mask: PipelineImageInput) -> PipelineImageInput:
    """Any mask in grey, from 0 to 1 or 255, as `mask_levels` reads it; colours of arrays are averaged.

    Raises:
        ValueError: Nothing tells what is meant.
    """
    if isinstance(mask, list | tuple):
        return [readable_mask(one) for one in mask]
    if isinstance(mask, PIL.Image.Image):
        return mask_of(mask)
    if isinstance(mask, np.ndarray):
        levels = mask_levels(torch.from_numpy(mask.astype(np.float32))).numpy()
        return levels.mean(-1) if levels.ndim > 2 and levels.shape[-1] == 3 else levels
    if isinstance(mask, Tensor):
        levels = mask_levels(mask)
        return levels.mean(-3, keepdim=True) if levels.ndim > 2 and levels.shape[-3] == 3 else levels
    return mask


def check_values(image: PipelineImageInput, latent_channels: int) -> None:
    """
    Raises:
        ValueError: Floats that are not latents do not lie from 0 to 1, nor from -1 to 1.
    """
    if isinstance(image, list):
        for one in image:
            check_values(one, latent_channels)
    elif isinstance(image, np.ndarray | Tensor):
        are_latents = isinstance(image, Tensor) and image.ndim > 2 and image.shape[-3] == latent_channels
        least, most = float(image.min()), float(image.max())
        if not are_latents and not -1 - ROUNDING <= least <= most <= 1 + ROUNDING:
            raise ValueError(
                f"An image of floats must lie from 0 to 1, or from -1 to 1, but it holds {least:g} to {most:g}: divide bytes "
                "by 255."
            )
