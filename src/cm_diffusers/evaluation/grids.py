"""Labelled grids of images."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


SMALLEST, LARGEST = 96, 320  # sides of a cell in pixels: smaller images are enlarged, larger ones reduced
WIDEST = 3200  # pixels of all cells of a row, as far as they are larger than the smallest
MARGIN = 4
LINES = 3  # of a label
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def image_grid(rows: Sequence[Tensor], row_labels: Sequence[str], column_labels: Sequence[str]) -> Image.Image:
    """One picture of rows of images (C, 3, H, W) in [0, 1], with a label left of each row and above each column.

    Images of any sizes; their cells are alike. Letters grow with the cells, and what does not fit ends in an ellipsis.
    """
    width, height = _cell([images.shape[-2:] for images in rows], len(column_labels))
    size = max(12, width // 14)
    font, line = ImageFont.load_default(size=size), round(1.3 * size)
    heads = [wrapped(label, width - MARGIN, font) for label in column_labels]
    names = [wrapped(label, max(width, 10 * size), font) for label in row_labels]
    left = MARGIN * 2 + max(round(font.getlength(part)) for name in names for part in name)
    top = MARGIN * 2 + line * max(map(len, heads))
    canvas = Image.new("RGB", (left + len(heads) * (width + MARGIN), top + len(rows) * (height + MARGIN)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, head in enumerate(heads):
        _write(draw, (left + column * (width + MARGIN), MARGIN), head, font, line)
    for row, (images, name) in enumerate(zip(rows, names, strict=True)):
        y = top + row * (height + MARGIN)
        _write(draw, (MARGIN, y + max(0, height - line * len(name)) // 2), name, font, line)
        for column, image in enumerate(images):
            canvas.paste(_fitted(image, (width, height)), (left + column * (width + MARGIN), y))
    return canvas


def _cell(shapes: Sequence[Sequence[int]], columns: int) -> tuple[int, int]:
    """Width and height of all cells: those of the largest image, enlarged in whole pixels or reduced."""
    height, width = max(shapes, key=lambda shape: shape[0] * shape[1])
    most = max(SMALLEST, min(LARGEST, WIDEST // columns))
    if max(height, width) > most:
        shrunk = most / max(height, width)
        return max(1, round(shrunk * width)), max(1, round(shrunk * height))
    zoom = max(1, min(-(-SMALLEST // min(height, width)), most // max(height, width)))
    return zoom * width, zoom * height


def wrapped(text: str, width: int, font: Font) -> list[str]:
    """Lines of at most `width` pixels, at most `LINES`; a longer text ends in an ellipsis."""
    lines, rest = [""], text.split()
    while rest:
        word = rest.pop(0)
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        elif not lines[-1] or font.getlength(word) > width:  # a word as long as a line is broken
            fits = next((n for n in range(len(longer), 1, -1) if font.getlength(longer[:n]) <= width), 1)
            lines[-1], rest = longer[:fits].rstrip(), [longer[fits:].lstrip(), *rest]
            lines.append("")
        else:
            lines, rest = [*lines, ""], [word, *rest]
        if len(lines) > LINES:
            return [*lines[: LINES - 1], _cut(lines[LINES - 1], width, font)]
    return lines


def _cut(line: str, width: int, font: Font) -> str:
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1].rstrip()
    return f"{line}…"


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], font: Font, step: int) -> None:
    for number, text in enumerate(lines):
        draw.text((place[0], place[1] + number * step), text, fill="black", font=font)


def _fitted(image: Tensor, size: tuple[int, int]) -> Image.Image:
    """Enlarged in whole pixels, as small images are looked at; reduced smoothly."""
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy().astype(np.uint8))
    larger = size[0] >= picture.width and size[1] >= picture.height
    return picture.resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)
