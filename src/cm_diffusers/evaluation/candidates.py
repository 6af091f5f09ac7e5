"""What the files of a pipeline tell before it is loaded: whether it is one, what it reads and how large its images are."""

import inspect
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoencoderKL, ConfigMixin, SchedulerMixin, UNet2DModel
from safetensors import SafetensorError, safe_open

from cm_diffusers.errors import UserError
from cm_diffusers.evaluation.sampling import base_model, pipeline_index
from cm_diffusers.models.single_file import is_single_file
from cm_diffusers.pipelines.loading import WITHOUT_PROMPT
from cm_diffusers.pipelines.recorded import check_has_weights
from cm_diffusers.record import Record, read_record


@dataclass(frozen=True)
class Candidate:
    """A pipeline that is to be measured.

    Attributes:
        source: Folder or Hub id, as it was given.
        home: Where its `model_index.json` is: the same, or the base model of a LoRA.
        index: What stands there; {} of a single file.
        record: Of the student.
    """

    source: str
    home: str
    index: dict[str, Any]
    record: Record | None

    @classmethod
    def of(cls, source: str) -> "Candidate":
        """
        Raises:
            ValueError: There is neither a pipeline nor a LoRA with its record, or weights are missing or damaged.
        """
        folder = Path(source)
        is_lora = not is_single_file(source) and folder.exists() and not (folder / "model_index.json").is_file()
        home = base_model(folder) if is_lora else source
        index = {} if is_single_file(home) else pipeline_index(home)
        check_has_weights(home)
        for place in map(Path, {source, home}):
            check_weights([place] if place.is_file() else place.rglob("*.safetensors"))
        return cls(source, home, index, read_record(source))

    @property
    def reads_prompts(self) -> bool:
        """Taken for granted of a single file, and of a class that diffusers does not have."""
        kind = self.index.get("_class_name")
        known = getattr(diffusers, str(kind), None)
        return kind not in WITHOUT_PROMPT and (
            known is None or "prompt" in inspect.signature(known.__call__).parameters
        )

    @property
    def is_lora(self) -> bool:
        return self.source != self.home

    @property
    def takes_classes(self) -> bool:
        return not self.reads_prompts and self._config(UNet2DModel, "unet").get("num_class_embeds") is not None

    @cached_property
    def side(self) -> int | None:
        """Of its images in pixels, as it was trained: by its record, or else by its networks; None if neither tells."""
        if self.record is not None and self.record.resolution is not None:
            return self.record.resolution
        sample = self._config(UNet2DModel, "unet").get("sample_size")
        blocks = self._config(AutoencoderKL, "vae").get("block_out_channels", [0])
        return sample * 2 ** (len(blocks) - 1) if isinstance(sample, int) else None

    def check_steps(self, steps: Iterable[int]) -> None:
        """
        Raises:
            ValueError: Its scheduler has not so many steps, or it knows one alone.
        """
        steps = list(steps)
        if self.record is not None and self.record.one_step and steps != [1]:
            raise UserError(
                f"{self.source} makes its images in one step: measure it by itself, with 1 step and no other."
            )
        if (scheduler := self._scheduler()) is None:
            return
        for count in steps:
            try:
                scheduler.set_timesteps(count)
            except ValueError as error:
                raise UserError(f"{self.source} cannot be sampled in {count} steps: {error}") from error

    def _scheduler(self) -> SchedulerMixin | None:
        """What its pipeline samples with; None where it takes noise levels, or diffusers has no such class."""
        told = self.record.scheduler if self.record else {"_class_name": (self.index.get("scheduler") or [0, ""])[1]}
        kind = getattr(diffusers, told.get("_class_name") or "", None)
        if kind is None or not self.reads_prompts:
            return None
        return kind.from_config({**self._config(kind, "scheduler"), **told})

    def _config(self, reader: type[ConfigMixin], part: str) -> dict[str, Any]:
        """Settings of a part of the pipeline; {} without one."""
        if (self.index.get(part) or [None])[0] is None:
            return {}
        try:
            return reader.load_config(self.home, subfolder=part)
        except OSError:
            return {}


def check_weights(paths: Iterable[Path]) -> None:
    """
    Raises:
        ValueError: One of the files is cut short or otherwise no safetensors.
    """
    for path in paths:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}); get or make it anew.") from error


def check_output(folder: str) -> None:
    """
    Raises:
        ValueError: Nothing can be written there.
    """
    path = Path(folder)
    place = next(place for place in (path, *path.parents) if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        found = "is read-only" if place.is_dir() else "is a file"
        raise UserError(f"--output_dir {folder} cannot be written, for {place} {found}: give another folder.")


def common_side(candidates: Sequence[Candidate]) -> int | None:
    """Of the images of all that tell, the largest; None if none does."""
    return max((one.side for one in candidates if one.side), default=None)
