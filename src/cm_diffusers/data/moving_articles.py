"""Clips of real images in motion with exact ground truth: articles that travel, bounce off the borders or rotate."""

from functools import cached_property
from math import cos, radians, sin
from typing import NamedTuple

import datasets
import numpy as np
from PIL import Image

from cm_diffusers.data.preprocessing import content_hash, decode_image
from cm_diffusers.data.shards import shard_key
from cm_diffusers.data.sources import captions_of
from cm_diffusers.errors import UserError


SIDE, ARTICLE = 32, 20  # of a frame, and longer side of an article, in pixels
SPEED = 1.0, 1.7  # pixels a frame, along each axis that an article moves on
TURN = 8.0, 20.0  # degrees a frame
ACROSS = 2.0  # pixels at most between the path of a travelling article and the frame's centre
BOUNCE = 0.3, 0.7  # part of the clip after which a bouncing article meets the first border of each axis
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PHRASES = {name: f"moving {name}" for name in DIRECTIONS} | {"bouncing": "bouncing", "rotating": "rotating"}
ECHOES, APART, FADING = 3, 2, 0.5  # afterimages, frames from one to the next, and what of its brightness is left
RENDERING = 2  # in the key of what is cached: raise it when `MovingArticles.clip` changes
MOST_FRAMES = int(SIDE / SPEED[1]) + 1  # in which the centre of the fastest traveller is inside the frame


class Motion(NamedTuple):
    """Where an article is in every frame.

    Attributes:
        name: "left", "right", "up", "down", "bouncing" or "rotating".
        centre: centroid of the article's brightness, without afterimages, (F, 2) float64: x, y in pixels, 0 being the middle of the first.
        angle: degrees (F,) float64, clockwise from the article as its image shows it.
    """

    name: str
    centre: np.ndarray
    angle: np.ndarray


class Clip(NamedTuple):
    """A built-in clip.

    Attributes:
        frames: (F, 32, 32, 3) uint8.
        caption: the article and its motion: "an ankle boot moving left".
        motion: of the article.
        row: number of the article's image.
    """

    frames: np.ndarray
    caption: str
    motion: Motion
    row: int


class MovingArticles:
    """Clips of 32x32 pixels, each a pure function of `(seed, number)`.

    Images with the same shortest caption show the same article; with A articles, each pair of article and motion is in
    every 6 A clips once. An article is cut out along what is not black and brought to 20 pixels on its longer side. It
    travels at constant velocity, over the frame's middle halfway through the clip; or
    it is reflected off the borders, at least once on each axis; or it rotates clockwise about its centroid. Fading
    afterimages follow it, as on a slow screen, so that a still frame shows its motion and an image model can learn the
    words for it, as the blur and the bearing of moving things tell in real videos.

    Args:
        dataset: rows with the columns `image`, undecoded, and `caption_column`, as `load_image_text` gives them.
        num_frames: F.
        num_clips: number of clips.
        seed: seed of articles and motions.
        caption_column: column with a caption, or a list of captions.

    Raises:
        ValueError: an image has no caption, or the clip is so long that the article would leave the frame.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        num_frames: int,
        num_clips: int,
        seed: int = 0,
        caption_column: str = "text",
    ) -> None:
        if not 2 <= num_frames <= MOST_FRAMES:
            raise UserError(
                f"Moving articles stay in view for 2 to {MOST_FRAMES} frames, but a clip is to span {num_frames}: "
                "use fewer frames or a smaller stride."
            )
        self.dataset, self.num_frames, self.num_clips, self.seed = dataset, num_frames, num_clips, seed
        self.rows: dict[str, list[int]] = {}
        for row, value in enumerate(dataset[caption_column]):
            if not (captions := captions_of(value, caption_column)):
                raise UserError(f"--moving_articles: image {row} has no caption to name it by; leave it out.")
            self.rows.setdefault(min(captions, key=len), []).append(row)

    def __len__(self) -> int:
        return self.num_clips

    def clip(self, number: int) -> Clip:
        """
        Raises:
            ValueError: the article's image is unreadable or black.
        """
        name, article = self._choice(number)
        row, generator = self._row(number)
        canvas, box, centre = _canvas(self._image(row))
        path, angle = _path(name, box, centre, self.num_frames, generator)
        seen = np.stack([_render(canvas, centre, place, turn) for place, turn in zip(path, angle, strict=True)])
        now = slice(ECHOES * APART, None)
        motion = Motion(name, path[now] - 0.5, angle[now])
        return Clip(_with_echoes(seen), f"{article} {PHRASES[name]}", motion, row)

    def frames(self, number: int, numbers: np.ndarray) -> list[Image.Image]:
        """The frames with these numbers, of one clip."""
        return [Image.fromarray(frame) for frame in self.clip(number).frames[numbers]]

    @cached_property
    def captions(self) -> list[list[str]]:
        choices = map(self._choice, range(self.num_clips))
        return [[f"{article} {PHRASES[name]}"] for name, article in choices]

    @cached_property
    def digests(self) -> list[str]:
        """Of what decides each clip's frames."""
        records = [self.dataset[self._row(number)[0]]["image"] for number in range(self.num_clips)]
        settings = "moving article", RENDERING, self.num_frames, self.seed
        return [shard_key(*settings, number, content_hash(record)) for number, record in enumerate(records)]

    @property
    def lengths(self) -> list[int]:
        return [self.num_frames] * self.num_clips

    def _choice(self, number: int) -> tuple[str, str]:
        turn, which = divmod(number, len(PHRASES))
        return list(PHRASES)[which], list(self.rows)[turn % len(self.rows)]

    def _row(self, number: int) -> tuple[int, np.random.Generator]:
        generator = np.random.default_rng([self.seed, number])
        return int(generator.choice(self.rows[self._choice(number)[1]])), generator

    def _image(self, row: int) -> Image.Image:
        image = decode_image(self.dataset[row]["image"])
        if image is None or image.getbbox() is None:
            raise UserError(f"--moving_articles: image {row} is {'black' if image else 'unreadable'}; leave it out.")
        return image


def _canvas(image: Image.Image) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """The article on a black frame; there, its box's corner and size (2, 2), and its centroid (2,)."""
    article = image.crop(image.getbbox())
    scale = ARTICLE / max(article.size)
    article = article.resize([max(1, round(side * scale)) for side in article.size], Image.Resampling.BICUBIC)
    canvas, size = Image.new("RGB", (SIDE, SIDE)), np.array(article.size)
    corner = (SIDE - size) // 2
    canvas.paste(article, tuple(corner.tolist()))
    return canvas, np.stack([corner, size]), _centroid(np.asarray(canvas)) + 0.5


def _centroid(frame: np.ndarray) -> np.ndarray:
    """x and y (2,) of the brightness of a frame (H, W, 3), in pixels, 0 being the middle of the first."""
    weights = frame.sum(-1, dtype=np.float64)
    x, y = weights.sum(0) @ np.arange(frame.shape[1]), weights.sum(1) @ np.arange(frame.shape[0])
    return np.array([x, y]) / weights.sum()


def _path(
    name: str, box: np.ndarray, centre: np.ndarray, num_frames: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Centroids (E + F, 2) in pixels from the frame's corner and angles (E + F,) of an article, E frames earlier on.

    Its box is what crosses the frame's middle or is reflected; so its centroid moves beside the box's middle.
    """
    time, (corner, size) = np.arange(-ECHOES * APART, num_frames), box
    angle = np.zeros(len(time))
    if name == "rotating":
        return np.full((len(time), 2), SIDE / 2), generator.uniform(*TURN) * time
    if name == "bouncing":
        free, speed, sign = SIDE - size, generator.uniform(*SPEED, 2), generator.choice([-1, 1], 2)
        ahead = generator.uniform(*BOUNCE, 2) * np.minimum(speed * (num_frames - 1), free)
        start = np.where(sign > 0, free - ahead, ahead)
        reflected = free - np.abs((start + sign * speed * time[:, None]) % (2 * free) - free)
        return reflected + centre - corner, angle
    direction = np.array(DIRECTIONS[name])
    along = generator.uniform(*SPEED) * (time[:, None] - (num_frames - 1) / 2) * direction
    across = generator.uniform(-ACROSS, ACROSS) * direction[::-1]
    return SIDE / 2 + along + across + centre - (corner + size / 2), angle


def _with_echoes(seen: np.ndarray) -> np.ndarray:
    """The last F of the E + F frames seen, each with what is left of earlier ones."""
    first = ECHOES * APART
    left = [FADING**k * seen[first - k * APART : len(seen) - k * APART] for k in range(ECHOES + 1)]
    return np.max(left, axis=0).round().astype(np.uint8)


def _render(canvas: Image.Image, centre: np.ndarray, place: np.ndarray, angle: float) -> np.ndarray:
    """The canvas (32, 32, 3), turned clockwise about `centre`, which moves to `place`."""
    c, s = cos(radians(angle)), sin(radians(angle))
    shift = centre - np.array([c * place[0] + s * place[1], c * place[1] - s * place[0]])
    matrix = (c, s, shift[0], -s, c, shift[1])  # from a point of the frame to its point on the canvas
    return np.asarray(canvas.transform(canvas.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC))
