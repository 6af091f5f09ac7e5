"""Encodings in safetensors shards on disk: named by what they are made of, written whole, each with its rows' keys."""

import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cm_diffusers.data.ragged import Tensors, is_by_row
from cm_diffusers.errors import UserError


logger = logging.getLogger(__name__)
SHARD_ROWS = 1024
SAMPLED = 2**16  # bytes, at each of three places of a file
ABANDONED = 3600  # seconds after which nobody is still writing a file
AT_ONCE = 4096  # rows of a table that are Python objects at one time
KEYS = "keys"  # tensor of a shard: the sha256 of each row (N, 32) uint8
NAME = re.compile(r"[0-9a-f]{64}")
Shard = Path | Tensors  # on disk or in memory


def shard_key(*parts: Any) -> str:
    """sha256 of the JSON of `parts`, in which an iterator stands for a list that is too long to be held."""
    digest = hashlib.sha256()
    for piece in _json(parts):
        digest.update(piece.encode())
    return digest.hexdigest()


def _json(parts: tuple[Any, ...]) -> Iterator[str]:
    yield "["
    for number, part in enumerate(parts):
        yield ", " if number else ""
        if isinstance(part, Iterator):
            pieces = (json.dumps(chunk)[1:-1] for chunk in chunks(part))
            yield "["
            yield next(pieces, "")
            yield from (f", {piece}" for piece in pieces)
            yield "]"
        else:
            yield json.dumps(part)
    yield "]"


def chunks(values: Iterable[Any], size: int = AT_ONCE) -> Iterator[list[Any]]:
    """Lists of `size` values, the last one shorter."""
    rest = iter(values)
    return iter(lambda: list(islice(rest, size)), [])


def file_samples(files: list[str]) -> list[str]:
    """Of each of some large files a hash of its size and three samples; none if one is not here."""
    return [_sample(file) for file in files] if all(map(os.path.isfile, files)) else []


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


def shard_name(setting: str, keys: np.ndarray) -> str:
    return hashlib.sha256(setting.encode() + keys.tobytes()).hexdigest()


def tensors_of(shard: Shard) -> Tensors:
    return shard if isinstance(shard, dict) else _mapped(shard)


@lru_cache(maxsize=4096)
def _mapped(path: Path) -> Tensors:
    """The tensors as a memory map: pages are read when a row is."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name != KEYS}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The cached file {path} was whole when the run began and cannot be read now ({error}): start the run "
            "again with --resume_from_checkpoint latest, which encodes it anew."
        ) from error


def read_keys(path: Path) -> np.ndarray | str:
    """The keys of a shard's rows (N, 32) uint8; or what is wrong with the file."""
    try:
        with safe_open(path, framework="pt") as file:
            named = (file.metadata() or {}).get("key") == path.stem
            rows = {file.get_slice(name).get_shape()[0] for name in file.keys() if is_by_row(name)}
            keys = file.get_tensor(KEYS).numpy() if KEYS in file.keys() else None
    except (OSError, SafetensorError, IndexError) as error:
        return f"is damaged ({error})"
    if not named or keys is None or shard_name(path.parent.name, keys) != path.stem:
        return "is of an earlier version or holds other data"
    return keys if rows == {len(keys)} else f"holds {sorted(rows)} rows"


def check_writable(folder: Path) -> None:
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


def write_shard(path: Path, tensors: Tensors, kind: str, about: dict[str, str] | None = None) -> None:
    """
    Args:
        path: Inside a folder of the cache.
        kind: What its rows are, in the words of `cache_stats.py`.
        about: What else it says of itself.

    Raises:
        ValueError: It cannot be written; nothing is left of it.
    """
    aside = path.with_suffix(f".{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, aside, {"key": path.stem, "kind": kind} | (about or {}))
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise UserError(_unwritable(path.parent.parent, error, f" {size / 2**20:.1f} MiB")) from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    for left in path.parent.glob(f"{path.stem}.*.tmp"):  # of runs that were killed while they wrote
        if is_abandoned(left):
            with suppress(OSError):
                left.unlink()
    _mapped.cache_clear()  # of a file that is replaced


def mark_used(paths: Iterable[Path]) -> None:
    """Their time of change becomes now: by it `cache_prune.py` knows what nobody reads any more."""
    for path in paths:
        with suppress(OSError):  # of a folder that is only read
            os.utime(path)


def is_abandoned(path: Path) -> bool:
    """Whether nobody can still be writing the file."""
    try:
        return time.time() - path.stat().st_mtime > ABANDONED
    except OSError:
        return False


def _unwritable(folder: Path, error: Exception, size: str = "") -> str:
    reason = getattr(error, "strerror", None) or error
    return (
        f"--latent_cache_dir {folder} cannot take{size or ' files'} ({reason}): make room, name another folder, or "
        "keep the encodings in memory with --no_cache_latents."
    )


def joined_parts(parts: list[Tensors]) -> Tensors:
    """One after the other; in bfloat16 where the values of some parts have no place in float16."""
    return {name: _joined([part[name] for part in parts]) for name in parts[0]}


def _joined(parts: list[Tensor]) -> Tensor:
    if {part.dtype for part in parts} == {torch.float16, torch.bfloat16}:
        parts = [part.bfloat16() for part in parts]
    return torch.cat(parts).contiguous()
