"""Latents decoded a few at a time: a large image needs gigabytes of its own."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from torch import Tensor
from torch.utils.checkpoint import checkpoint


Found = TypeVar("Found")
CHUNK = 64 * 64  # latent pixels decoded at once: one image of 512 pixels, whose gradient takes 6 GiB


def in_chunks(decode: Callable[[Tensor], Found], latents: Tensor, downscale: int = 8) -> list[Found]:
    """What `decode` makes of each part of the latents `(B, C, h, w)`. A gradient decodes each a second time.

    Args:
        downscale: Pixels per latent, along each side: with more of them than 8, fewer latents are decoded at once.
    """
    size = latents[0, 0].numel() * max(1, downscale // 8) ** 2
    parts = latents.split(max(1, CHUNK // size))
    again = latents.requires_grad and len(parts) > 1
    return list(map(partial(checkpoint, decode, use_reentrant=False) if again else decode, parts))
