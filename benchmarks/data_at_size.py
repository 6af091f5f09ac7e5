"""Measure what a large data set costs before the first batch: a start with and without a cache, memory, and a resumed stream.

A million rows of small images in parquet files are read by `text_image_batches`; images are not decoded and encoders cost
nothing, so the figures are those of the data's own bookkeeping. Tar shards are resumed by `streaming_batches`. Each start
is a process of its own. Its seconds at work leave out what it waited for disks and other processes; its memory is what no
other process could share (RssAnon): the most of it, and what is left at the first batch.
"""

import io
import json
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import pyarrow as pa
import torch
from PIL import Image
from pyarrow import parquet
from reporting import write_report
from transformers.hf_argparser import HfArg

from cm_diffusers.data import cache
from cm_diffusers.data.cache import Vae
from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.data.streaming import streaming_batches
from cm_diffusers.data.text_image import text_image_batches
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.evaluation.report import filled_columns, hardware
from cm_diffusers.models.families.base import Latents


SIDE, FILE_ROWS, TARS, BATCH = 8, 100_000, 40, 4
COLUMNS = {
    "start": ("start", "{}"),
    "seconds": ("seconds to the first batch", "{:.1f}"),
    "cpu": ("of them at work", "{:.1f}"),
    "most": ("most memory, MB", "{:.0f}"),
    "left": ("memory at the first batch, MB", "{:.0f}"),
}


@dataclass
class SizeConfig:
    """How much, and where."""

    rows: int = HfArg(default=1_000_000, help="Of the cached data set; 0 leaves it out.")
    batches: int = HfArg(default=100_000, help="Before the stream is resumed; 0 leaves it out.")
    workdir: str = HfArg(default="runs/data_at_size", help="Where data and caches go.")
    output_dir: str = HfArg(default="runs/data_at_size_table", help="Where the table goes.")
    measure: Literal["rows", "tars"] | None = HfArg(default=None, help="One start, in this process.")


def png(number: int) -> bytes:
    colour = (number % 256, number // 256 % 256, number // 65536 % 256)
    Image.new("RGB", (SIDE, SIDE), colour).save(buffer := io.BytesIO(), format="PNG", compress_level=1)
    return buffer.getvalue()


def caption(number: int) -> str:
    return f"a photograph of object {number} on a table beside a window, in soft light"


def write_rows(folder: Path, rows: int) -> None:
    folder.mkdir(parents=True)
    for start in range(0, rows, FILE_ROWS):
        numbers = range(start, min(start + FILE_ROWS, rows))
        table = {"image": [{"bytes": png(i), "path": None} for i in numbers], "text": [caption(i) for i in numbers]}
        parquet.write_table(pa.table(table), folder / f"train-{start:09}.parquet")


def write_tars(folder: Path, samples: int) -> None:
    folder.mkdir(parents=True)
    for number in range(TARS):
        with tarfile.open(folder / f"{number:03}.tar", "w") as archive:
            for i in range(number, samples, TARS):
                for suffix, content in ((".png", png(i)), (".txt", caption(i).encode())):
                    info = tarfile.TarInfo(f"{i:09}{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


class NoVae(torch.nn.Module):
    """Stands where a VAE would."""

    device, dtype = torch.device("cpu"), torch.float32


def encoders() -> Encoders:
    """Means of the pixels, and two numbers of each caption."""

    def encode(vae: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return mean, torch.zeros_like(mean)

    def prompts(texts: list[str]) -> dict[str, torch.Tensor]:
        return {"encoder_hidden_states": torch.tensor([[[len(text), text.count(" ")]] for text in texts]).float()}

    latents = Latents(encode, encode, 0.0, 1.0, 8, 3)
    return Encoders(Vae(NoVae, "mean of pixels", latents), prompts, "two numbers")


def black(*_: object) -> torch.Tensor:
    """In place of an image; a `Mock` would keep all that it is given."""
    return torch.zeros(3, SIDE, SIDE)


def anonymous() -> float:
    """MB of this process's memory that nothing backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds and memory of the block beyond what was there before."""
    found, before, done = {"most": 0.0}, anonymous(), threading.Event()
    start, worked = time.perf_counter(), time.process_time()

    def watch() -> None:
        while not done.wait(0.05):
            found["most"] = max(found["most"], anonymous() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield found
    found |= {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - worked,
        "left": anonymous() - before,
    }
    done.set()
    watcher.join()


def measure(kind: str, folder: Path, batches: int) -> dict[str, float]:
    """Until the first batch: of a cached run, or of a stream that goes on after so many batches."""
    common = {"resolution": SIDE, "train_batch_size": BATCH, "center_crop": True, "cache_dir": str(folder / "hf")}
    common["latent_cache_dir"] = str(folder / "cache")
    if kind == "rows":
        config = DataConfig(
            train_data_dir=str(folder / "rows"),
            encode_batch_size=1024,
            **common,
        )
        make = text_image_batches
    else:
        shards = f"{folder}/tars/{{000..{TARS - 1:03}}}.tar"
        config = DataConfig(train_shards_path_or_url=shards, streaming=True, **common)
        make = streaming_batches
    with mock.patch.object(cache, "_image", black), watched() as found:
        stream = make(config, encoders(), 0)
        next(stream(batches))
    return found


def start(kind: str, folder: Path, batches: int = 0) -> dict[str, float]:
    """`measure` in a process of its own."""
    words = [sys.executable, __file__, "--workdir", folder, "--measure", kind, "--batches", batches]
    done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(config: SizeConfig) -> list[dict[str, float | str]]:
    """A row for each start."""
    folder, rows, batches, found = Path(config.workdir), config.rows, config.batches, []

    def add(name: str, kind: str, seen: int = 0) -> None:
        found.append({"start": name} | start(kind, folder, seen))
        print(json.dumps(found[-1]), flush=True)

    if rows:
        if not (folder / "rows").exists():
            write_rows(folder / "rows", rows)
        add(f"{rows:,} rows, nothing cached", "rows")
        add(f"{rows:,} rows, all cached", "rows")
    if batches:
        if not (folder / "tars").exists():
            write_tars(folder / "tars", batches * BATCH // 4)
        add("tar shards without an index, first batch", "tars")
        add(f"tar shards with one, resumed after {batches:,} batches of {BATCH}", "tars", batches)
    return found


def main() -> None:
    (config,) = parse_configs((SizeConfig,), __doc__)
    if config.measure is not None:
        print(json.dumps(measure(config.measure, Path(config.workdir), config.batches)))
        return
    found = report(config)
    table = f"{filled_columns(found, COLUMNS)}\n\nOne process, {hardware()}.\n"
    write_report(Path(config.output_dir), "data_at_size", table, {"rows": found})
    print(table)


if __name__ == "__main__":
    run(main)
