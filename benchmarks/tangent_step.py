"""Time of a step of sCD by each kind of tangent: against the passes that it is made of, and against a plain diffusion step.

Every round measures each thing once, so that all of them see the same machine; the medians are reported.
"""

import copy
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from distillation import Action, StepConfig, data_config, the_teacher
from reporting import interleaved, ratio, write_report
from transformers.hf_argparser import HfArg

from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.text_image import text_image_batches
from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.diffusion.tangent import TANGENTS
from cm_diffusers.diffusion.trigflow import TrigFlowView, trigflow_denoiser
from cm_diffusers.diffusion.views import VPView
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.evaluation.report import hardware
from cm_diffusers.models.time_weight import WithTimeWeight
from cm_diffusers.objectives.diffusion import DiffusionConfig, DiffusionObjective
from cm_diffusers.objectives.scm import SCMConfig, SCMObjective
from cm_diffusers.types import Networks


PASSES = ("teacher", "tangent", "student")
SIGMAS = (0.03, 14.0)  # which Stable Diffusion knows


@dataclass
class TangentStepConfig(StepConfig):
    """Where the report goes, besides."""

    output_dir: str = HfArg(
        default="runs/benchmark_tangent_step", help="Where tangent_step.md and tangent_step.json go."
    )


CONFIGS = (TangentStepConfig,)


class Training:
    """One run of the trainer.

    Args:
        kind: A kind of tangent, of sCD without guidance; or "plain", the diffusion loss.
        workdir: Temporary folder, for the latents too.
    """

    def __init__(self, config: TangentStepConfig, kind: str, workdir: Path) -> None:
        teacher = the_teacher(config)
        process, predicted = DiscreteVP.from_scheduler(teacher.scheduler), teacher.scheduler.config.prediction_type
        train = TrainConfig(output_dir=tempfile.mkdtemp(dir=workdir), report_to="none", seed=config.seed)
        train.mixed_precision = config.mixed_precision
        student = copy.deepcopy(teacher.unet).requires_grad_(True).train()
        if kind == "plain":
            nets, objective = Networks(student), DiffusionObjective(DiffusionConfig(predicted), process)
        else:
            nets = Networks(WithTimeWeight(student), teacher=teacher.unet)
            view = TrigFlowView.of(VPView(process, predicted, 1.0))
            objective = SCMObjective(SCMConfig(*SIGMAS, tangent=kind), view)
        self.trainer = Trainer(train, nets, objective, OptimConfig())
        encoders = Encoders.from_pipeline(teacher)
        batches = text_image_batches(data_config(config, workdir), encoders, config.seed, device=self.trainer.device)
        self.stream = batches(0)

    def step(self) -> None:
        self.trainer.training_step(self.stream)

    def passes(self) -> dict[str, Action]:
        """What the networks do in one step of sCD, as the objective asks for it, on one fixed batch."""
        nets, objective, batch = self.trainer.nets, self.trainer.objective, next(self.stream).to(self.trainer.device)
        x, t, cond = torch.randn_like(batch.x0), objective.times(batch.size), batch.cond
        autocast = self.trainer.accelerator.autocast

        @torch.no_grad()
        def ask_teacher() -> None:
            with autocast():
                trigflow_denoiser(objective.view, nets.teacher)(x, t, cond)

        @torch.no_grad()
        def take_tangent() -> None:
            with autocast():
                objective.tangent(nets.student, cond, x, t, x, 1.0)

        def learn() -> None:
            with autocast():
                output, w = objective.weighted(nets.student, x, t, cond)
            torch.autograd.backward((output, w), (x, torch.ones_like(w)))

        return dict(zip(PASSES, (ask_teacher, take_tangent, learn), strict=True))


def measure(config: TangentStepConfig, workdir: Path) -> dict[str, list[tuple[float, float]]]:
    """`seconds` of "plain/step", "jvp/step", "jvp/teacher" ..."""
    trainings = {kind: Training(config, kind, workdir) for kind in ("plain", *TANGENTS)}
    actions: dict[str, Action] = {f"{kind}/step": one.step for kind, one in trainings.items()}
    for kind in TANGENTS:
        actions |= {f"{kind}/{name}": action for name, action in trainings[kind].passes().items()}

    def clear_gradients() -> None:
        for one in trainings.values():
            one.trainer.nets.student.zero_grad(set_to_none=True)

    return interleaved(actions, config.repeats, clear_gradients)


def ratios(times: dict[str, list[tuple[float, float]]], clock: int) -> dict[str, dict[str, float]]:
    """Of each kind, medians over the rounds.

    "step / passes": 1.10 at most is wanted. "step / plain step": 3.0 at most. "tangent / teacher": how many passes
    without gradient a tangent costs.
    """
    return {
        kind: {
            "step / passes": ratio(times, f"{kind}/step", [f"{kind}/{name}" for name in PASSES], clock),
            "step / plain step": ratio(times, f"{kind}/step", ["plain/step"], clock),
            "tangent / teacher": ratio(times, f"{kind}/tangent", [f"{kind}/teacher"], clock),
        }
        for kind in TANGENTS
    }


def as_table(config: TangentStepConfig, times: dict[str, list[tuple[float, float]]]) -> str:
    """Markdown: a row of medians for each kind, with ratios in wall-clock and in CPU time, then the setting."""
    milliseconds = {name: 1000 * median(wall for wall, _ in values) for name, values in times.items()}
    wall, cpu = ratios(times, 0), ratios(times, 1)
    compared = list(wall["jvp"])
    lines = [["tangent", *(f"{name}, ms" for name in ("step", *PASSES)), *compared], ["---", *["---:"] * 7]]
    for kind in TANGENTS:
        cells = [f"{milliseconds[f'{kind}/{name}']:.1f}" for name in ("step", *PASSES)]
        lines.append([kind, *cells, *(f"{wall[kind][name]:.2f} ({cpu[kind][name]:.2f})" for name in compared)])
    lines.append(["plain step", f"{milliseconds['plain/step']:.1f}", *["–"] * 6])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    setting = f"Batch {config.train_batch_size}, mixed precision {config.mixed_precision}, seed {config.seed}, {config.repeats} interleaved rounds, {hardware()}; in brackets: in CPU time."
    return f"{table}\n\n{setting}\n"


def main() -> None:
    (config,) = parse_configs(CONFIGS, __doc__)
    torch.set_num_threads(config.num_threads)
    with tempfile.TemporaryDirectory() as workdir:
        times = measure(config, Path(workdir))
    table = as_table(config, times)
    setting = asdict(config) | {"hardware": hardware(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    numbers = {"setting": setting, "ratios": {"wall": ratios(times, 0), "cpu": ratios(times, 1)}, "seconds": times}
    write_report(Path(config.output_dir), "tangent_step", table, numbers)
    print(table)


if __name__ == "__main__":
    run(main)
