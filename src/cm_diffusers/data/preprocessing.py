"""From an encoded image file to the tensor a network sees."""

import hashlib
import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cm_diffusers.data.sources import INTERPOLATIONS, DataConfig
from cm_diffusers.pixels import upright_rgb


LATE_EXIF = (b"eXIf", b"profile type exif", b"tiff:Orientation")  # may follow a PNG's pixels
ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)
PIXELS = 3  # in the key of what is cached: raise it when `preprocess(decode_image(...))` changes


class Size(NamedTuple):
    """Pixels along each side."""

    height: int
    width: int


class View(NamedTuple):
    """One crop of an image: the crop's place along the free range, 0 to 1 each, and whether it is mirrored."""

    left: float = 0.5
    top: float = 0.5
    flip: bool = False


def drawn_view(draw: np.ndarray, config: DataConfig) -> View:
    """The view that three uniform draws (3,) choose, as far as the config leaves it open."""
    left, top = (0.5, 0.5) if config.center_crop else draw[:2]
    return View(left, top, config.random_flip and bool(draw[2] < 0.5))


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
        with Image.open(io.BytesIO(content)) as image:
            return upright_rgb(image)
    except Exception:  # Pillow's plugins raise nearly every kind of error on damaged files
        return None


def fault_of(record: Any) -> str:
    """Why `decode_image` gives nothing for a record, after the word "images"."""
    content = read_bytes(record) if isinstance(record, dict) or record is None else b"?"
    if content is None:
        is_folder = record and record["path"] and Path(record["path"]).is_dir()
        return "that cannot be read" if is_folder else "that are not there"
    if not content:
        return "in empty files"
    with suppress(Exception), Image.open(io.BytesIO(content)) as image:  # as in decode_image
        image.load()
        if image.mode in ("F", "I"):
            return "with numbers in place of colours, of which nothing tells what is black and white"
    return "that cannot be read"


def upright_size(record: dict[str, Any] | None) -> Size | None:
    """The size `decode_image` gives, from the file's header alone; None when the header cannot be read."""
    content = read_bytes(record)
    if content is None:
        return None
    try:
        with Image.open(io.BytesIO(content)) as image:
            plain = image.format == "PNG" and not any(mark in content for mark in LATE_EXIF)  # getexif would decode it
            plain = plain or image.format == "TIFF"  # whose size Pillow gives as turned already
            turned = not plain and image.getexif().get(ORIENTATION) in QUARTER_TURNS
            return Size(*image.size) if turned else Size(image.height, image.width)
    except Exception:  # as in decode_image
        return None


def square(side: int) -> Size:
    return Size(side, side)


def covering(size: Size, target: Size) -> Size:
    """The least size of the same shape that covers `target`: what an image is resized to before the crop."""
    scale = max(wanted / side for side, wanted in zip(size, target, strict=True))
    return Size(*(max(wanted, round(side * scale)) for side, wanted in zip(size, target, strict=True)))


def corner(size: Size, target: Size, view: View) -> tuple[int, int]:
    """Top and left of a view's crop in the resized image, before it is mirrored."""
    return round(view.top * (size.height - target.height)), round(view.left * (size.width - target.width))


def micro_conditions(size: Size, target: Size, view: View) -> tuple[int, ...]:
    """What Stable Diffusion XL is told of an image (2307.01952, Sec. 2.2), in `_get_add_time_ids`'s order.

    They are the file's height and width, top and left of the crop in the resized image, and the crop's height and
    width. Left of a mirrored view is that in the mirrored image: what the network sees.
    """
    resized = covering(size, target)
    top, left = corner(resized, target, view)
    return *size, top, resized.width - target.width - left if view.flip else left, *target


def resize(image: Image.Image, target: Size, interpolation: str) -> np.ndarray:
    """The image, resized to cover `target`: (H, W, 3) uint8."""
    height, width = covering(Size(image.height, image.width), target)
    return np.asarray(image.resize((width, height), INTERPOLATIONS[interpolation]))


def crop(pixels: np.ndarray, target: Size, view: View) -> np.ndarray:
    """Cuts `view` out of (H, W, 3): `(*target, 3)`."""
    top, left = corner(Size(*pixels.shape[:2]), target, view)
    cut = pixels[top : top + target.height, left : left + target.width]
    return cut[:, ::-1] if view.flip else cut


def to_tensor(crops: Sequence[np.ndarray]) -> Tensor:
    """Crops (H, W, 3) uint8 of one size to (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous().float().div(127.5).sub(1)


def preprocess(image: Image.Image, config: DataConfig, view: View, target: Size | None = None) -> Tensor:
    """Resizes, crops and mirrors an image: (3, H, W) float32 in [-1, 1], a square of `config.resolution` by default."""
    target = target or square(config.resolution)
    return to_tensor([crop(resize(image, target, config.interpolation_type), target, view)])[0]
