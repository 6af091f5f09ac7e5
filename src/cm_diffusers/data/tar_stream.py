"""Batches of tar shards by their number: nothing before a batch has to be read to know what is in it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cm_diffusers.data.found import Found
from cm_diffusers.data.sampler import Position
from cm_diffusers.data.sources import DataConfig, captions_of, nothing_usable, source_flag, source_name
from cm_diffusers.data.streamed import Decoded, Sample, decoded
from cm_diffusers.data.tar_index import TarSet
from cm_diffusers.data.tars import FAULT, FIELDS
from cm_diffusers.data.windows import Place, Windows
from cm_diffusers.errors import UserError, readable


@dataclass(frozen=True)
class TarReader:
    """The batches of one rank: batch `k` has the samples k W B + r B + i of all W ranks' order."""

    config: DataConfig
    tars: TarSet
    position: Position
    found: Found

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: No sample has an image and may have a caption.
        """
        if not self.tars.counts.any():
            lacks = self.tars.lacks
            if not lacks.samples:
                raise UserError(f"{source_name(self.config)} gave this process no sample: it is empty.")
            raise UserError(nothing_usable(self.config, lacks.samples, lacks.fields, self.found))

    @cached_property
    def order(self) -> Windows:
        return Windows(self.tars.counts, self.config.shuffle_buffer_size, self.position.seed)

    def batch(self, k: int) -> Decoded:
        """A pure function of the seed, the rank and `k`."""
        size = self.config.train_batch_size
        first = (k * self.position.world_size + self.position.rank) * size
        left_out: list[tuple[str, str]] = []
        rows = self._rows([self.order[first + i] for i in range(size)])
        samples = [self._usable(first + i, row, left_out) for i, row in enumerate(rows)]
        return decoded(samples, self.config, k, self.position, left_out)

    def _rows(self, places: list[Place]) -> list[dict[str, Any]]:
        files = [(place.file, place.sample) for place in places]
        with readable(source_flag(self.config)):
            return self.tars.rows(files, self.config.image_column, self.config.caption_column)

    def _usable(self, n: int, row: dict[str, Any], left_out: list[tuple[str, str]]) -> Sample:
        """Sample `n`, or the first after it that has a caption and can be decoded."""
        fields, captioned = set(), False
        for other in range(n, n + self.order.total):
            if other > n:
                (row,) = self._rows([self.order[other]])
            name = row[self.config.image_column]["path"]
            if row[FAULT]:
                left_out.append((row[FAULT], name))
            captions = captions_of(row[self.config.caption_column], self.config.caption_column)
            sample = Sample(row[self.config.image_column], captions, self.order[other].epoch, name)
            if captions and sample.image is not None:
                return sample
            captioned |= bool(captions)
            fields.add(row[FIELDS])
            left_out.append(("samples whose image cannot be read" if captions else "samples without a caption", name))
        if captioned:
            raise UserError(
                f"None of the images of a whole epoch can be read, {self.order.total} samples one after another."
            )
        raise UserError(nothing_usable(self.config, self.order.total, fields, self.found))
