"""Time of a training step of the methods whose jumps end anywhere, and of BOOT, against the network passes it needs.

PCM, TCD and BOOT distil a teacher of prompts; CTM and mean flow train a small network with classes and random weights, on
random latents. Every round measures each thing once, so that all of them see the same machine; the medians are reported.
"""

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from diffusers import UNet2DModel
from distillation import Action, StepConfig, data_config, the_teacher
from reporting import interleaved, ratio, write_report
from torch import Tensor
from transformers.hf_argparser import HfArg

from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.text_image import text_image_batches
from cm_diffusers.diffusion.denoisers import Call, call_unet
from cm_diffusers.diffusion.guidance import Conditions
from cm_diffusers.diffusion.views import EDMView
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.evaluation.report import hardware
from cm_diffusers.models.critics import CriticConfig, make_critic, make_view_critic
from cm_diffusers.models.dropout import DropoutConfig
from cm_diffusers.models.families.base import network_of
from cm_diffusers.models.students import StudentConfig, frozen_copy, make_networks
from cm_diffusers.models.with_target import with_target
from cm_diffusers.objectives.boot import BOOTConfig, BOOTObjective
from cm_diffusers.objectives.ctm import CTMConfig, CTMObjective
from cm_diffusers.objectives.mean_flow import MeanFlowConfig, MeanFlowObjective
from cm_diffusers.objectives.pcm import PCMConfig, PCMObjective
from cm_diffusers.objectives.tcd import TCDConfig, TCDObjective
from cm_diffusers.tasks.boot import latent_shape
from cm_diffusers.tasks.image_runs import trainable_copy
from cm_diffusers.tasks.teachings import teaching_of
from cm_diffusers.tasks.text_to_image import critic_optim
from cm_diffusers.types import Batch, Networks, Objective


# What each method asks of a network: samples, in batches, and what of it is back-propagated.
Pass = tuple[str, float, str]
JUMP: list[Pass] = [("teacher", 2, "none"), ("target", 1, "none"), ("student", 1, "weights")]
FAKE: list[Pass] = [("student", 1, "none"), ("target", 1, "none")]  # CTM's two jumps to the data
JUDGED: list[Pass] = [("critic", 2, "weights"), ("critic", 1, "input")]
CTM: list[Pass] = [("teacher", 1, "none")] * 2 + [*FAKE, ("target", 1, "input")] + [("student", 1, "weights")] * 2
PASSES: dict[str, list[Pass]] = {
    "PCM": JUMP,
    "PCM with critic": [*JUMP, *JUMP[:2], ("student", 1, "none"), *JUDGED],
    "TCD": JUMP,
    "BOOT": [
        *[("student", 1, "none"), ("teacher", 2, "none"), ("student", 1, "weights")],
        *[("teacher", 0.5, "none"), ("student", 0.25, "weights")],
    ],
    "CTM": CTM,
    "CTM with critic": [*CTM, *FAKE, *JUDGED],
    "mean flow": [*[("student", 1, "none")] * 2, ("student", 1, "weights")],
}
COLUMNS = ("student", "target", "teacher", "critic")
CLASSES, VIEW = 10, EDMView(0.5, "trigflow")
AT_ONCE = {"adversarial_start": 0, "adversarial_ramp": 0}  # the critic is there from the first step


@dataclass
class TrajectoryStepConfig(StepConfig):
    """The network with classes, and where the report goes, besides."""

    unet_config: str = HfArg(
        default="training/recipes/unet_fashion_latents.json", help="JSON file with the settings of its UNet2DModel."
    )
    latent_size: int = HfArg(default=8, help="Side of its random latents, which have four channels.")
    output_dir: str = HfArg(
        default="runs/benchmark_trajectory_step", help="Where trajectory_step.md and trajectory_step.json go."
    )


class Parts(NamedTuple):
    """What a training is made of.

    Attributes:
        stream: Its batches.
        call: How student, target and teacher are called.
        t: Times `(B,)` that these know.
        told: Beside the conditions, what student and target are told, each `(B, ...)`.
    """

    nets: Networks
    objective: Objective
    stream: Iterator[Batch]
    call: Call
    t: Tensor
    told: Conditions


def of_prompts(config: TrajectoryStepConfig, kind: str, workdir: Path) -> Parts:
    teacher, student = the_teacher(config), StudentConfig()
    dim = student.guidance_embedding_dim(network_of(teacher))
    nets = make_networks(network_of(teacher), student)
    if kind == "BOOT":
        method = BOOTConfig()
        teaching = teaching_of(teacher, dim, method)
        objective = BOOTObjective(method, teaching, latent_shape(teacher, config.resolution))
    elif kind == "TCD":
        teaching = teaching_of(teacher, dim, method := TCDConfig())
        objective = TCDObjective(method, teaching)
    else:
        teaching = teaching_of(teacher, dim, method := PCMConfig(**AT_ONCE))
        nets.critic = make_critic(nets, CriticConfig()) if "critic" in kind else None
        objective = PCMObjective(method, teaching, nets.critic is not None)
    stream = text_image_batches(data_config(config, workdir), Encoders.from_pipeline(teacher), config.seed)(0)
    t, w = teaching.pairs(config.train_batch_size)[0], torch.full((config.train_batch_size,), 8.0)
    return Parts(nets, objective, stream, teaching.call, t, teaching.guiding.student({}, w))


def of_latents(config: TrajectoryStepConfig, kind: str, workdir: Path) -> Parts:
    settings = json.loads(Path(config.unet_config).read_text("utf-8"))
    sizes = {"sample_size": config.latent_size, "in_channels": 4, "out_channels": 4, "num_class_embeds": CLASSES}
    torch.manual_seed(config.seed)
    unet = UNet2DModel(**settings, **sizes).requires_grad_(False).eval()
    student = trainable_copy(with_target(unet), DropoutConfig())
    if kind == "mean flow":
        nets = Networks(student)
        objective = MeanFlowObjective(MeanFlowConfig(tangent="one_sided"), VIEW)
    else:
        critic = make_view_critic(unet, VIEW, CriticConfig("heads" if "critic" in kind else "none"))
        nets = Networks(student, target=frozen_copy(student), teacher=unet, critic=critic)
        objective = CTMObjective(CTMConfig(teacher_intervals=1, **AT_ONCE), VIEW, critic=critic is not None)
    t = torch.ones(config.train_batch_size)
    return Parts(nets, objective, random_latents(config), call_unet, t, {"target_timestep": t})


def random_latents(config: TrajectoryStepConfig) -> Iterator[Batch]:
    generator, size = torch.Generator().manual_seed(config.seed), config.train_batch_size
    while True:
        x0 = VIEW.sigma_data * torch.randn(size, 4, config.latent_size, config.latent_size, generator=generator)
        yield Batch(x0, {"class_labels": torch.randint(CLASSES, (size,), generator=generator)})


MAKERS = dict.fromkeys(PASSES, of_prompts) | dict.fromkeys(("CTM", "CTM with critic", "mean flow"), of_latents)


class Training:
    """One run of the trainer.

    Args:
        kind: One of `PASSES`.
        workdir: Temporary folder, for the latents too.
    """

    def __init__(self, config: TrajectoryStepConfig, kind: str, workdir: Path) -> None:
        self.kind, self.parts = kind, MAKERS[kind](config, kind, workdir)
        train = TrainConfig(output_dir=tempfile.mkdtemp(dir=workdir), report_to="none", seed=config.seed)
        train.mixed_precision = config.mixed_precision
        optims = {"student": OptimConfig(), "critic": critic_optim(CriticConfig(), OptimConfig())}
        self.trainer = Trainer(train, self.parts.nets, self.parts.objective, optims)

    def step(self) -> None:
        self.trainer.training_step(self.parts.stream)

    def passes(self) -> dict[str, Action]:
        """All passes of each network in one step, on one fixed batch."""
        batch = next(self.parts.stream)
        actions = {name: [self.action(*one, batch) for one in PASSES[self.kind] if one[0] == name] for name in COLUMNS}
        return {name: partial(all_of, each) for name, each in actions.items() if each}

    def action(self, name: str, share: float, gradient: str, batch: Batch) -> Action:
        """One of `PASSES`."""
        network, size = getattr(self.trainer.nets, name), math.ceil(share * batch.size)
        told = batch.cond | (self.parts.told if name in ("student", "target") else {})
        given = {"x": torch.randn_like(batch.x0), "t": self.parts.t, **told}
        cond = {key: torch.cat([value, value])[:size].to(self.trainer.device) for key, value in given.items()}
        x, t = cond.pop("x").requires_grad_(gradient == "input"), cond.pop("t")
        ask = network if name == "critic" else partial(self.parts.call, network)

        def act() -> None:
            with torch.set_grad_enabled(gradient != "none"), self.trainer.accelerator.autocast():
                output = ask(x, t, cond).float()
            if gradient == "weights":
                output.backward(output.detach())
            elif gradient == "input":
                torch.autograd.grad(output, x, output.detach())

        return act


def all_of(actions: list[Action]) -> None:
    for action in actions:
        action()


def measure(config: TrajectoryStepConfig, workdir: Path) -> dict[str, list[tuple[float, float]]]:
    """`seconds` of "PCM/step", "PCM/student" ... "mean flow/student"."""
    trainings = {kind: Training(config, kind, workdir) for kind in PASSES}
    actions: dict[str, Action] = {}
    for kind, one in trainings.items():
        actions |= {f"{kind}/step": one.step} | {f"{kind}/{name}": action for name, action in one.passes().items()}

    def clear_gradients() -> None:
        for one in trainings.values():
            for _, network in one.trainer.nets.items():
                network.zero_grad(set_to_none=True)

    return interleaved(actions, config.repeats, clear_gradients)


def ratios(times: dict[str, list[tuple[float, float]]], clock: int) -> dict[str, float]:
    """Of each kind's step to the sum of its passes, the median over the rounds; at most 1.15 is wanted."""
    parts = {kind: [name for column in COLUMNS if (name := f"{kind}/{column}") in times] for kind in PASSES}
    return {kind: ratio(times, f"{kind}/step", parts[kind], clock) for kind in PASSES}


def as_table(config: TrajectoryStepConfig, times: dict[str, list[tuple[float, float]]]) -> str:
    """Markdown: a row of medians for each kind, then the setting."""
    milliseconds = {name: f"{1000 * median(wall for wall, _ in values):.1f}" for name, values in times.items()}
    columns, wall, cpu = ("step", *COLUMNS), ratios(times, 0), ratios(times, 1)
    lines = [["", *(f"{name}, ms" for name in columns), "step / passes", "in CPU time"], ["---", *["---:"] * 7]]
    for kind in PASSES:
        cells = [milliseconds.get(f"{kind}/{name}", "–") for name in columns]
        lines.append([kind, *cells, f"{wall[kind]:.2f}", f"{cpu[kind]:.2f}"])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    setting = f"Batch {config.train_batch_size}, mixed precision {config.mixed_precision}, seed {config.seed}, {config.repeats} interleaved rounds, {hardware()}."
    return f"{table}\n\n{setting}\n"


def main() -> None:
    (config,) = parse_configs((TrajectoryStepConfig,), __doc__)
    torch.set_num_threads(config.num_threads)
    with tempfile.TemporaryDirectory() as workdir:
        times = measure(config, Path(workdir))
    table = as_table(config, times)
    found = {"wall": ratios(times, 0), "cpu": ratios(times, 1)}
    numbers = {"setting": asdict(config), "ratios": found, "seconds": times}
    write_report(Path(config.output_dir), "trajectory_step", table, numbers)
    print(table)


if __name__ == "__main__":
    run(main)
