"""Images for a frozen network, prepared as its image processor would, but in tensors that carry gradients."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from cm_diffusers.errors import UserError


MODES = {2: "bilinear", 3: "bicubic"}  # by PIL's number


@dataclass(frozen=True)
class Preparation:
    """What an image processor does: resize with antialiasing, crop the centre, normalise.

    Attributes:
        size: The shorter side, in pixels, or (height, width) into which images are squeezed.
        crop: (height, width) of the centre that is kept, with black around it where the image is smaller; None keeps all.
        mean: Of the three colours, subtracted from images in [0, 1].
        std: By which they are then divided.
        mode: "bicubic" or "bilinear".
    """

    size: int | tuple[int, int]
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str

    @classmethod
    def of(cls, processor: Any) -> "Preparation":
        """What an image processor of transformers does.

        Raises:
            ValueError: It resizes otherwise.
        """
        settings = processor.to_dict()
        size, crop, mode = settings["size"], settings.get("crop_size"), MODES.get(settings.get("resample"))
        side = size.get("shortest_edge") or (size.get("height"), size.get("width"))
        if not settings.get("do_resize", True) or side == (None, None) or mode is None:
            raise UserError(
                f"its image processor {type(processor).__name__} does not resize to a shorter side or to a height and width, "
                "bilinear or bicubic; take another model"
            )
        crop = (crop["height"], crop["width"]) if settings.get("do_center_crop") else None
        if not settings.get("do_normalize", True):
            return cls(side, crop, (0.0,) * 3, (1.0,) * 3, mode)
        return cls(side, crop, tuple(settings["image_mean"]), tuple(settings["image_std"]), mode)

    def __call__(self, images: Tensor) -> Tensor:
        """`(B, 3, h, w)` of images `(B, 3, H, W)` in [0, 1]; the processor would first round them to bytes."""
        images = interpolate(images, self._resized(*images.shape[-2:]), mode=self.mode, antialias=True).clamp(0, 1)
        if self.crop is not None:
            (height, width), (h, w) = images.shape[-2:], self.crop
            top, left = (height - h) // 2, (width - w) // 2  # negative where black is added
            images = pad(images, (-left, left + w - width, -top, top + h - height))
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.size, int):
            return self.size
        if height < width:
            return self.size, int(self.size * width / height)
        return int(self.size * height / width), self.size
