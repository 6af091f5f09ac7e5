"""VAE posteriors of clips, encoded once: whole by a VAE of clips, frame by frame by one of images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from cm_diffusers.data.cache import Posteriors, Vae, check_sides, encode_images
from cm_diffusers.data.clip_sources import FileClips
from cm_diffusers.data.contents import Digests
from cm_diffusers.data.kept import Kept, Wanted, keep
from cm_diffusers.data.moving_articles import MovingArticles
from cm_diffusers.data.preprocessing import PIXELS, View, preprocess, square
from cm_diffusers.data.ragged import Tensors
from cm_diffusers.data.shards import row_ranges, shard_key
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.errors import UserError


Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
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

    def setting(self, variant: int, vae: Vae) -> str:
        """sha256 of all that decides the latents of clips, beside the clips."""
        images, seen = self.images, (self.num_frames, self.stride, self.num_starts, *self.start_and_flip(variant))
        settings = (images.resolution, images.interpolation_type, images.center_crop, images.vae_dtype)
        return shard_key("clip posterior", PIXELS, vae.fingerprint, *settings, *seen)


def cached_clips(views: ClipViews, vae: Vae, device: torch.device | str = "cpu") -> Posteriors:
    """Encodes every clip in every variant, or reads what an earlier run encoded: rows of (f, C, h, w), f latent frames.

    Args:
        views: Of all clips.
        vae: Loaded only when a shard is missing.
        device: Where the VAE runs.

    Raises:
        ValueError: The VAE overflows or cannot encode so many frames of this size, or a clip's frames differ in size.
    """
    images = views.images
    check_sides(images, vae.latents)
    if whole := vae.latents.frames_per_latent is not None:
        check_frames(views.num_frames, vae.latents.frames_per_latent)
    encoder = cache(lambda: vae.encoder(images, device))

    digests = Digests.of(views.clips.digests)
    there = np.flatnonzero(digests.there)

    def encode(numbers: Sequence[int], variant: int) -> Iterator[Tensors]:
        for part in row_ranges(len(numbers), max(1, images.encode_batch_size // views.num_frames)):
            clips = [views.frames(int(there[numbers[i]]), variant) for i in part]
            yield (_whole if whole else _by_frames)(clips, encoder(), images)

    wanted = [
        Wanted(views.setting(variant, vae), digests.table[there], partial(encode, variant=variant))
        for variant in range(views.variants)
    ]
    kept = keep(wanted, images, "clips", CLIP_ROWS)
    return Posteriors([Kept.together(len(digests), [(there, one)]) for one in kept])


def check_frames(num_frames: int, frames_per_latent: int | None) -> None:
    """
    Args:
        num_frames: Of `--sample_n_frames`.
        frames_per_latent: As `Latents` has it.

    Raises:
        ValueError: The teacher makes no clips, or its VAE none of so many frames.
    """
    if frames_per_latent is None:
        raise UserError(
            "--sample_n_frames is for teachers of videos, such as Wan, but this one makes images: leave it out."
        )
    if rest := (num_frames - 1) % frames_per_latent:
        below = num_frames - rest
        counts = " or ".join(str(count) for count in (below, below + frames_per_latent) if count > 1)
        raise UserError(
            f"--sample_n_frames {num_frames} is not {frames_per_latent}k + 1, as the VAE needs, which keeps the first frame and "
            f"then {frames_per_latent} at a time: take {counts}."
        )


def _whole(clips: list[list[Tensor | None]], encode: Encode, images: DataConfig) -> Tensors:
    """Of a causal VAE, which remembers the frames before: each (B, f, C, h, w), and which clips there are, (B,)."""
    whole = [None if clip[0] is None else torch.stack(clip, dim=1) for clip in clips]
    found = encode_images(whole, (len(clips[0]), *square(images.resolution)), encode, images)
    return found | {name: found[name].transpose(1, 2) for name in ("mean", "std")}


def _by_frames(clips: list[list[Tensor | None]], encode: Encode, images: DataConfig) -> Tensors:
    """As `_whole`, of a VAE of images: each (B, F, C, h, w)."""
    frames = [frame for clip in clips for frame in clip]
    encoded = [
        encode_images(frames[chunk.start : chunk.stop], square(images.resolution), encode, images)
        for chunk in row_ranges(len(frames), images.encode_batch_size)
    ]
    found = {
        name: torch.cat([tensors[name] for tensors in encoded]).unflatten(0, (len(clips), -1)) for name in encoded[0]
    }
    return found | {"valid": found["valid"].all(1)}
