"""Latents with captions of data sets too large to cache: read, encoded and forgotten while training."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, count, islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.utils.file_utils import xopen
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from cm_diffusers.data.cache import both_branches, check_finite_latents, check_sides, in_float32
from cm_diffusers.data.encoders import Encoders, too_long
from cm_diffusers.data.file_names import suffix_of
from cm_diffusers.data.folders import checked_tables
from cm_diffusers.data.found import Found
from cm_diffusers.data.preprocessing import Size, decode_image, drawn_view, micro_conditions, preprocess, square
from cm_diffusers.data.ragged import joined
from cm_diffusers.data.sampler import SHUFFLE, Position, Stream, batch_generator
from cm_diffusers.data.shards import files_fingerprint
from cm_diffusers.data.sources import (
    DataConfig,
    captions_of,
    nothing_usable,
    open_folder,
    require_columns,
    row_name,
    shards_of,
    source_flag,
    source_name,
    validate,
)
from cm_diffusers.data.tars import FAULT, FIELDS, tar_features, tar_rows
from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError, readable
from cm_diffusers.types import Batch


CACHED_ONLY = (
    "aspect_ratio_buckets bucket_step bucket_max_ratio max_train_samples num_crops cache_latents latent_cache_dir"
)


def streaming_batches(
    config: DataConfig,
    encoders: Encoders,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Stream:
    """As `text_image_batches`, with nothing kept: crops, flips and captions are drawn and encoded anew for each batch.

    Every epoch visits the files in another order, and `config.shuffle_buffer_size` samples at a time are shuffled. A
    batch takes the next B samples with a caption; where an image turns out unreadable, the sample after it takes its
    place. So a resumed run reads past what was seen without decoding or encoding it.

    Args:
        config: The data and its preprocessing.
        encoders: Of the teacher; they stay on `device`.
        seed: Seed of order, crops, flips, captions and posterior noise.
        rank: Number of this process.
        world_size: Number of processes: they read different files, or different samples where files do not divide.
        device: Where the VAE and the text towers run.

    Returns:
        A function from the number of the first batch to an endless iterator of batches, each a function of
        (seed, rank, number) alone.

    Raises:
        ValueError: wrong configuration, or data without a usable sample.
    """
    _check(config, encoders)
    found = Found(source_name(config), kind="samples")
    files = _files(config, found)
    reader = _Reader(config, _open(config, files), Position(seed, rank, world_size), found)
    encoder = _Encoder(config, encoders, device, found)
    found.report()
    found.aloud = True

    def batches(start: int) -> Iterator[Batch]:
        samples, size = reader.samples(), config.train_batch_size
        for _ in tqdm(islice(samples, start * size), "Skipping what was seen", start * size, disable=not start):
            pass
        window = _Window(samples, found)
        for k in count(start):
            yield encoder.batch(window.take(size), batch_generator(k, reader.position))

    return Stream(batches, found, files_fingerprint(files, encoders.vae.fingerprint, encoders.fingerprint))


def _check(config: DataConfig, encoders: Encoders) -> None:
    validate(config)
    refuse_changed(config, CACHED_ONLY, "with --streaming")
    if config.dataloader_num_workers:
        raise UserError(
            f"--streaming reads in the training process, for an exact resume: --dataloader_num_workers is "
            f"{config.dataloader_num_workers}; leave it out."
        )
    check_sides(config, encoders.vae.latents)


def _files(config: DataConfig, found: Found) -> list[str]:
    """Tar shards or parquet files, some of which may lie elsewhere; none for a dataset of the Hub."""
    if config.train_shards_path_or_url:
        return shards_of(config, found)
    return [] if config.dataset_name else _parquet_files(config, found)


def _open(config: DataConfig, files: list[str]) -> datasets.IterableDataset:
    image, caption = config.image_column, config.caption_column
    if config.train_shards_path_or_url:
        arguments = {"shards": files, "image_column": image, "caption_column": caption}
        return datasets.IterableDataset.from_generator(
            tar_rows, features=tar_features(image, caption), gen_kwargs=arguments
        )
    load = partial(datasets.load_dataset, cache_dir=config.cache_dir, streaming=True)
    with readable(source_flag(config)):
        if files:
            dataset = load("parquet", data_files=files, split="train")
        else:
            dataset = load(config.dataset_name, config.dataset_config_name, split=config.dataset_split)
        columns = dataset.column_names or list(next(iter(dataset), {}))
    require_columns(columns, [image, caption])
    return dataset.select_columns([image, caption]).cast_column(image, datasets.Image(decode=False))


def _parquet_files(config: DataConfig, found: Found) -> list[str]:
    folder = open_folder(config, found)
    tables = [file for file in folder.files if suffix_of(file) == ".parquet"]
    if not tables:
        raise UserError(
            f"--streaming reads parquet files from --train_data_dir, but {folder.path} holds none; leave --streaming "
            "out, or give tar files to --train_shards_path_or_url."
        )
    folder.leave_out("files beside the parquet files, which are read", set(folder.files) - set(tables))
    return checked_tables(tables)


@dataclass
class _Sample:
    """A captioned sample; its image is decoded when it is needed."""

    record: dict[str, Any] | None
    captions: list[str]
    epoch: int
    name: str

    @cached_property
    def image(self) -> Image.Image | None:
        record, self.record = self.record, None  # the file is not needed twice
        if record["bytes"] is None and "://" in (record["path"] or ""):
            with suppress(FileNotFoundError), xopen(record["path"], "rb") as file:
                record = {"bytes": file.read(), "path": None}
        return decode_image(record)


@dataclass(frozen=True)
class _Reader:
    """The samples of one rank, epoch after epoch, in an order that depends on the seed alone."""

    config: DataConfig
    dataset: datasets.IterableDataset
    position: Position
    found: Found

    def samples(self) -> Iterator[_Sample]:
        """Endless; whole epochs in blocks, each shuffled.

        Raises:
            ValueError: an epoch holds no sample with an image and a caption.
        """
        size = self.config.shuffle_buffer_size
        for epoch in count():
            samples = self._epoch(epoch)
            for block in count():
                held = list(islice(samples, size))
                if not held:
                    break
                generator = np.random.default_rng([self.position.seed, SHUFFLE, epoch, 1 + block])
                yield from (held[i] for i in generator.permutation(len(held)))

    def _epoch(self, epoch: int) -> Iterator[_Sample]:
        fields, usable, number = set(), 0, 0
        for number, row in enumerate(self._rows(epoch), 1):
            captions = captions_of(row[self.config.caption_column], self.config.caption_column)
            record = row[self.config.image_column]
            name = row_name(record, number - 1)
            if fault := row.get(FAULT):
                self.found.skip(fault, [name])
            if captions and record:
                usable += 1
                yield _Sample(record, captions, epoch, name)
            else:
                fields.add(row.get(FIELDS) or ", ".join(name for name, value in row.items() if value is not None))
                self.found.skip("samples without a caption" if record else "samples without an image", [name])
        if not number:
            name = source_name(self.config)
            raise UserError(f"{name} gave this process no sample: it is empty, or has fewer than there are processes.")
        if not usable:
            raise UserError(nothing_usable(self.config, number, fields, self.found))

    def _rows(self, epoch: int) -> Iterator[dict[str, Any]]:
        """Of this rank: its share of the shuffled files, or of the rows where the files do not divide."""
        rank, ranks, files = self.position.rank, self.position.world_size, self.dataset.num_shards
        order = np.random.default_rng([self.position.seed, SHUFFLE, epoch, 0]).permutation(files).tolist()
        divides = files % ranks == 0
        mine = order[rank::ranks] if divides else order
        rows = chain.from_iterable(self.dataset.shard(files, i) for i in mine)
        with readable(source_flag(self.config)):
            yield from rows if divides else islice(rows, rank, None, ranks)


class _Window:
    """The samples a batch takes, and as many after them as it takes to find a readable image."""

    def __init__(self, samples: Iterator[_Sample], found: Found) -> None:
        self.samples, self.found, self.held = samples, found, deque()

    def take(self, size: int) -> list[_Sample]:
        taken = [self._readable(i) for i in range(size)]
        for _ in range(size):
            if (sample := self.held.popleft()).image is None:
                self.found.skip("samples whose image cannot be read", [sample.name])
        return taken

    def _readable(self, i: int) -> _Sample:
        for j in count(i):
            while len(self.held) <= j:
                self.held.append(next(self.samples))
            if self.held[j].image is not None:
                return self.held[j]
            if self.held[j].epoch > self.held[i].epoch + 1:
                raise UserError(f"None of the images of a whole epoch can be read, {j - i} samples one after another.")


@dataclass(frozen=True)
class _Encoder:
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
    def batch(self, samples: list[_Sample], generator: np.random.Generator) -> Batch:
        config, draws = self.config, generator.random((len(samples), 3))
        views = [drawn_view(draw, config) for draw in draws]
        x0 = self._latents([preprocess(s.image, config, v) for s, v in zip(samples, views, strict=True)], generator)
        prompts = [sample.captions[generator.integers(len(sample.captions))] for sample in samples]
        dropped = generator.random(len(samples)) < config.proportion_empty_prompts
        texts = ["" if drop else prompt for drop, prompt in zip(dropped, prompts, strict=True)]
        too_long(texts, self.encoders.tokenizers, self.found)
        cond, uncond = both_branches(joined([self._encode_prompts(texts), self.empty]))
        ids = {}
        if self.encoders.micro_conditioning:
            sizes = [Size(sample.image.height, sample.image.width) for sample in samples]
            target = square(config.resolution)
            rows = [micro_conditions(size, target, view) for size, view in zip(sizes, views, strict=True)]
            ids["time_ids"] = torch.tensor(rows, dtype=torch.float32, device=x0.device)
        return Batch(x0, cond | ids, uncond | ids, texts)

    def _latents(self, images: list[Tensor], generator: np.random.Generator) -> Tensor:
        parts = torch.stack(images).split(self.config.encode_batch_size)
        mean, std = (torch.cat(values).float() for values in zip(*map(self.posterior, parts), strict=True))
        check_finite_latents(self.config, mean, std)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(int(generator.integers(2**63))))
        return self.encoders.vae.latents.of_network(mean + std * noise.to(mean.device))

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        size = self.config.encode_batch_size
        parts = [self.encoders.encode_prompts(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        return in_float32(joined(parts))
