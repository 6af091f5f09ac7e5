"""LCM and SCott as their training scripts set them up, to be run one step at a time."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.data.text_image import text_image_batches
from cm_diffusers.diffusion.process import as_like
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.models.critics import CriticConfig, make_critic
from cm_diffusers.models.families.base import network_of
from cm_diffusers.models.students import StudentConfig, make_networks
from cm_diffusers.models.teachers import TeacherConfig, load_teacher
from cm_diffusers.objectives.lcm import LCMConfig, LCMObjective
from cm_diffusers.objectives.scott import SCottConfig, SCottObjective
from cm_diffusers.tasks.teachings import teaching_of
from cm_diffusers.tasks.text_to_image import critic_optim


Action = Callable[[], object]


@dataclass
class StepConfig:
    """What is measured, and how often."""

    pretrained_teacher_model: str = HfArg(
        default="assets/fashion_teacher", help="Folder of a Stable Diffusion pipeline."
    )
    train_data_dir: str = HfArg(default="assets/fashion_captioned/train", help="Images and captions.")
    resolution: int = HfArg(default=32, help="Side of the images, in pixels.")
    max_train_samples: int = HfArg(default=256, help="Images that are encoded.")
    train_batch_size: int = HfArg(default=64, help="Images per step.")
    mixed_precision: Literal["no", "bf16"] = HfArg(default="no", help="Autocast dtype, of every loop.")
    repeats: int = HfArg(default=30, help="Measurements of each thing, after three that do not count.")
    num_threads: int = HfArg(default=2, help="Threads of torch on a CPU.")
    seed: int = HfArg(default=0, help="Seeds the data order, noise and times.")


@dataclass
class BenchmarkConfig(StepConfig):
    """What LCM and SCott are told besides."""

    lora_rank: int = HfArg(default=16, help="Rank of the adapters.")
    compile: bool = HfArg(default=False, help="torch.compile our networks; the example in diffusers has no such flag.")
    memory_steps: int = HfArg(default=3, help="Steps whose peak memory is taken.")
    output_dir: str = HfArg(default="runs/benchmark_train_step", help="Where train_step.md and train_step.json go.")


class Distillation:
    """One run of it.

    Args:
        kind: "full" or "lora", of LCM, or "scott", full with its default critic.
        workdir: Temporary folder, for the latents too.
    """

    def __init__(self, config: BenchmarkConfig, kind: str, workdir: Path) -> None:
        student = StudentConfig(lora=kind == "lora", lora_rank=config.lora_rank, lora_alpha=config.lora_rank)
        student.cast_teacher_unet = "no" if student.lora else config.mixed_precision
        self.data, teacher = data_config(config, workdir), the_teacher(config)
        self.network = network_of(teacher)
        self.dim = student.guidance_embedding_dim(self.network)
        train = TrainConfig(output_dir=tempfile.mkdtemp(dir=workdir), report_to="none", seed=config.seed)
        train.mixed_precision, train.compile = config.mixed_precision, config.compile
        nets, optims = make_networks(self.network, student), {"student": OptimConfig()}
        if kind == "scott":
            nets.critic = make_critic(nets, CriticConfig())
            optims["critic"] = critic_optim(CriticConfig(), optims["student"])
        objective = self.objective(kind, teacher)
        self.teaching = objective.teaching
        self.trainer = Trainer(train, nets, objective, optims)
        batches = text_image_batches(
            self.data, Encoders.from_pipeline(teacher), config.seed, device=self.trainer.device
        )
        self.stream = batches(0)

    def objective(self, kind: str, teacher: DiffusionPipeline) -> LCMObjective | SCottObjective:
        if kind != "scott":
            return LCMObjective(LCMConfig(), teaching_of(teacher, self.dim, LCMConfig()))
        config = SCottConfig(adversarial_start=0, adversarial_ramp=0)  # the critic is there from the first step
        return SCottObjective(config, teaching_of(teacher, self.dim, config), critic=True)

    def step(self) -> None:
        self.trainer.training_step(self.stream)

    def passes(self) -> dict[str, Action]:
        """The calls of the networks in one step, as the objective makes them, on one fixed batch."""
        nets, batch = self.trainer.nets, next(self.stream).to(self.trainer.device)
        teaching, x_t = self.teaching, torch.randn_like(batch.x0)
        cond = teaching.guiding.student(batch.cond, torch.full_like(x_t[:, 0, 0, 0], 8.0))
        t = teaching.times[torch.randint(len(teaching.times), (batch.size,))]
        t = as_like(t, x_t) if t.is_floating_point() else t.to(x_t.device)
        twice = torch.cat([x_t, x_t]), torch.cat([t, t])
        both = {name: torch.cat([batch.cond[name], batch.uncond[name]]) for name in batch.cond}
        autocast = self.trainer.accelerator.autocast

        def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            with autocast():
                return teaching.call(network, x_t, t, cond).float()

        @torch.no_grad()
        def ask_teacher() -> None:
            for _ in range(SCottConfig().solver_steps if nets.critic else 1):
                call(nets.teacher, *twice, both)

        def judge() -> None:
            """The critic's turn, which draws fakes of its own, and its answer to the student's."""
            with torch.no_grad():
                call(nets.student, x_t, t, cond)
            same = {name: torch.cat([value, value]) for name, value in batch.cond.items()}
            with autocast():
                nets.critic(*twice, same).mean().backward()
                x = x_t.clone().requires_grad_()
                torch.autograd.grad(nets.critic(x, t, batch.cond).mean(), x)

        return {
            "student": lambda: call(nets.student, x_t, t, cond).backward(x_t),
            "target": torch.no_grad()(lambda: call(nets.target or nets.student, x_t, t, cond)),
            "teacher": ask_teacher,
        } | ({"critic": judge} if nets.critic else {})


def the_teacher(config: StepConfig) -> DiffusionPipeline:
    return load_teacher(TeacherConfig(config.pretrained_teacher_model))


def data_config(config: StepConfig, workdir: Path) -> DataConfig:
    names = ("train_data_dir", "resolution", "max_train_samples", "train_batch_size")
    shared = {name: getattr(config, name) for name in names}
    return DataConfig(**shared, center_crop=True, latent_cache_dir=str(workdir / "latents"))
