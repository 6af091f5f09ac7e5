"""Time of a training step of LCM with a flow-matching teacher, full and LoRA, against the network passes it needs.

Every round measures each thing once, so that all of them see the same machine; the medians are reported.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from distillation import BenchmarkConfig, Distillation
from reporting import interleaved, ratio, write_report

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.evaluation.report import hardware


PASSES = ("student", "target", "teacher")
KINDS = ("full", "lora")


@dataclass
class FlowStepConfig(BenchmarkConfig):
    """As `BenchmarkConfig`, of the small flow teacher."""

    pretrained_teacher_model: str = "runs/flow_fashion/pipeline"


def measure(config: FlowStepConfig, workdir: Path) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of "full/step", "full/student" ... "lora/teacher", in each round."""
    distillations = {kind: Distillation(config, kind, workdir) for kind in KINDS}
    actions = {}
    for kind, one in distillations.items():
        actions |= {f"{kind}/step": one.step} | {f"{kind}/{name}": action for name, action in one.passes().items()}

    def clear_gradients() -> None:
        for one in distillations.values():
            for _, network in one.trainer.nets.items():
                network.zero_grad(set_to_none=True)

    return interleaved(actions, config.repeats, clear_gradients)


def ratios(times: dict[str, list[tuple[float, float]]], clock: int) -> dict[str, float]:
    """Of each kind's step to the sum of its passes, the median over the rounds; at most 1.10 is wanted."""
    return {kind: ratio(times, f"{kind}/step", [f"{kind}/{name}" for name in PASSES], clock) for kind in KINDS}


def main() -> None:
    (config,) = parse_configs((FlowStepConfig,), __doc__)
    torch.set_num_threads(config.num_threads)
    with tempfile.TemporaryDirectory() as workdir:
        times = measure(config, Path(workdir))
    columns = ("step", *PASSES)
    lines = [["", *(f"{name}, ms" for name in columns), "step / passes", "in CPU time"], ["---", *["---:"] * 6]]
    for kind in KINDS:
        cells = [f"{1000 * median(wall for wall, _ in times[f'{kind}/{name}']):.1f}" for name in columns]
        lines.append([kind, *cells, *(f"{ratios(times, clock)[kind]:.2f}" for clock in (0, 1))])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    table += f"\n\nBatch {config.train_batch_size}, seed {config.seed}, {config.repeats} interleaved rounds, {hardware()}.\n"
    found = {kind: {"wall": ratios(times, 0)[kind], "cpu": ratios(times, 1)[kind]} for kind in KINDS}
    write_report(
        Path(config.output_dir), "flow_step", table, {"setting": asdict(config), "ratios": found, "seconds": times}
    )
    print(table)


if __name__ == "__main__":
    run(main)
