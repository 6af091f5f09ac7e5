"""Per-sample distances (B, ...), (B, ...) -> (B,)."""

import torch
from torch import Tensor


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference over all elements of a sample."""
    return (x - y).square().flatten(1).mean(1)


def huber(x: Tensor, y: Tensor, c: float = 0.001) -> Tensor:
    """LCM's pseudo-Huber, mean over elements of sqrt(d^2 + c^2) - c: about L1 for d >> c.

    iCT's pseudo-Huber (2310.14189) acts on the norm of the whole sample instead and is another function.
    """
    return (torch.sqrt((x - y).square() + c**2) - c).flatten(1).mean(1)


DISTANCES = {"l2": l2, "huber": huber}
