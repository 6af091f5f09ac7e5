"""VAE posteriors of clips, frame by frame, encoded once."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from cm_diffusers.data.cache import Posteriors, Vae, check_sides, encode_images
from cm_diffusers.data.clip_sources import FileClips
from cm_diffusers.data.moving_articles import MovingArticles
from cm_diffusers.data.preprocessing import PIXELS, View, preprocess, square
from cm_diffusers.data.shards import Job, Tensors, build, row_ranges, shard_key
from cm_diffusers.data.sources import DataConfig


CLIP_ROWS = 128  # clips in a shard, which is made in memory: 16 frames of 512x512 pixels take 1 MiB


@dataclass(frozen=True)
class ClipViews:
    """Which frames of a clip are seen, and how they are resized, cropped and mirrored, in each of its variants.

    Attributes:
        clips: Where the frames come from.
        images: Preprocessing of the frames, and where latents are kept.
        num_frames: F.
        stride: Frames from one that is seen to the next.
        num_starts: Variants of a clip, twice as many with mirrored ones.
    """

    clips: FileClips | MovingArticles
    images: DataConfig
    num_frames: int
    stride: int
    num_starts: int

    @property
    def variants(self) -> int:
        return self.num_starts * (2 if self.images.random_flip else 1)

    def start_and_flip(self, variant: int) -> tuple[int, bool]:
        number, mirrored = divmod(variant, 2) if self.images.random_flip else (variant, 0)
        return number, bool(mirrored)

    def numbers(self, row: int, start: int) -> np.ndarray:
        """The frames (F,) seen from a start; the starts lie in the middles of equal parts of their range."""
        free = self.clips.lengths[row] - 1 - (self.num_frames - 1) * self.stride
        return (2 * start + 1) * free // (2 * self.num_starts) + self.stride * np.arange(self.num_frames)

    def frames(self, row: int, variant: int) -> list[Tensor | None]:
        """F frames (3, R, R) in [-1, 1], all cropped alike; F times None when the clip cannot be read.

        Raises:
            ValueError: The clip's frames differ in size.
        """
        start, mirrored = self.start_and_flip(variant)
        frames = self.clips.frames(row, self.numbers(row, start).tolist()) if self.clips.lengths[row] else None
        if frames is None:
            return [None] * self.num_frames
        view = View(flip=mirrored)
        if not self.images.center_crop:
            view = View(*np.random.default_rng([int(self.clips.digests[row], 16), start]).random(2), flip=mirrored)
        return [preprocess(frame, self.images, view) for frame in frames]

    def key(self, rows: list[int], variant: int, vae: Vae) -> str:
        """sha256 of all that decides the latents of these clips."""
        images, seen = self.images, (self.num_frames, self.stride, self.num_starts, *self.start_and_flip(variant))
        settings = (images.resolution, images.interpolation_type, images.center_crop, images.vae_dtype)
        digests = (self.clips.digests[row] for row in rows)
        return shard_key("clip posterior", PIXELS, vae.fingerprint, *settings, *seen, *digests)


def cached_clips(views: ClipViews, vae: Vae, device: torch.device | str = "cpu") -> Posteriors:
    """Encodes every clip in every variant, or reads what an earlier run encoded: rows of (F, C, h, w).

    Args:
        views: Of all clips.
        vae: Loaded only when a shard is missing.
        device: Where the VAE runs.

    Raises:
        ValueError: The VAE overflows or cannot encode frames of this size, or a clip's frames differ in size.
    """
    images = views.images
    check_sides(images, vae.latents)
    encoder = cache(lambda: vae.encoder(images, device))

    def encode(job: Job) -> Iterator[Tensors]:
        for part in row_ranges(len(job.rows), max(1, images.encode_batch_size // views.num_frames)):
            frames = [frame for i in part for frame in views.frames(job.rows[i], job.variant)]
            encoded = [
                encode_images(frames[chunk.start : chunk.stop], square(images.resolution), encoder(), images)
                for chunk in row_ranges(len(frames), images.encode_batch_size)
            ]
            clips = {
                name: torch.cat([tensors[name] for tensors in encoded]).unflatten(0, (len(part), -1))
                for name in encoded[0]
            }
            yield clips | {"valid": clips["valid"].all(1)}

    parts = [list(part) for part in row_ranges(len(views.clips.digests), CLIP_ROWS)]
    jobs = [Job(views.key(rows, variant, vae), rows, variant) for variant in range(views.variants) for rows in parts]
    shards = build(jobs, encode, images, "Encoding clips")
    by_variant = [shards[i : i + len(parts)] for i in range(0, len(shards), len(parts))]
    posteriors = Posteriors(parts, by_variant)
    for variant in by_variant:  # a damaged file may be readable from some of its starts only
        posteriors.valid &= Posteriors(parts, [variant]).valid
    return posteriors
