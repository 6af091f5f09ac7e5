"""What the heads of critics are made of."""

from torch import nn


def head_body(width: int, channels: int) -> list[nn.Module]:
    """The layers of a head, from `width` to `channels`, but its last."""
    return [_norm(width), nn.Conv2d(width, channels, 3, stride=2, padding=1), _norm(channels), nn.SiLU()]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(next(n for n in (32, 16, 8, 4, 2, 1) if channels % n == 0), channels)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all its parameters zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
