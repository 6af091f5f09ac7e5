"""Whether the views in a tiled image show one object: Carve3D (2312.13980, Sec. 3)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from cm_diffusers.diffusion.distances import l1
from cm_diffusers.diffusion.feature_networks import in_float32
from cm_diffusers.errors import UserError
from cm_diffusers.extras import TORCHVISION, missing
from cm_diffusers.rewards.base import Metadata


WHITE = 0.95  # from here on, in every colour, a pixel is background
MARGIN = 5  # pixels around the object
LPIPS_SIDE = 224  # pixels, to which crops are resized for LPIPS


class MultiViewConsistency:
    """Minus the distance of the views from a reconstruction, seen from where they were; 0 where they agree.

    Each view is compared inside the square around what is not white in it, 5 pixels wider on each side. Outside of the
    image it is white, too.

    Args:
        reconstruct_and_render: Called with views `(B, V, 3, h, w)` in [0, 1], row by row, and `cameras`; returns the same
            views of one object. Its attribute `differentiable`, if any, is the reward's.
        cameras: Whatever it needs to know of the V cameras.
        layout: Rows and columns of views in an image.
        distance: `(B, 3, s, s), (B, 3, s, s) -> (B,)`, such as `l1` or `lpips()`.

    Raises:
        ValueError: The layout is not of two whole numbers from 1 on.
    """

    def __init__(
        self,
        reconstruct_and_render: Callable[[Tensor, Any], Tensor],
        cameras: Any = None,
        layout: tuple[int, int] = (2, 2),
        distance: Callable[[Tensor, Tensor], Tensor] = l1,
    ) -> None:
        if len(layout) != 2 or min(layout) < 1:
            raise UserError(f"layout must be the numbers of rows and columns of views, but it is {layout}.")
        self.render, self.cameras, self.layout, self.distance = reconstruct_and_render, cameras, layout, distance
        self.differentiable = bool(getattr(reconstruct_and_render, "differentiable", False))

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata | None = None) -> Tensor:
        """Rewards `(B,)` of tiled images `(B, 3, rows * h, columns * w)` in [0, 1].

        Raises:
            ValueError: The layout does not divide the images, or the renderer returns another shape.
        """
        views = split_views(images, self.layout)
        rendered = self.render(views, self.cameras)
        if rendered.shape != views.shape:
            raise UserError(
                f"The renderer was given views of shape {tuple(views.shape)} and returned {tuple(rendered.shape)}; it must "
                "return the same views."
            )
        pairs = zip(views.flatten(0, 1), rendered.flatten(0, 1), strict=True)
        distances = [self.distance(*_cropped(view, other)) for view, other in pairs]
        return -torch.cat(distances).view(views.shape[:2]).mean(1)


def split_views(images: Tensor, layout: tuple[int, int]) -> Tensor:
    """Views `(B, rows * columns, C, h, w)`, row by row, of tiled images `(B, C, rows * h, columns * w)`."""
    (rows, columns), (height, width) = layout, images.shape[-2:]
    if height % rows or width % columns:
        raise UserError(f"Images of {height} x {width} pixels cannot be split into {rows} x {columns} views.")
    tiles = images.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # (B, C, rows, h, columns, w)
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def object_box(view: Tensor) -> tuple[int, int, int]:
    """Top, left and side of the square around the object in a view `(3, h, w)`; of the whole of it, where all is white."""
    found = (view < WHITE).any(0)
    if not found.any():
        found = torch.ones_like(found)
    ends = []
    for axis in (1, 0):
        places = found.any(axis).nonzero()
        ends.append((places.min().item(), places.max().item() + 1))
    side = max(stop - start for start, stop in ends) + 2 * MARGIN
    top, left = ((start + stop - side) // 2 for start, stop in ends)
    return top, left, side


def _cropped(view: Tensor, rendered: Tensor) -> tuple[Tensor, Tensor]:
    """Both `(1, 3, s, s)`, inside the box of the first."""
    top, left, side = object_box(view)
    height, width = view.shape[-2:]
    edges = (-left, left + side - width, -top, top + side - height)  # negative ones are cut off
    return pad(view, edges, value=1.0)[None], pad(rendered, edges, value=1.0)[None]


def lpips() -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (1801.03924) with AlexNet's features of images `(B, 3, H, W)` in [0, 1], see `in_float32`.

    Raises:
        ValueError: torchvision or its weights are missing.
    """
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        network = LearnedPerceptualImagePatchSimilarity("alex").net.requires_grad_(False)
    except ModuleNotFoundError as error:
        raise UserError(missing("LPIPS", TORCHVISION)) from error
    except (OSError, RuntimeError) as error:
        raise UserError("AlexNet's weights could not be downloaded; check the network or TORCH_HOME.") from error

    def distance(x: Tensor, y: Tensor) -> Tensor:
        x, y = (interpolate(image, (LPIPS_SIDE,) * 2, mode="bilinear", antialias=True) for image in (x, y))
        return in_float32(network, x, y, normalize=True).reshape(len(x))

    return distance
