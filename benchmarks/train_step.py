"""Time and memory of a training step of LCM and of SCott: against the network passes it needs, and against the example in diffusers.

Every round measures each thing once, so that all of them see the same machine; the medians are reported.
"""

import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from distillation import Action, BenchmarkConfig, Distillation, the_teacher
from reference_lcm_step import ReferenceLCM, pixel_batches
from reporting import interleaved, write_report

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.evaluation.report import hardware
from cm_diffusers.objectives.lcm import LCMConfig


PASSES = ("student", "target", "teacher", "critic")
KINDS = ("full", "lora", "scott")
CONFIGS = (BenchmarkConfig,)


def measure_times(config: BenchmarkConfig, workdir: Path) -> dict[str, list[tuple[float, float]]]:
    """`seconds` of "full/step", "full/student" ... "lora/teacher" and "reference/step"."""
    distillations = {kind: Distillation(config, kind, workdir) for kind in KINDS}
    data, device = distillations["full"].data, distillations["full"].trainer.device
    examples = pixel_batches(data, 4, device)
    dtype = {"no": None, "bf16": torch.bfloat16}[config.mixed_precision]
    dim = distillations["full"].dim
    reference = ReferenceLCM(the_teacher(config).to(device), examples, LCMConfig(), OptimConfig(), dim, dtype)
    actions: dict[str, Action] = {"reference/step": reference.step}
    for kind, one in distillations.items():
        actions |= {f"{kind}/step": one.step} | {f"{kind}/{name}": action for name, action in one.passes().items()}

    def clear_gradients() -> None:
        for one in distillations.values():
            for _, network in one.trainer.nets.items():
                network.zero_grad(set_to_none=True)

    return interleaved(actions, config.repeats, clear_gradients)


def ratios(times: dict[str, list[tuple[float, float]]], clock: int) -> dict[str, float]:
    """Medians over the rounds: of step / passes (at most 1.15 is wanted), of the reference and of SCott against LCM."""
    rounds = {name: [pair[clock] for pair in values] for name, values in times.items()}
    found = {}
    for kind in KINDS:
        own = [rounds[f"{kind}/{name}"] for name in PASSES if f"{kind}/{name}" in rounds]
        passes = [sum(parts) for parts in zip(*own, strict=True)]
        found[f"{kind} step / passes"] = median(a / b for a, b in zip(rounds[f"{kind}/step"], passes, strict=True))
    for name, other in (("full images/s / reference images/s", "reference"), ("scott step / full step", "scott")):
        pairs = zip(rounds[f"{other}/step"], rounds["full/step"], strict=True)
        found[name] = median(a / b for a, b in pairs)
    return found


def peak_memory(config: BenchmarkConfig, kind: str, workdir: Path) -> float:
    """Peak MiB of this process, on the GPU where there is one, after a few steps of `kind`; "idle" loads the teacher."""
    torch.set_num_threads(config.num_threads)
    if kind == "idle":
        the_teacher(config).unet.to("cuda" if torch.cuda.is_available() else "cpu")
    else:
        distillation = Distillation(config, kind, workdir)
        for _ in range(config.memory_steps):
            distillation.step()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss would start at the parent's peak
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10


def measure_memory(config: BenchmarkConfig, workdir: Path) -> dict[str, float]:
    """`peak_memory` of "idle" and of each kind, each in a new process."""
    found = {}
    for kind in ("idle", *KINDS):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            found[kind] = process.submit(peak_memory, config, kind, workdir).result()
    return found


def as_table(config: BenchmarkConfig, times: dict, memory: dict[str, float]) -> str:
    """Markdown: one row of medians per loop, then the ratios and the setting."""
    milliseconds = {name: 1000 * median(wall for wall, _ in values) for name, values in times.items()}
    columns = ("step", *PASSES)
    lines = [["", *(f"{name}, ms" for name in columns), "images/s", "MiB above idle"], ["---", *["---:"] * 7]]
    for loop in (*KINDS, "reference"):
        cells = [milliseconds.get(f"{loop}/{name}") for name in columns]
        speed = 1000 * config.train_batch_size / milliseconds[f"{loop}/step"]
        above = f"{memory[loop] - memory['idle']:.0f}" if loop in memory else "–"
        lines.append([loop, *("–" if cell is None else f"{cell:.1f}" for cell in cells), f"{speed:.0f}", above])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    wall, cpu = ratios(times, 0), ratios(times, 1)
    compared = "\n".join(f"- {name}: {wall[name]:.2f} (in CPU time {cpu[name]:.2f})" for name in wall)
    setting = f"Batch {config.train_batch_size}, mixed precision {config.mixed_precision}, {'compiled, ' * config.compile}seed {config.seed}, {config.repeats} interleaved rounds, {hardware()}."
    return f"{table}\n\n{compared}\n\n{setting}\n"


def main() -> None:
    (config,) = parse_configs(CONFIGS, __doc__)
    torch.set_num_threads(config.num_threads)
    with tempfile.TemporaryDirectory() as workdir:
        times = measure_times(config, Path(workdir))
        memory = measure_memory(config, Path(workdir))
    table = as_table(config, times, memory)
    setting = asdict(config) | {"hardware": hardware(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    found = {"wall": ratios(times, 0), "cpu": ratios(times, 1)}
    numbers = {"setting": setting, "ratios": found, "memory_mib": memory, "seconds": times}
    write_report(Path(config.output_dir), "train_step", table, numbers)
    print(table)


if __name__ == "__main__":
    run(main)
