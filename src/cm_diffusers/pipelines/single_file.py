"""Consistency pipelines of one `.safetensors` file."""

from dataclasses import asdict
from os import PathLike
from typing import Any, Self

import torch

from cm_diffusers.models.single_file import load_single_file
from cm_diffusers.models.teachers import check_finite
from cm_diffusers.pipelines.manners import refuse_contradiction
from cm_diffusers.record import read_record


class SingleFileMixin:
    """`from_single_file`, of pipelines with `from_pipe` and a record."""

    @classmethod
    def from_single_file(
        cls, path: str | PathLike, config: str | None = None, dtype: torch.dtype = torch.float32, **parts: Any
    ) -> Self:
        """A student, or a base model, in one `.safetensors` file; see `load_single_file`.

        Args:
            path: Of the file.
            config: Folder or Hub id of a pipeline of the same architecture.
            dtype: Of the weights.
            parts: In place of its own; what says how a folder is read is passed over.
        """
        modules, options = cls._get_signature_keys(cls)
        own, record = {name: value for name, value in parts.items() if name in {*modules, *options}}, read_record(path)
        stock = load_single_file(path, config, parts.get("torch_dtype", dtype))
        check_finite(str(path), stock)
        pipe = cls.from_pipe(stock, **{"record": record and asdict(record), **own})
        if record is not None:
            refuse_contradiction(path, record, pipe.unet)
        return pipe
