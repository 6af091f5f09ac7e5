"""Some steps of every method by its own script, on whatever GPU there is: steps a second, share of peak, memory.

It ends with an error where a step waits for the device between two looks of the training loop. On a GPU: bfloat16, some
methods compiled or in float16 besides, and sharded by FSDP2 over all GPUs; on a CPU a few steps of each in float32.
"""

import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState
from reporting import synchronize, write_report
from smoke_methods import COMPILED, LOOKS_ITSELF, METHODS, SHARDED
from torch.utils.flop_counter import FlopCounterMode
from transformers.hf_argparser import HfArg

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation.report import hardware


ROOT = Path(__file__).parents[1]
WARM_UP, COUNTED = 3, 1  # steps that are not timed, and which of them is counted
PEAKS = {"H100": 989, "H200": 989, "A100": 312, "A10G": 70, "L40": 181, "4090": 165, "3090": 71}  # bf16 TFLOP/s, dense
PACKAGE_PATHS = (f"{os.sep}cm_diffusers{os.sep}", f"{os.sep}training{os.sep}")


@dataclass
class SmokeConfig:
    """What runs."""

    methods: list[str] | None = HfArg(default=None, help=f"Of {', '.join(METHODS)}; all if not given.")
    steps: int | None = HfArg(default=None, help="Timed steps of each; 20 on a GPU, 1 on a CPU, if not given.")
    train_batch_size: int = HfArg(default=8, help="Of each process.")
    peak_tflops: float | None = HfArg(default=None, help="Of the GPU, in bfloat16; by its name if not given.")
    sharded: bool = HfArg(default=False, help="As one of the processes of torchrun that FSDP2 shards over.")
    output_dir: str = HfArg(default="runs/gpu_smoke", help="Where gpu_smoke.md and gpu_smoke.json go.")


@dataclass(frozen=True)
class Row:
    """A run.

    Attributes:
        tflop: Of a step, as torch counts; 0 where it is compiled or sharded, which the counter does not bear.
        peak_gib: Of the GPU's memory; 0 on a CPU.
        error: What went wrong; where a step waited for the device, the line.
    """

    method: str
    how: str
    steps_per_second: float = 0.0
    tflop: float = 0.0
    peak_gib: float = 0.0
    error: str = ""


class Enough(Exception):
    """All steps of a run are done; it need not be published."""


class Watch:
    """Takes the place of the trainer's step.

    Args:
        timed: Steps to time after `WARM_UP`.
        strict: Whether a timed step that waits for the device is an error.
        counts: Whether to count operations.
        ends: Whether the run ends with the last step.
    """

    def __init__(self, timed: int, strict: bool, counts: bool, ends: bool) -> None:
        self.timed, self.strict, self.ends = timed, strict, ends
        self.counter = FlopCounterMode(display=False) if counts else nullcontext()
        self.step, self.seconds, self.started = 0, 0.0, 0.0

    @property
    def tflop(self) -> float:
        return self.counter.get_total_flops() / 1e12 if isinstance(self.counter, FlopCounterMode) else 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        usual = Trainer.training_step

        def training_step(trainer: Trainer, stream: Iterator) -> tuple:
            if self.step == WARM_UP:
                synchronize()
                self.started = time.perf_counter()
            with self.counter if self.step == COUNTED else nullcontext(), self.no_waiting():
                found = usual(trainer, stream)
            self.step += 1
            if self.step == WARM_UP + self.timed:
                synchronize()
                self.seconds = time.perf_counter() - self.started
                if self.ends:
                    raise Enough
            return found

        with mock.patch.object(Trainer, "training_step", training_step):
            yield

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """A wait for the device raises RuntimeError inside the block: between looks the loop has none."""
        strict = self.strict and self.step >= WARM_UP
        if strict:
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if strict:
                torch.cuda.set_sync_debug_mode("default")


@cache
def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"smoke_{name}", ROOT / "training" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(method: str, config: SmokeConfig, workdir: Path, precision: str, compiles: bool = False) -> Row:
    """A run of a method's script in this process."""
    on_gpu, name = torch.cuda.is_available(), METHODS[method][0]
    timed = config.steps or (20 if on_gpu else 1)
    strict = on_gpu and method not in LOOKS_ITSELF and precision != "fp16"  # whose scale is looked at every step
    goes_on = method in ("EDM", "motion") and not compiles and not config.sharded
    watch = Watch(timed, strict, counts=not (compiles or config.sharded), ends=not goes_on)
    words = words_of(method, workdir, precision, WARM_UP + timed, config.train_batch_size, compiles)
    forget()
    with mock.patch.object(sys, "argv", [str(ROOT / "training" / f"{name}.py"), *words]), watch.watching():
        error = first_error(script(name).main)
    how = ", ".join([precision, *["compiled"] * compiles, *["FSDP2"] * config.sharded])
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return Row(method, how, timed / watch.seconds if watch.seconds else 0.0, watch.tflop, peak, error)


def words_of(method: str, workdir: Path, precision: str, steps: int, batch_size: int, compiles: bool) -> list[str]:
    """Of the command line of a method's script."""
    name, flags = METHODS[method]
    before = {other: workdir / f"{other}-{precision}" for other in ("EDM", "motion")}
    words = [word.format(assets=ROOT / "assets", **before) for word in flags.split()]
    settings = {
        "train_batch_size": batch_size,
        "max_train_steps": steps,
        "checkpointing_steps": 1_000_000,
        "mixed_precision": precision,
        "report_to": "none",
        "output_dir": workdir / f"{method}-{precision}{'-compiled' * compiles}",
    }
    if "latent_cache_dir" in known_flags(name) and "--rewards" not in words:
        settings["latent_cache_dir"] = workdir / "cache"
    words += [word for flag, value in settings.items() for word in (f"--{flag}", str(value))]
    return [*words, *["--compile"] * compiles]


@cache
def known_flags(name: str) -> set[str]:
    return {field for config in script(name).CONFIGS for field in config.__dataclass_fields__}


def forget() -> None:
    """What the run before left: accelerate's singletons, torch.compile's graphs, memory."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def first_error(main: Callable[[], None]) -> str:
    """What a script ends with, and where in this package; nothing if it is well."""
    try:
        main()
    except Enough:
        pass
    except Exception as error:  # one method's failure is a row of the table
        ours = [
            one for one in traceback.extract_tb(error.__traceback__) if any(p in one.filename for p in PACKAGE_PATHS)
        ]
        where = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
        return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}{where}"
    return ""


def sharded_rows(config: SmokeConfig, methods: list[str]) -> list[Row]:
    """Of processes of their own, one for each GPU; none, with a line that says why, where that cannot be."""
    chosen = [method for method in SHARDED if method in methods]
    if reason := unsharded_because(chosen):
        print(f"FSDP2: skipped, {reason}.")
        return []
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(torch.cuda.device_count())]
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "--sharded",
            "--methods",
            *chosen,
            "--output_dir",
            folder,
            "--train_batch_size",
            str(config.train_batch_size),
        ]
        words += ["--steps", str(config.steps)] if config.steps else []
        environment = os.environ | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        ended = subprocess.run([sys.executable, *launcher, str(Path(__file__).resolve()), *words], env=environment)
        report = Path(folder) / "gpu_smoke.json"
        rows = [Row(**row) for row in json.loads(report.read_text("utf-8"))["rows"]] if report.is_file() else []
    return rows or [Row(chosen[0], "FSDP2", error=f"ended with {ended.returncode}")]


def unsharded_because(methods: list[str]) -> str:
    if find_spec("cm_diffusers.engine.sharding") is None:
        return "this version of cm_diffusers does not shard"
    return "" if methods and torch.cuda.is_available() else f"none of {', '.join(SHARDED)} runs on a GPU"


def all_rows(config: SmokeConfig, workdir: Path) -> list[Row]:
    """Eager first: others start from what these leave."""
    methods = list(config.methods or METHODS)
    if unknown := [method for method in methods if method not in METHODS]:
        raise UserError(f"--methods {unknown[0]} is none; one of {', '.join(METHODS)}.")
    needed = [name for name in ("EDM", "motion") if any(f"{{{name}}}" in METHODS[method][1] for method in methods)]
    order = [method for method in METHODS if method in {*methods, *needed}]
    if not torch.cuda.is_available():
        return [measure(method, config, workdir, "no") for method in order]
    half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    rows = [measure(method, config, workdir, half) for method in order]
    if config.sharded:
        return rows
    rows += [measure(method, config, workdir, half, compiles=True) for method in COMPILED if method in methods]
    rows += [measure("LCM", config, workdir, "fp16")] if half == "bf16" and "LCM" in methods else []
    return rows + sharded_rows(config, methods)


def as_table(config: SmokeConfig, rows: list[Row]) -> str:
    """Markdown."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = config.peak_tflops or next((peak for gpu, peak in PEAKS.items() if gpu in name), None)
    lines = [
        "| method | how | steps/s | GFLOP a step | share of peak | peak, GiB | |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    counted = {
        row.method: row.tflop for row in rows if row.tflop
    }  # compiled and sharded steps have as many operations
    for row in rows:
        tflop = counted.get(row.method, 0.0)
        share = f"{tflop * row.steps_per_second / peak:.1%}" if peak and name and tflop else "–"
        flop = f"{1000 * tflop:.3g}" if tflop else "–"
        memory = f"{row.peak_gib:.2f}" if row.peak_gib else "–"
        cells = [row.method, row.how, f"{row.steps_per_second:.2f}", flop, share, memory, row.error or "well"]
        lines.append(f"| {' | '.join(cells)} |")
    taken = f", {peak:g} TFLOP/s taken for its peak" if peak and name else ""
    return "\n".join(lines) + f"\n\nBatch {config.train_batch_size}, {hardware()}{taken}.\n"


def main() -> None:
    (config,) = parse_configs((SmokeConfig,), __doc__)
    with tempfile.TemporaryDirectory() as workdir:
        rows = all_rows(config, Path(config.output_dir if config.sharded else workdir))  # processes share a folder
    if os.environ.get("RANK", "0") == "0":
        table = as_table(config, rows)
        numbers = {"setting": asdict(config), "rows": [asdict(row) for row in rows]}
        write_report(Path(config.output_dir), "gpu_smoke", table, numbers)
        print(table)
    if bad := [f"{row.method} ({row.how}): {row.error}" for row in rows if row.error]:
        raise UserError(
            f"{len(bad)} of {len(rows)} runs are not well: {bad[0]}; {config.output_dir}/gpu_smoke.md has all."
        )


if __name__ == "__main__":
    run(main)
