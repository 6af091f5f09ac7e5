"""Samples that are read while training: decoded where they are read, encoded where the network is."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets.utils.file_utils import xopen
from PIL import Image
from torch import Tensor

from cm_diffusers.data.cache import both_branches, check_finite_latents, in_float32
from cm_diffusers.data.encoders import Encoders, too_long
from cm_diffusers.data.found import Found
from cm_diffusers.data.preprocessing import Size, decode_image, drawn_view, micro_conditions, preprocess, square
from cm_diffusers.data.ragged import joined
from cm_diffusers.data.sampler import Position, batch_generator
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.types import Batch


@dataclass
class Sample:
    """A captioned sample; its image is decoded when it is needed."""

    record: dict[str, Any] | None
    captions: list[str]
    epoch: int
    name: str
    found: Image.Image | None = None

    @property
    def image(self) -> Image.Image | None:
        record, self.record = self.record, None  # the file is not needed twice
        if record is not None:
            if record["bytes"] is None and "://" in (record["path"] or ""):
                with suppress(FileNotFoundError), xopen(record["path"], "rb") as file:
                    record = {"bytes": file.read(), "path": None}
            self.found = decode_image(record)
        return self.found


class Decoded(NamedTuple):
    """A batch before it is encoded.

    Attributes:
        pixels: (B, 3, R, R) in [-1, 1].
        captions: Of each image those to choose from.
        time_ids: What Stable Diffusion XL is told of the crops (B, 6).
        left_out: Reason and name of each sample that had to be passed over.
    """

    pixels: Tensor
    captions: list[list[str]]
    time_ids: Tensor
    left_out: list[tuple[str, str]]


def decoded(
    samples: Sequence[Sample], config: DataConfig, k: int, position: Position, left_out: Sequence[tuple[str, str]] = ()
) -> Decoded:
    """Batch `k`, its crops and mirror images drawn by the batch's own generator, whose first draws they are."""
    views = [drawn_view(draw, config) for draw in batch_generator(k, position).random((len(samples), 3))]
    pixels = [preprocess(sample.image, config, view) for sample, view in zip(samples, views, strict=True)]
    sizes, target = [Size(sample.image.height, sample.image.width) for sample in samples], square(config.resolution)
    ids = [micro_conditions(size, target, view) for size, view in zip(sizes, views, strict=True)]
    captions = [sample.captions for sample in samples]
    return Decoded(torch.stack(pixels), captions, torch.tensor(ids, dtype=torch.float32), list(left_out))


@dataclass(frozen=True)
class StreamEncoder:
    """Makes batches of what is decoded; the VAE and the text towers stay on the device."""

    config: DataConfig
    encoders: Encoders
    device: torch.device | str
    found: Found

    @cached_property
    def posterior(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        for tower in self.encoders.towers:
            tower.to(self.device)
        return self.encoders.vae.encoder(self.config, self.device)

    @cached_property
    def empty(self) -> dict[str, Tensor]:
        return self._encode_prompts([""])

    @torch.no_grad()
    def batch(self, read: Decoded, k: int, position: Position) -> Batch:
        for reason, name in read.left_out:
            self.found.skip(reason, [name])
        config, number, generator = self.config, len(read.pixels), batch_generator(k, position)
        generator.random((number, 3))  # those of `decoded`
        x0 = self._latents(read.pixels, generator)
        prompts = [captions[generator.integers(len(captions))] for captions in read.captions]
        dropped = generator.random(number) < config.proportion_empty_prompts
        texts = ["" if drop else prompt for drop, prompt in zip(dropped, prompts, strict=True)]
        too_long(texts, self.encoders.tokenizers, self.found)
        cond, uncond = both_branches(joined([self._encode_prompts(texts), self.empty]))
        ids = {"time_ids": read.time_ids.to(x0.device)} if self.encoders.micro_conditioning else {}
        return Batch(x0, cond | ids, uncond | ids, texts)

    def _latents(self, pixels: Tensor, generator: np.random.Generator) -> Tensor:
        parts = pixels.split(self.config.encode_batch_size)
        mean, std = (torch.cat(values).float() for values in zip(*map(self.posterior, parts), strict=True))
        check_finite_latents(self.config, mean, std)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(int(generator.integers(2**63))))
        return self.encoders.vae.latents.of_network(mean + std * noise.to(mean.device))

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        size = self.config.encode_batch_size
        parts = [self.encoders.encode_prompts(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        return in_float32(joined(parts))
