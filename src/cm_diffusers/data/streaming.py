"""Latents with captions of data sets too large to cache: read, encoded and forgotten while training."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from operator import attrgetter
from typing import Any

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from cm_diffusers.data.cache import check_sides
from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.file_names import suffix_of
from cm_diffusers.data.folders import checked_tables
from cm_diffusers.data.found import Found
from cm_diffusers.data.sampler import SHUFFLE, Position, Stream, ahead, loaded, read_on
from cm_diffusers.data.shards import file_samples, shard_key
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
from cm_diffusers.data.streamed import Decoded, Sample, StreamEncoder, decoded
from cm_diffusers.data.tar_index import TarSet
from cm_diffusers.data.tar_stream import TarReader
from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError, readable
from cm_diffusers.types import Batch


CACHED_ONLY = "aspect_ratio_buckets bucket_step bucket_max_ratio max_train_samples num_crops"
KEEPING = "cache_latents latent_cache_dir"


def streaming_batches(
    config: DataConfig,
    encoders: Encoders,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Stream:
    """As `text_image_batches`, with nothing kept: crops, flips and captions are drawn and encoded anew for each batch.

    Every epoch visits the files in another order, and about `config.shuffle_buffer_size` samples at a time are shuffled.
    Where an image turns out unreadable, the sample after it takes its place, and what follows stays where it is. A thread
    reads and encodes the next batch while one is used.

    Tar shards have an index, so any batch is found at once, and their order does not depend on the number of processes.
    Of tables a batch takes the next B samples with a caption, and a resumed run reads past what was seen, without decoding; with
    workers one process reads, and decodes in as many threads.

    Args:
        config: The data and its preprocessing.
        encoders: Of the teacher; they stay on `device`.
        seed: Seed of order, crops, flips, captions and posterior noise.
        rank: Number of this process.
        world_size: Number of processes, which share every epoch; of tables they read different files, or different rows
            where files do not divide.
        device: Where the VAE and the text towers run.

    Returns:
        A function from the number of the first batch to an endless iterator of batches, each a function of
        (seed, rank, number) alone.

    Raises:
        ValueError: wrong configuration, or data without a usable sample.
    """
    _check(config, encoders)
    found, position = Found(source_name(config), kind="samples"), Position(seed, rank, world_size)
    encoder = StreamEncoder(config, encoders, device, found)
    if config.train_shards_path_or_url:
        read, fingerprint = _of_tars(config, position, found)
    else:
        read, fingerprint = _of_tables(config, position, found)
    found.report()
    found.aloud = True

    def batches(start: int) -> Iterator[Batch]:
        return ahead(encoder.batch(part, k, position) for k, part in enumerate(read(start), start))

    marks = [encoders.vae.fingerprint, encoders.fingerprint]
    return Stream(batches, found, shard_key(*marks, *fingerprint) if fingerprint else "")


Read = Callable[[int], Iterator[Decoded]]  # number of the first batch -> that one, and all after it


def _of_tars(config: DataConfig, position: Position, found: Found) -> tuple[Read, list[str]]:
    tars = TarSet.of(shards_of(config, found), config)
    tars.tell(found)
    reader = TarReader(config, tars, position, found)
    return partial(loaded, reader.batch, config.dataloader_num_workers), [tars.fingerprint]


def _of_tables(config: DataConfig, position: Position, found: Found) -> tuple[Read, list[str]]:
    files = [] if config.dataset_name else _parquet_files(config, found)
    reader = _Reader(config, _open(config, files), position, found)
    return partial(read_on, reader.batches, config.dataloader_num_workers > 0), file_samples(files)


def _check(config: DataConfig, encoders: Encoders) -> None:
    validate(config)
    refuse_changed(config, CACHED_ONLY, "with --streaming")
    if not config.train_shards_path_or_url:
        refuse_changed(config, KEEPING, "with --streaming of tables, which leave nothing behind")
    check_sides(config, encoders.vae.latents)


def _open(config: DataConfig, files: list[str]) -> datasets.IterableDataset:
    image, caption = config.image_column, config.caption_column
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


LeftOut = list[tuple[str, str]]  # reason and name


@dataclass(frozen=True)
class _Reader:
    """The samples of one rank, epoch after epoch, in an order that depends on the seed alone."""

    config: DataConfig
    dataset: datasets.IterableDataset
    position: Position
    found: Found

    def batches(self, start: int) -> Iterator[Decoded]:
        """From batch `start` on; images are decoded by so many threads as there are to be workers."""
        config, left_out = self.config, []
        samples, size, threads = self.samples(left_out), config.train_batch_size, config.dataloader_num_workers
        for _ in tqdm(islice(samples, start * size), "Skipping what was seen", start * size, disable=not start):
            pass
        window = _Window(samples, left_out, ThreadPoolExecutor(threads).map if threads else map)
        for k in count(start):
            read = decoded(window.take(size), config, k, self.position, left_out)
            left_out.clear()
            yield read

    def samples(self, left_out: LeftOut) -> Iterator[Sample]:
        """Endless; whole epochs in blocks, each shuffled.

        Args:
            left_out: Is told what has no image or no caption.

        Raises:
            ValueError: an epoch holds no sample with an image and a caption.
        """
        size = self.config.shuffle_buffer_size
        for epoch in count():
            samples = self._epoch(epoch, left_out)
            for block in count():
                held = list(islice(samples, size))
                if not held:
                    break
                generator = np.random.default_rng([self.position.seed, SHUFFLE, epoch, 1 + block])
                yield from (held[i] for i in generator.permutation(len(held)))

    def _epoch(self, epoch: int, left_out: LeftOut) -> Iterator[Sample]:
        fields, usable, number = set(), 0, 0
        for number, row in enumerate(self._rows(epoch), 1):
            captions = captions_of(row[self.config.caption_column], self.config.caption_column)
            record = row[self.config.image_column]
            name = row_name(record, number - 1)
            if captions and record:
                usable += 1
                yield Sample(record, captions, epoch, name)
            else:
                fields.add(", ".join(name for name, value in row.items() if value is not None))
                left_out.append(("samples without a caption" if record else "samples without an image", name))
        if not number:
            name = source_name(self.config)
            raise UserError(f"{name} gave this process no sample: it is empty, or has fewer than there are processes.")
        if not usable:
            for reason, name in left_out:
                self.found.skip(reason, [name])
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
    """The samples a batch takes, and as many after them as it takes to find a readable image.

    Args:
        samples: In their order.
        left_out: Is told what cannot be read.
        each: `map`, or that of a pool of threads, to decode by.
    """

    def __init__(self, samples: Iterator[Sample], left_out: LeftOut, each: Callable[..., Iterable]) -> None:
        self.samples, self.left_out, self.each, self.held = samples, left_out, each, deque()

    def take(self, size: int) -> list[Sample]:
        self._hold(size)
        for _ in self.each(attrgetter("image"), islice(self.held, size)):
            pass
        taken = [self._readable(i) for i in range(size)]
        for _ in range(size):
            if (sample := self.held.popleft()).image is None:
                self.left_out.append(("samples whose image cannot be read", sample.name))
        return taken

    def _hold(self, number: int) -> None:
        self.held.extend(islice(self.samples, max(0, number - len(self.held))))

    def _readable(self, i: int) -> Sample:
        for j in count(i):
            self._hold(j + 1)
            if self.held[j].image is not None:
                return self.held[j]
            if self.held[j].epoch > self.held[i].epoch + 1:
                raise UserError(f"None of the images of a whole epoch can be read, {j - i} samples one after another.")
