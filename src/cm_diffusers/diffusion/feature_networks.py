"""Frozen networks that look at images, for losses, rewards, critics and metrics: always in float32."""

from itertools import chain

import torch
from torch import Tensor, nn


HALF = (torch.float16, torch.bfloat16)


def in_float32(network: nn.Module, images: Tensor, *others: object, **options: object) -> object:
    """What a network in float32 makes of images, and of whatever else it takes, also under autocast.

    Half precision has too few digits for small differences: LPIPS of two images that nearly agree is several times too
    large in bfloat16.

    Args:
        network: Follows the images from device to device.
        images: `(B, ...)`; they and all other tensors are given in float32 at least.
        others, options: Further arguments.
    """
    move(network, images.device)
    given = (x.float() if isinstance(x, Tensor) and x.dtype in HALF else x for x in (images, *others))
    with torch.autocast(images.device.type, enabled=False):
        return network(*given, **options)


def move(network: nn.Module, device: torch.device) -> None:
    """To the device, if it is elsewhere: `Module.to` asks every weight, in every call."""
    one = next(chain(network.parameters(), network.buffers()), None)
    if one is not None and one.device != device:
        network.to(device)
