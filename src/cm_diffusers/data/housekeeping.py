"""What lies in a latent cache, and what of it nobody needs: for `cache_stats.py` and `cache_prune.py`."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.hf_argparser import HfArg

from cm_diffusers.data.shards import KEYS, is_abandoned, read_keys
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.errors import UserError


DAY = 86400
SHARD = re.compile(r"[0-9a-f]{64}\.safetensors")
ASIDE = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{32}\.tmp")
FOLDER = re.compile(r"[0-9a-f]{64}")
DAMAGED, EARLIER, LEFT = "damaged", "of an earlier version", "left by a run that was killed"


@dataclass
class CacheConfig:
    """Where the cache is."""

    latent_cache_dir: str = HfArg(
        default=DataConfig().latent_cache_dir, help="Folder of VAE posteriors and text embeddings."
    )


@dataclass
class PruneConfig(CacheConfig):
    """What is removed from the cache."""

    unused_days: int = HfArg(
        default=30,
        help="Encodings that no run has read for so many days go; damaged files and those of versions before do always.",
    )
    yes: bool = HfArg(default=False, help="Remove what is listed; without this flag it is only listed.")


@dataclass(frozen=True)
class File:
    """A file that the cache has written.

    Attributes:
        path: Where it is.
        kind: What its rows are, or what is wrong with it.
        rows: Their number; 0 where something is wrong.
        size: In bytes.
        used: Days since a run has read or written it.
    """

    path: Path
    kind: str
    rows: int
    size: int
    used: float

    @property
    def is_whole(self) -> bool:
        return self.kind not in (DAMAGED, EARLIER, LEFT)


def files_of(folder: str) -> list[File]:
    """The files in a cache that are its own: by place, name and, where they can be read, content; no others, and no links.

    Raises:
        ValueError: There is no such folder.
    """
    top = Path(folder).expanduser()
    if not top.is_dir():
        raise UserError(
            f"--latent_cache_dir {top} is no folder: nothing is kept there; name the folder of a run's flag."
        )
    return sorted(_files(top), key=lambda file: file.path)


def _files(top: Path) -> Iterator[File]:
    for path in top.iterdir():
        if path.is_symlink():
            continue
        if path.is_dir() and FOLDER.fullmatch(path.name):
            yield from (file for inner in path.iterdir() if (file := _file(inner, top)))
        elif file := _file(path, top):
            yield file


def _file(path: Path, top: Path) -> File | None:
    """None for what is not the cache's own."""
    if path.is_symlink() or not path.is_file():
        return None
    if ASIDE.fullmatch(path.name) and is_abandoned(path):
        kind, rows = LEFT, 0
    elif SHARD.fullmatch(path.name):
        kind, rows = _told(path, path.parent == top)
    else:
        return None
    stat = path.stat()
    return File(path, kind, rows, stat.st_size, max(0.0, time.time() - stat.st_mtime) / DAY) if kind else None


def _told(path: Path, is_early: bool) -> tuple[str, int]:
    """Kind and rows; an empty kind of a file that another program has written under such a name."""
    try:
        with safe_open(path, "pt") as file:
            about, names = file.metadata() or {}, file.keys()
    except (OSError, SafetensorError):
        return DAMAGED, 0
    if about.get("key") != path.stem:
        return "", 0
    if is_early:
        return EARLIER, 0
    if KEYS in names:
        keys = read_keys(path)
        return (DAMAGED, 0) if isinstance(keys, str) else (about["kind"], len(keys))
    return about.get("kind", EARLIER), int(about.get("rows", 0))


def removable(files: list[File], unused_days: int) -> list[File]:
    """Those that are no use to anybody, or that nobody has used for so long."""
    return [file for file in files if not file.is_whole or file.used > unused_days]


def remove(files: list[File]) -> None:
    """And the folders that are empty then."""
    for file in files:
        file.path.unlink(missing_ok=True)
    for folder in {file.path.parent for file in files}:
        if FOLDER.fullmatch(folder.name) and not any(folder.iterdir()):
            folder.rmdir()


def stats_table(files: list[File]) -> str:
    """Markdown: a row for each kind, and one for all."""
    kinds = {kind: [file for file in files if file.kind == kind] for kind in sorted({file.kind for file in files})}
    lines = [
        f"| {kind} | {len(found)} | {sum(file.rows for file in found):,} | {in_mib(found)} | "
        f"{max((file.used for file in found), default=0):.0f} |"
        for kind, found in [*kinds.items(), ("all", files)]
    ]
    return "\n".join(["| what | files | rows | MiB | most days unused |", "|---|---|---|---|---|", *lines])


def removal_list(files: list[File]) -> str:
    """A line for each file: why, how large and where."""
    lines = [f"{_reason(file)}, {in_mib([file])} MiB: {file.path}" for file in files]
    return "\n".join([*lines, f"{len(files)} files, {in_mib(files)} MiB"])


def _reason(file: File) -> str:
    return f"{file.kind}, unused for {file.used:.0f} days" if file.is_whole else file.kind


def in_mib(files: list[File]) -> str:
    return f"{sum(file.size for file in files) / 2**20:,.1f}"
