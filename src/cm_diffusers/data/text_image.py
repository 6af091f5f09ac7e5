"""Latents with captions: the data source of text-to-image training."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cm_diffusers.data.cache import Embeddings, Posteriors, Vae, cached_embeddings, cached_posteriors
from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.sampler import Position, batch_generator, batch_rows, stream
from cm_diffusers.data.sources import DataConfig, load_image_text
from cm_diffusers.types import Batch


logger = logging.getLogger(__name__)
EMPTY = 0  # number of the empty prompt in every table


def text_image_batches(
    config: DataConfig,
    encoders: Encoders,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Callable[[int], Iterator[Batch]]:
    """A data source of scaled latents with text embeddings.

    Args:
        config: images, captions, preprocessing and cache.
        encoders: of the teacher; not called for what the cache holds.
        seed: seed of order, crops, flips, captions and posterior noise.
        rank: number of this process.
        world_size: number of processes, which share every epoch.
        device: where the VAE runs while the cache is filled.

    Returns:
        A function from the number of the first batch to an endless iterator of batches: x0 (B, C, h, w),
        in `cond` what `encoders.encode_prompts` makes of a caption, in `uncond` of the empty prompt.

    Raises:
        ValueError: wrong configuration, or no row with a readable image and a caption.
    """
    rows, texts = _load(config, encoders.vae, device)
    table = cached_embeddings(texts, encoders.encode_prompts, encoders.fingerprint, config)
    source = _Source(config, encoders.vae, rows, table, Position(seed, rank, world_size))
    return stream(source.make, config.dataloader_num_workers)


def token_batches(
    config: DataConfig,
    vae: Vae,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Callable[[int], Iterator[Batch]]:
    """As `text_image_batches`, for training the text tower too: `cond["input_ids"]` (B, L) int64."""
    rows, texts = _load(config, vae, device)
    table = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    source = _Source(config, vae, rows, _Tokens(table), Position(seed, rank, world_size))
    return stream(source.make, config.dataloader_num_workers)


class _Tokens(NamedTuple):
    ids: Tensor  # (N, L) int64

    def __getitem__(self, numbers: np.ndarray) -> dict[str, Tensor]:
        return {"input_ids": self.ids[numbers]}


@dataclass(frozen=True)
class _Rows:
    posteriors: Posteriors
    numbers: np.ndarray  # rows of the data set that can be used
    captions: list[list[int]]  # for each of them, its captions' numbers in the table


@dataclass(frozen=True)
class _Source:
    config: DataConfig
    vae: Vae
    rows: _Rows
    table: Embeddings | _Tokens
    position: Position

    def make(self, k: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        size = self.config.train_batch_size
        indices = batch_rows(k, size, len(self.rows.numbers), self.position)
        generator = batch_generator(k, self.position)
        x0 = self._latents(indices, generator)
        captions = [self.rows.captions[i][generator.integers(len(self.rows.captions[i]))] for i in indices]
        dropped = generator.random(size) < self.config.proportion_empty_prompts
        cond = self._conditions(np.where(dropped, EMPTY, captions))
        uncond = self._conditions(np.array([EMPTY]))
        return x0, cond, {name: uncond[name].expand_as(value) for name, value in cond.items()}

    def _latents(self, indices: np.ndarray, generator: np.random.Generator) -> Tensor:
        variants = generator.integers(self.rows.posteriors.variants, size=len(indices))
        mean, std = self.rows.posteriors[self.rows.numbers[indices], variants]
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(int(generator.integers(2**63))))
        return (mean.float() + std.float() * noise - self.vae.shift_factor) * self.vae.scaling_factor

    def _conditions(self, numbers: np.ndarray) -> dict[str, Tensor]:
        rows = self.table[numbers]
        return {name: value.float() if value.is_floating_point() else value for name, value in rows.items()}


def _load(config: DataConfig, vae: Vae, device: torch.device | str) -> tuple[_Rows, list[str]]:
    dataset = load_image_text(config)
    captions = [_captions(value, config.caption_column) for value in dataset[config.caption_column]]
    posteriors = cached_posteriors(dataset, vae, config, device)
    captioned = np.array([len(texts) > 0 for texts in captions])
    numbers = np.flatnonzero(posteriors.valid & captioned)
    counts = f"{(~posteriors.valid).sum()} unreadable images and {(~captioned).sum()} empty captions"
    if len(numbers) == 0:
        raise ValueError(f"None of the {len(dataset)} rows can be used: found {counts}.")
    if len(numbers) < len(dataset):
        logger.warning("Skipped %d of %d rows: found %s.", len(dataset) - len(numbers), len(dataset), counts)
    table = {"": EMPTY}
    return _Rows(posteriors, numbers, [[table.setdefault(t, len(table)) for t in captions[i]] for i in numbers]), list(
        table
    )


def _captions(value: Any, column: str) -> list[str]:
    """The non-empty captions of one row."""
    texts = value if isinstance(value, list) else [value]
    if not all(text is None or isinstance(text, str) for text in texts):
        found = next(type(text).__name__ for text in texts if not (text is None or isinstance(text, str)))
        raise ValueError(f"--caption_column {column} must hold a text or a list of texts, but a row holds {found}.")
    return [text for text in texts if text and text.strip()]
