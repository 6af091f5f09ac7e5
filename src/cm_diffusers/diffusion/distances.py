"""Per-sample distances (B, ...), (B, ...) -> (B,)."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cm_diffusers.diffusion.feature_networks import in_float32
from cm_diffusers.errors import UserError
from cm_diffusers.extras import LPIPS, missing


LPIPS_SIDE = 224  # pixels
LPIPS_AS_IT_IS = 256  # pixels, from which on images are not resized


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference over all elements of a sample."""
    return (x - y).square().flatten(1).mean(1)


def huber(x: Tensor, y: Tensor, c: float = 0.001) -> Tensor:
    """LCM's pseudo-Huber, mean over elements of sqrt(d^2 + c^2) - c: about L1 for d >> c.

    iCT's acts on the norm of the whole sample instead and is another function: `pseudo_huber`.
    """
    return (torch.sqrt((x - y).square() + c**2) - c).flatten(1).mean(1)


DISTANCES = {"l2": l2, "huber": huber}


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference over all elements of a sample."""
    return (x - y).abs().flatten(1).mean(1)


def pseudo_huber(x: Tensor, y: Tensor, c: float) -> Tensor:
    """sqrt(n^2 + c^2) - c of the norm n of the whole sample's difference (2310.14189, Sec. 3.3); n itself at c = 0."""
    difference = (x - y).flatten(1)
    if c == 0:
        return torch.linalg.vector_norm(difference, dim=1)  # its gradient at 0 is 0
    squared = difference.square().sum(1)
    return squared / ((squared + c**2).sqrt() + c)  # the same, without the difference


def cauchy(x: Tensor, y: Tensor, c: float) -> Tensor:
    """ln(1 + n^2 / (2 c^2)) of the norm n of the whole sample's difference (2502.01441): outliers barely pull."""
    return torch.log1p((x - y).flatten(1).square().sum(1) / (2 * c**2))


def huber_c(elements: int) -> float:
    """The c that suits a sample of so many elements: 0.00054 sqrt(d) (2310.14189, Sec. 3.3)."""
    return 0.00054 * elements**0.5


def cauchy_c(elements: int, intervals: int) -> float:
    """The c of `cauchy` on a grid of so many intervals: falls with the residuals (2502.01441, their code).

    exp(-1.15 ln(intervals) - 0.85) from 20 intervals on, `huber_c` before; fitted to 4096 elements, scaled to others
    as the norm of the sample is.
    """
    if intervals < 20:
        return huber_c(elements)
    return math.exp(-1.15 * math.log(intervals) - 0.85) * (elements / 4096) ** 0.5


def perceptual(lpips: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (1801.03924) of images `(B, 1 or 3, H, W)` in [-1, 1].

    As in 2303.01469, Appendix C, the shorter side is brought to 224 pixels, but larger images, from 256 on, are compared
    as they are.

    Args:
        lpips: Two batches of images `(B, 3, H, W)` -> distances `(B,)` or `(B, 1, 1, 1)`, of a frozen network.
    """

    def distance(x: Tensor, y: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise UserError(
                f"--loss_type lpips compares images (B, 1 or 3, H, W), but these are {tuple(x.shape)}; use l2 or l1."
            )
        x, y = x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)
        if (shorter := min(x.shape[2:])) < LPIPS_AS_IT_IS:
            size = [round(side * LPIPS_SIDE / shorter) for side in x.shape[2:]]
            x, y = (interpolate(image, size, mode="bilinear") for image in (x, y))
        return lpips(x, y).reshape(len(x))

    return distance


def load_lpips() -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS with VGG features from the package lpips, see `in_float32`.

    Raises:
        ValueError: The package is missing.
    """
    try:
        import lpips
    except ImportError as error:
        raise UserError(missing("--loss_type lpips", LPIPS)) from error
    return partial(in_float32, lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False).eval())
