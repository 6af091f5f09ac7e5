"""Real clips and their captions: what video pipelines are compared with and prompted by."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cm_diffusers.data.clip_latents import ClipViews
from cm_diffusers.data.found import Found
from cm_diffusers.data.images import usable_rows
from cm_diffusers.data.video import VideoDataConfig, open_clips
from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError


OF_TRAINING = (
    "num_starts center_crop random_flip max_train_samples train_batch_size dataloader_num_workers cache_latents "
    "latent_cache_dir encode_batch_size proportion_empty_prompts vae_dtype"
)


@dataclass(frozen=True)
class RealClips:
    """N real clips with their captions, read as they are needed."""

    views: ClipViews
    rows: list[int]

    @property
    def captions(self) -> list[str]:
        return [self.views.clips.captions[row][0] for row in self.rows]

    def batches(self, size: int) -> Iterator[tuple[Tensor, float]]:
        """Clips (at most `size`, F, 3, R, R) in [0, 1], and the seconds that it took to read them.

        Raises:
            ValueError: A clip cannot be read.
        """
        for start in range(0, len(self.rows), size):
            started = time.perf_counter()
            clips = [self.views.frames(row, 0) for row in self.rows[start : start + size]]
            if damaged := [start + i for i, clip in enumerate(clips) if clip[0] is None]:
                raise UserError(f"Real clip {self.rows[damaged[0]]} cannot be read; remove it.")
            yield torch.stack([torch.stack(clip) for clip in clips]) / 2 + 0.5, time.perf_counter() - started


def load_real_clips(config: VideoDataConfig, num_videos: int, most: int) -> list[RealClips]:
    """Up to `most` disjoint sets of the first clips that have captions; as many as there are clips for.

    Frames lie around the middle of a clip and are cropped at their centre.

    Raises:
        ValueError: Wrong configuration, a flag that has no effect here, or too few clips.
    """
    refuse_changed(config, OF_TRAINING, "in an evaluation")
    found = Found(config.source, kind="clips")
    clips, images = open_clips(config, found)
    views = ClipViews(clips, replace(images, center_crop=True), config.sample_n_frames, config.sample_stride, 1)
    captioned = np.array([len(texts) > 0 for texts in clips.captions])
    usable = usable_rows(
        np.array(clips.lengths) > 0, captioned, lambda row: clips.records[row][clips.column], found
    ).tolist()
    found.report()
    if num_videos > len(usable):
        raise UserError(f"--num_videos is {num_videos}, but there are {len(usable)} real clips: ask for fewer.")
    count = min(most, len(usable) // num_videos)
    return [RealClips(views, usable[i * num_videos : (i + 1) * num_videos]) for i in range(count)]
