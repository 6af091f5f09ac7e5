"""How well images compress: the size of a JPEG file, as in DDPO (2305.13301, Sec. 5)."""

from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from cm_diffusers.rewards.base import Metadata


QUALITY = 95


def jpeg_size(images: Tensor) -> Tensor:
    """Size `(B,)` in kB of 1000 bytes of images `(B, 3, H, W)` in [0, 1], rounded to bytes, as JPEGs of quality 95."""
    pixels = (images.detach() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return torch.tensor([_bytes(Image.fromarray(image)) / 1000 for image in pixels], device=images.device)


def _bytes(image: Image.Image) -> int:
    file = BytesIO()
    image.save(file, format="JPEG", quality=QUALITY)
    return file.tell()


def jpeg_incompressibility(images: Tensor, prompts: list[str], metadata: Metadata | None = None) -> Tensor:
    """The size `(B,)` in kB."""
    return jpeg_size(images)


def jpeg_compressibility(images: Tensor, prompts: list[str], metadata: Metadata | None = None) -> Tensor:
    """Minus the size `(B,)` in kB."""
    return -jpeg_size(images)
