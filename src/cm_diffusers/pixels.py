"""Pictures of any kind as upright RGB of eight bits, and masks of any kind as levels: training and pipelines see the same."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture as its camera was held, by `to_rgb`."""
    return to_rgb(ImageOps.exif_transpose(image), image.format)


def to_rgb(image: Image.Image, file_format: str | None = None) -> Image.Image:
    """Eight bits a channel; sixteen are scaled down, floats from 0 to 1 up, and what is transparent becomes white.

    Raises:
        ValueError: Floats beyond 0 and 1 or, but in a PNG, integers of 32 bits: nothing tells what is black and white.
    """
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"The image holds numbers from {values.min()} to {values.max()}; store it in 8 bits.")
        return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode == "I" and file_format != "PNG":
        raise ValueError("The image holds integers of 32 bits; store it in 8 or 16 bits.")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def mask_of(image: Image.Image) -> Image.Image:
    """A mask's levels as grey of eight bits, white where it says so; see `mask_levels`.

    Raises:
        ValueError: It has transparent places, and colours that do not say either what is meant.
    """
    image = ImageOps.exif_transpose(image)
    clear = image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255
    if image.mode not in ("F", "I") and not image.mode.startswith("I;"):
        image = image.convert("RGBA" if clear else image.mode).convert("L")
    grey = np.asarray(image)
    if clear and set(np.unique(grey).tolist()) != {0, 255}:
        raise ValueError(
            "A mask with transparent places says in two ways what is to change: save it in black and white, without them."
        )
    levels = mask_levels(torch.from_numpy(grey.astype(np.float32)))
    return Image.fromarray((levels.numpy() * 255).round().astype(np.uint8))


def mask_levels(mask: Tensor) -> Tensor:
    """The levels of a mask, floats from 0 to 1.

    Where there are numbers beyond 1, two values of which one is 0 are black and white, and others are of 8 or 16 bits.

    Raises:
        ValueError: It holds numbers that are not finite, or of another range.
    """
    levels = mask.float()
    least, most = levels.aminmax()
    if not levels.isfinite().all() or most > 65535 or (least < 0 and not 0 < most <= 1):
        raise ValueError(
            f"A mask holds numbers from {least:g} to {most:g}: give floats from 0 to 1, or bytes from 0 to 255."
        )
    if most <= 1:
        return levels
    if least == 0 and len(levels.unique()) == 2:
        return (levels > 0).float()
    return levels / (255 if most <= 255 else 65535)
