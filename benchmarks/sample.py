"""Time of a call of ConsistencyPipeline against the stock pipeline that samples the same student.

Every round calls each pipeline once with the same prompts and seeds, so that all see the same machine; the median of
the rounds' ratios is reported. The images are compared too: a faster pipeline must not be another one.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from diffusers import DiffusionPipeline
from reporting import interleaved, write_report
from transformers.hf_argparser import HfArg

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.evaluation.report import hardware


PROMPT = "a photo of an ankle boot"


@dataclass
class SampleConfig:
    """What is sampled, and how often."""

    pretrained_model_name_or_path: str = HfArg(default="assets/fashion_lcm", help="Folder or Hub id of a student.")
    num_inference_steps: int = HfArg(default=4, help="Steps of a call.")
    guidance_scale: float = HfArg(default=3.0, help="Guidance scale of a call.")
    batch_sizes: list[int] = HfArg(default_factory=lambda: [1, 16], help="Images per call.")
    repeats: int = HfArg(default=60, help="Rounds, after three that do not count.")
    num_threads: int = HfArg(default=2, help="Threads of torch on a CPU.")
    output_dir: str = HfArg(default="runs/benchmark_sample", help="Where sample.md and sample.json go.")


CONFIGS = (SampleConfig,)


def caller(pipe: DiffusionPipeline, config: SampleConfig, batch_size: int) -> Callable[[], torch.Tensor]:
    arguments = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}

    def call() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe([PROMPT] * batch_size, generator=generator, output_type="pt", **arguments).images

    return call


def measure(config: SampleConfig) -> dict[int, dict]:
    """For each batch size: medians in milliseconds, the ratio in wall and in CPU time, and the largest difference."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = ConsistencyPipeline.from_pretrained(config.pretrained_model_name_or_path).to(device)
    stock = DiffusionPipeline.from_pretrained(config.pretrained_model_name_or_path, use_safetensors=True).to(device)
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
    found = {}
    for size in config.batch_sizes:
        actions = {"ours": caller(ours, config, size), "stock": caller(stock, config, size)}
        times = interleaved(actions, config.repeats, lambda: None)
        pairs = list(zip(times["ours"], times["stock"], strict=True))
        found[size] = {
            **{f"{name} ms": 1000 * median(wall for wall, _ in values) for name, values in times.items()},
            "ratio": median(a / b for (a, _), (b, _) in pairs),
            "ratio in CPU time": median(a / b for (_, a), (_, b) in pairs),
            "largest difference": (actions["ours"]() - actions["stock"]()).abs().max().item(),
            "stock": type(stock).__name__,
        }
    return found


def as_table(config: SampleConfig, found: dict[int, dict]) -> str:
    lines = ["| batch | ConsistencyPipeline, ms | stock, ms | ratio | in CPU time | largest difference |"]
    lines.append("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for size, row in found.items():
        cells = f"{row['ours ms']:.1f} | {row['stock ms']:.1f} | {row['ratio']:.3f} | {row['ratio in CPU time']:.3f}"
        lines.append(f"| {size} | {cells} | {row['largest difference']:.1e} |")
    stock = next(iter(found.values()))["stock"]
    setting = (
        f"{config.num_inference_steps} steps, stock is {stock}, {config.repeats} interleaved rounds, {hardware()}."
    )
    return "\n".join(lines) + f"\n\n{setting}\n"


def main() -> None:
    (config,) = parse_configs(CONFIGS, __doc__)
    torch.set_num_threads(config.num_threads)
    found = measure(config)
    table = as_table(config, found)
    write_report(Path(config.output_dir), "sample", table, {"setting": asdict(config), "found": found})
    print(table)


if __name__ == "__main__":
    run(main)
