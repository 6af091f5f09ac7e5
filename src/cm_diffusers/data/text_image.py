"""Latents with captions: the data source of text-to-image training."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cm_diffusers.data.buckets import BucketBatches
from cm_diffusers.data.cache import Embeddings, Posteriors, Vae, both_branches, cached_embeddings, cached_posteriors
from cm_diffusers.data.captions import EMPTY, Captions, Texts
from cm_diffusers.data.encoders import Encoders, placed, too_long
from cm_diffusers.data.found import Found
from cm_diffusers.data.framing import Framing
from cm_diffusers.data.images import usable_rows
from cm_diffusers.data.sampler import Position, Stream, batch_generator, batch_rows, stream
from cm_diffusers.data.shards import shard_key
from cm_diffusers.data.sources import DataConfig, load_image_text, source_name


def text_image_batches(
    config: DataConfig,
    encoders: Encoders,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Stream:
    """A data source of scaled latents with text embeddings.

    Args:
        config: images, captions, preprocessing and cache.
        encoders: of the teacher; not called for what the cache holds.
        seed: seed of order, crops, flips, captions and posterior noise.
        rank: number of this process.
        world_size: number of processes, which share every epoch.
        device: where the VAE and the text towers run while the cache is filled.

    Returns:
        A function from the number of the first batch to an endless iterator of batches with x0 (B, C, h, w),
        in `cond` what `encoders.encode_prompts` makes of a caption, in `uncond` of the empty prompt; with
        `encoders.micro_conditioning` also the images' `time_ids` (B, 6), the same in both; and the captions.

    Raises:
        ValueError: wrong configuration, or no row with a readable image and a caption.
    """
    rows, texts = _load(config, encoders.vae, encoders.tokenizers, encoders.micro_conditioning, device)
    with placed(encoders.towers, device):
        table = cached_embeddings(texts, encoders.encode_prompts, encoders.fingerprint, config)
    source = _Source(encoders.vae, rows, texts, table, Position(seed, rank, world_size), encoders.micro_conditioning)
    fingerprint = shard_key(rows.fingerprint, encoders.fingerprint)
    return stream(source.make, config.dataloader_num_workers, found=rows.found, fingerprint=fingerprint)


def token_batches(
    config: DataConfig,
    vae: Vae,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Stream:
    """As `text_image_batches`, for training the text tower too: `cond["input_ids"]` (B, L) int64."""
    rows, texts = _load(config, vae, (copy.deepcopy(tokenizer),), False, device)
    table = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    source = _Source(vae, rows, texts, _Tokens(table), Position(seed, rank, world_size))
    return stream(source.make, config.dataloader_num_workers, found=rows.found, fingerprint=rows.fingerprint)


class _Tokens(NamedTuple):
    ids: Tensor  # (N, L) int64

    def with_empty(self, numbers: np.ndarray, empty: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return both_branches({"input_ids": self.ids[[*numbers, empty]]})


@dataclass(frozen=True)
class _Rows:
    framing: Framing
    posteriors: Posteriors
    numbers: np.ndarray  # rows of the data set that can be used
    captions: Captions  # for each of them, its captions' numbers in the table
    found: Found
    fingerprint: str  # of images, captions and VAE


@dataclass(frozen=True)
class _Source:
    vae: Vae
    rows: _Rows
    texts: Texts  # of the table
    table: Embeddings | _Tokens
    position: Position
    micro_conditioning: bool = False

    @property
    def config(self) -> DataConfig:
        return self.rows.framing.config

    @cached_property
    def order(self) -> Callable[[int], np.ndarray]:
        """Number of a batch -> its usable rows (B,)."""
        size, numbers = self.config.train_batch_size, self.rows.numbers
        if self.config.aspect_ratio_buckets:
            return BucketBatches(self.rows.framing.assigned[numbers], size, self.position)
        return partial(batch_rows, batch_size=size, size=len(numbers), position=self.position)

    def make(self, k: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], list[str]]:
        indices, generator = self.order(k), batch_generator(k, self.position)
        numbers = self.rows.numbers[indices]
        variants = generator.integers(self.rows.framing.variants, size=len(indices))
        x0 = drawn_latents(self.vae, self.rows.posteriors[numbers, variants], generator)
        captions = [self.rows.captions[i][generator.integers(len(self.rows.captions[i]))] for i in indices]
        dropped = generator.random(len(indices)) < self.config.proportion_empty_prompts
        told = np.where(dropped, EMPTY, captions)
        cond, uncond = self.table.with_empty(told, EMPTY)
        ids = {"time_ids": self.rows.framing.time_ids(numbers, variants)} if self.micro_conditioning else {}
        return x0, cond | ids, uncond | ids, [self.texts[number] for number in told]


def drawn_latents(vae: Vae, posterior: tuple[Tensor, Tensor], generator: np.random.Generator) -> Tensor:
    """One draw (B, ..., C, h, w) from each posterior, mean and std as the cache has them; scaled as the network wants it."""
    mean, std = posterior
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(int(generator.integers(2**63))))
    return vae.latents.of_network(mean.float() + std.float() * noise)


def _load(
    config: DataConfig,
    vae: Vae,
    tokenizers: tuple[PreTrainedTokenizerBase, ...],
    sized: bool,
    device: torch.device | str,
) -> tuple[_Rows, Texts]:
    found = Found(source_name(config))
    dataset = load_image_text(config, None, found)
    captions = Captions.read(dataset, config.caption_column)
    framing = Framing.of(dataset, config, sized)
    posteriors = cached_posteriors(dataset, framing, vae, device)
    numbers = usable_rows(posteriors.valid, captions.lengths > 0, lambda row: dataset[row][config.image_column], found)
    texts, by_row = captions.numbered(numbers)
    found.captions = len(texts) - 1
    too_long(texts, tokenizers, found)
    found.report()
    fingerprint = shard_key(vae.fingerprint, iter(framing.digests), iter(captions))
    return _Rows(framing, posteriors, numbers, by_row, found, fingerprint), texts
