"""From an encoded image file to the tensor a network sees."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cm_diffusers.data.sources import INTERPOLATIONS, DataConfig


class View(NamedTuple):
    """One crop of an image: the crop's place along the free range, 0 to 1 each, and whether it is mirrored."""

    left: float = 0.5
    top: float = 0.5
    flip: bool = False


def read_bytes(record: dict[str, Any] | None) -> bytes | None:
    """The encoded file of an image record, or None when there is none."""
    if not record or (record["bytes"] is None and record["path"] is None):
        return None
    try:
        return record["bytes"] if record["bytes"] is not None else Path(record["path"]).read_bytes()
    except OSError:
        return None


def content_hash(record: dict[str, Any] | None) -> str:
    """sha256 of the encoded file; "missing" when there is none."""
    content = read_bytes(record)
    return "missing" if content is None else hashlib.sha256(content).hexdigest()


def decode_image(record: dict[str, Any] | None) -> Image.Image | None:
    """The upright RGB image of an image record, or None when it cannot be read."""
    content = read_bytes(record)
    if content is None:
        return None
    try:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    except Exception:  # Pillow's plugins raise nearly every kind of error on damaged files
        return None


def resize(image: Image.Image, config: DataConfig) -> np.ndarray:
    """Resizes the shorter side to `config.resolution`: (H, W, 3) uint8."""
    scale = config.resolution / min(image.size)
    size = tuple(max(config.resolution, round(side * scale)) for side in image.size)
    return np.asarray(image.resize(size, INTERPOLATIONS[config.interpolation_type]))


def crop(pixels: np.ndarray, resolution: int, view: View) -> np.ndarray:
    """Cuts the square `view` out of (H, W, 3): (resolution, resolution, 3)."""
    top = round(view.top * (pixels.shape[0] - resolution))
    left = round(view.left * (pixels.shape[1] - resolution))
    square = pixels[top : top + resolution, left : left + resolution]
    return square[:, ::-1] if view.flip else square


def to_tensor(squares: Sequence[np.ndarray]) -> Tensor:
    """Squares (R, R, 3) uint8 to (B, 3, R, R) float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous().float().div(127.5).sub(1)


def preprocess(image: Image.Image, config: DataConfig, view: View) -> Tensor:
    """Resizes, crops and mirrors an image: (3, R, R) float32 in [-1, 1]."""
    return to_tensor([crop(resize(image, config), config.resolution, view)])[0]
