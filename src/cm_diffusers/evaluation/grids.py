"""Labelled grids of images."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


MIN_TILE = 96  # pixels; smaller images are enlarged so that labels fit
MARGIN = 4


def image_grid(rows: Sequence[Tensor], row_labels: Sequence[str], column_labels: Sequence[str]) -> Image.Image:
    """One picture of rows of images (C, 3, H, W) in [0, 1], with a label left of each row and above each column."""
    height, width = rows[0].shape[-2:]
    zoom = max(1, -(-MIN_TILE // min(height, width)))
    tile_height, tile_width = zoom * height, zoom * width
    font = ImageFont.load_default(size=13)
    heads = [textwrap.fill(label, max(4, tile_width // 8)) for label in column_labels]
    left = MARGIN * 2 + max(round(font.getlength(label)) for label in row_labels)
    top = MARGIN * 2 + 17 * max(head.count("\n") + 1 for head in heads)
    canvas = Image.new(
        "RGB", (left + len(heads) * (tile_width + MARGIN), top + len(rows) * (tile_height + MARGIN)), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for column, head in enumerate(heads):
        draw.multiline_text((left + column * (tile_width + MARGIN), MARGIN), head, fill="black", font=font)
    for row, (images, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + row * (tile_height + MARGIN)
        draw.text((MARGIN, y + tile_height // 2), label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            tile = _to_pil(image).resize((tile_width, tile_height), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + column * (tile_width + MARGIN), y))
    return canvas


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy().astype(np.uint8))
