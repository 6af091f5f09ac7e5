"""Images or latents without captions, with classes or without: the data source of students without prompts."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cm_diffusers.data.cache import Posteriors, Vae, cached_posteriors
from cm_diffusers.data.found import Found
from cm_diffusers.data.framing import Framing
from cm_diffusers.data.images import class_labels, image_batches, usable_rows
from cm_diffusers.data.sampler import Position, Stream, batch_generator, batch_rows, stream
from cm_diffusers.data.shards import row_ranges, shard_key
from cm_diffusers.data.sources import DataConfig, load_image_text, source_name
from cm_diffusers.data.text_image import drawn_latents
from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError


OF_CAPTIONS = "caption_column proportion_empty_prompts aspect_ratio_buckets streaming"
OF_LATENTS = "encode_batch_size num_crops vae_dtype"
LEAST_STD = 1e-6  # of scaled latents: what a posterior of no variance is cached as


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of each channel of the latents, as Stable Diffusion scales them."""

    mean: list[float]
    std: list[float]


def unprompted_batches(
    config: DataConfig,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    *,
    label_column: str | None = None,
    num_classes: int | None = None,
    vae: Vae | None = None,
    statistics: LatentStatistics | None = None,
    sigma_data: float = 0.5,
) -> Stream:
    """A data source of pixels (B, 3, R, R) in [-1, 1], or of a VAE's latents (B, C, h, w).

    Latents are drawn from the cached posteriors and scaled as the VAE's config says; with statistics then
    (latents - mean) / std * sigma_data, of each channel (2502.01441).

    Args:
        config: Images, preprocessing and cache; captions are not needed.
        seed: Seed of order, crops, flips and posterior noise.
        rank: Number of this process.
        world_size: Number of processes, which share every epoch.
        device: Where the VAE runs while the cache is filled.
        label_column: Integer column returned as `cond["class_labels"]` (B,) int64.
        num_classes: Of the network; None if it takes any label, or none.
        vae: None for pixels.
        statistics: Of the latents of this VAE, by `measure_statistics`; None for latents as they are.
        sigma_data: Standard deviation of each channel with statistics.

    Returns:
        A function from the number of the first batch to an endless iterator of batches.

    Raises:
        ValueError: Wrong configuration, no image that can be read, or classes that are not the network's.
    """
    if num_classes is not None and label_column is None:
        raise UserError(f"The network has {num_classes} classes, but the images have none: give --label_column.")
    if vae is None:
        refuse_changed(config, f"{OF_CAPTIONS} {OF_LATENTS}", "on pixels without prompts")
        return image_batches(config, seed, rank, world_size, label_column, num_classes)
    latents, labels = _load(config, vae, device, label_column, num_classes)
    affine = None
    if statistics is not None:
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (statistics.mean, statistics.std))
        affine = mean, std / sigma_data
    source = _Source(latents, labels, affine, Position(seed, rank, world_size))
    latents.found.report()
    fingerprint = shard_key(
        vae.fingerprint, iter(latents.framing.digests), None if labels is None else labels.tolist()
    )
    return stream(source.make, config.dataloader_num_workers, found=latents.found, fingerprint=fingerprint)


def measure_statistics(config: DataConfig, vae: Vae, device: torch.device | str = "cpu") -> LatentStatistics:
    """Of all rows and variants, whose posteriors' draws have Var = Var(mean) + E(std^2); the same on every rank.

    Args:
        config: Images, preprocessing and cache.
        vae: Encodes what the cache lacks.
        device: Where it does so.

    Raises:
        ValueError: Wrong configuration, no image that can be read, or a channel that does not vary.
    """
    latents, _ = _load(config, vae, device, None, None)
    count, first, second = 0, 0.0, 0.0  # number of values of a channel, and sums (C,) of z and z^2 over them
    for mean, std in latents.parts():
        mean, std = mean.double(), std.double()
        count += mean[:, 0].numel()
        first += mean.sum((0, 2, 3))
        second += (mean.square() + std.square()).sum((0, 2, 3))
    mean = first / count
    scale = torch.as_tensor(vae.latents.scale, dtype=torch.float64).flatten()
    std = (second / count - mean.square()).clamp(min=0).sqrt() * scale
    if constant := (std < LEAST_STD).nonzero().flatten().tolist():
        raise UserError(
            f"Channels {constant} of the latents do not vary over the {len(latents.rows)} images: give more images, or "
            "another VAE."
        )
    return LatentStatistics(vae.latents.of_network(mean.view(-1, 1, 1)).flatten().tolist(), std.tolist())


@dataclass(frozen=True)
class _Latents:
    vae: Vae
    framing: Framing
    posteriors: Posteriors
    rows: np.ndarray  # of the data set that can be used
    found: Found

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every mean and standard deviation, each (B, C, h, w)."""
        for variant in range(self.framing.variants):
            for part in row_ranges(len(self.rows)):
                yield self.posteriors[self.rows[list(part)], np.full(len(part), variant)]


@dataclass(frozen=True)
class _Source:
    latents: _Latents
    labels: Tensor | None
    affine: tuple[Tensor, Tensor] | None  # what is subtracted from each channel, and what it is divided by
    position: Position

    def make(self, k: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        latents, size = self.latents, self.latents.framing.config.train_batch_size
        indices, generator = batch_rows(k, size, len(latents.rows), self.position), batch_generator(k, self.position)
        rows, variants = latents.rows[indices], generator.integers(latents.framing.variants, size=size)
        x0 = drawn_latents(latents.vae, latents.posteriors[rows, variants], generator)
        if self.affine is not None:
            x0 = (x0 - self.affine[0]) / self.affine[1]
        return x0, {} if self.labels is None else {"class_labels": self.labels[rows]}, {}


def _load(
    config: DataConfig, vae: Vae, device: torch.device | str, label_column: str | None, num_classes: int | None
) -> tuple[_Latents, Tensor | None]:
    refuse_changed(config, OF_CAPTIONS, "without prompts")
    found = Found(source_name(config))
    dataset = load_image_text(config, [label_column] if label_column else [], found)
    labels = class_labels(dataset, label_column, num_classes) if label_column else None
    framing = Framing.of(dataset, config, False)
    posteriors = cached_posteriors(dataset, framing, vae, device)
    rows = usable_rows(posteriors.valid, None, lambda row: dataset[row][config.image_column], found)
    return _Latents(vae, framing, posteriors, rows, found), labels
