"""Encodings in safetensors shards on disk: named by what they are made of, written whole, made once."""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from cm_diffusers.data.ragged import Tensors, is_by_row
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.errors import UserError


logger = logging.getLogger(__name__)
SHARD_ROWS = 1024
SAMPLED = 2**16  # bytes, at each of three places of a file
ABANDONED = 3600  # seconds after which nobody is still writing a file
Shard = Path | Tensors  # on disk or in memory


class Job(NamedTuple):
    """A shard to encode: the sha256 of all that decides its content, and the rows and variant it holds."""

    key: str
    rows: Sequence[int]
    variant: int = 0


def shard_key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def files_fingerprint(files: list[str], *others: str) -> str:
    """Of large files, by their sizes and three samples of each, and of what else there is; "" if one is not here."""
    if not files or not all(map(os.path.isfile, files)):
        return ""
    return shard_key(*others, *map(_sample, files))


def _sample(name: str) -> str:
    size = os.path.getsize(name)
    digest = hashlib.sha256(str(size).encode())
    with open(name, "rb") as file:
        for place in (0, size // 2, max(0, size - SAMPLED)):
            file.seek(place)
            digest.update(file.read(SAMPLED))
    return digest.hexdigest()


def row_ranges(rows: int, size: int = SHARD_ROWS) -> list[range]:
    """Cuts `rows` rows into ranges of `size` rows, the last one shorter."""
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def build(
    jobs: list[Job], encode: Callable[[Job], Iterator[Tensors]], config: DataConfig, description: str
) -> list[Shard]:
    """Encodes the shards that `config.latent_cache_dir` lacks; all of them, in memory, without `cache_latents`.

    In a multi-process run the first process of each machine encodes and the others wait; fill the cache in a
    one-process run beforehand where that takes longer than the process group's timeout.

    Args:
        jobs: one for each shard.
        encode: yields a shard's tensors part by part, each tensor with a first dimension of rows, or `packed`.
        config: says whether and where shards are kept.
        description: title of the progress bar.

    Raises:
        ValueError: the folder cannot be written, or is full.
    """
    if not config.cache_latents:
        with _bar(jobs, description) as bar:
            return [_collect(encode(job), bar) for job in jobs]
    folder = Path(config.latent_cache_dir).expanduser()
    paths = [folder / f"{job.key}.safetensors" for job in jobs]
    with _first_process():
        missing = {path: job for path, job in zip(paths, jobs, strict=True) if _is_missing(path, job)}
        if missing:
            _check_writable(folder)
            _mapped.cache_clear()  # of files that are replaced
        with _bar(missing.values(), description) as bar:
            for path, job in missing.items():
                _write(path, _collect(encode(job), bar), job.key)
    return paths


def tensors_of(shard: Shard) -> Tensors:
    return shard if isinstance(shard, dict) else _mapped(shard)


@lru_cache(maxsize=4096)
def _mapped(path: Path) -> Tensors:
    """The tensors as a memory map: pages are read when a row is."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The cached file {path} was whole when the run began and cannot be read now ({error}): start the run "
            "again with --resume_from_checkpoint latest, which encodes it anew."
        ) from error


def _is_missing(path: Path, job: Job) -> bool:
    """Whether the shard is to be encoded; said in one sentence where there is a file that does not hold it."""
    if not path.is_file():
        return True
    if fault := _fault(path, job):
        logger.warning("The cached file %s %s; it is encoded anew.", path, fault)
    return bool(fault)


def _fault(path: Path, job: Job) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            key = (file.metadata() or {}).get("key")
            rows = {file.get_slice(name).get_shape()[0] for name in file.keys() if is_by_row(name)}
    except (OSError, SafetensorError, IndexError) as error:
        return f"is damaged ({error})"
    if key != job.key:
        return "is of an earlier version or holds other data"
    return None if rows == {len(job.rows)} else f"holds {sorted(rows)} rows in place of {len(job.rows)}"


def _check_writable(folder: Path) -> None:
    """
    Raises:
        ValueError: Nothing can be written there, found before anything is encoded.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(_unwritable(folder, error)) from error


def _write(path: Path, tensors: Tensors, key: str) -> None:
    """
    Raises:
        ValueError: It cannot be written; nothing is left of it.
    """
    aside = path.with_suffix(f".{uuid4().hex}.tmp")
    try:
        save_file(tensors, aside, {"key": key})
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise UserError(_unwritable(path.parent, error, f" {size / 2**20:.1f} MiB")) from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    for left in path.parent.glob(f"{path.stem}.*.tmp"):  # of runs that were killed while they wrote
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()


def _unwritable(folder: Path, error: Exception, size: str = "") -> str:
    reason = getattr(error, "strerror", None) or error
    return (
        f"--latent_cache_dir {folder} cannot take{size or ' files'} ({reason}): make room, name another folder, or "
        "keep the encodings in memory with --no_cache_latents."
    )


def _bar(jobs: Any, description: str) -> tqdm:
    return tqdm(total=sum(len(job.rows) for job in jobs), desc=description, disable=not jobs)


def _collect(parts: Iterator[Tensors], bar: tqdm) -> Tensors:
    collected = []
    for part in parts:
        collected.append(part)
        bar.update(len(next(iter(part.values()))))
    return {name: _joined([part[name] for part in collected]) for name in collected[0]}


def _joined(parts: list[Tensor]) -> Tensor:
    """One after the other; in bfloat16 where the values of some parts have no place in float16."""
    if {part.dtype for part in parts} == {torch.float16, torch.bfloat16}:
        parts = [part.bfloat16() for part in parts]
    return torch.cat(parts).contiguous()


def _first_process() -> AbstractContextManager[None]:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return nullcontext()
    # Accelerator reads this variable, PartialState alone does not: on a CPU it would then see one process.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).local_main_process_first()
