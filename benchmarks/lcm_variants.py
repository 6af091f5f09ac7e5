"""LCM with one thing changed: what `studies/lcm_defaults.toml`, `lcm_bundled.toml` and `lcm_v.toml` compare, and no flag of the package unless it wins."""

import cm_diffusers.engine.early
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from cm_diffusers.data.clip_config import ClipConfig
from cm_diffusers.data.generated import GenerationConfig
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.diffusion.distances import huber, huber_c, l2, pseudo_huber
from cm_diffusers.diffusion.guidance import combine_linear
from cm_diffusers.diffusion.process import Prediction, diffuse
from cm_diffusers.diffusion.solvers import ddim_step
from cm_diffusers.diffusion.teaching import Teaching
from cm_diffusers.engine.cli import parse_configs, refuse_changed, run
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.models.families.base import network_of
from cm_diffusers.models.students import StudentConfig
from cm_diffusers.models.teachers import TeacherConfig, load_teacher
from cm_diffusers.objectives.lcm import LCMConfig
from cm_diffusers.publishing.hub import HubConfig
from cm_diffusers.tasks.callbacks import ValidationConfig
from cm_diffusers.tasks.teachings import teaching_of
from cm_diffusers.tasks.text_to_image import distill
from cm_diffusers.tasks.watching import WatchConfig
from cm_diffusers.types import Batch, Loss, Networks, Progress


@dataclass
class VariantConfig(LCMConfig):
    """LCM's flags, and what is changed."""

    distance: Literal["huber", "sample_huber", "l2", "adaptive"] = HfArg(
        default="huber",
        help="LCM's, the pseudo-Huber of a sample's norm (2310.14189), l2, or l2 of a sample over its own value + 0.01.",
    )
    huber_c: float = HfArg(default=0.001, help="c of LCM's distance.")
    coarse_share: float = HfArg(
        default=0.0,
        help="Share of the training, its beginning, with half of the grid's points: solver steps twice as long.",
    )
    last_ema_decay: float | None = HfArg(default=None, help="The target's rate goes from --ema_decay to this, evenly.")
    guidance_pairs: bool = HfArg(
        default=False,
        help="Two guidances of each noisy image, which share the teacher's passes; --w_min to --w_max each.",
    )
    ict_weights: bool = HfArg(
        default=False, help="Losses weighed by one over the step in noise over signal, mean 1 over the grid: iCT's."
    )


class VariedLCM:
    """`LCMObjective` with the changes of a `VariantConfig`; with none, the same to the bit."""

    def __init__(self, config: VariantConfig, teaching: Teaching, ema_decay: float) -> None:
        self.config, self.teaching, self.players = config, teaching, {"student": self}
        if config.last_ema_decay is not None:
            last = config.last_ema_decay
            self.target_decay = lambda progress: ema_decay + (last - ema_decay) * progress.step / progress.max_steps

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        config, teaching, x0 = self.config, self.teaching, batch.x0
        t, s = self.times(len(x0), progress)
        ws = [
            torch.empty(len(x0), device=x0.device).uniform_(config.w_min, config.w_max)
            for _ in range(1 + config.guidance_pairs)
        ]
        x_t = diffuse(teaching.process, x0, torch.randn_like(x0), t)
        with torch.no_grad():
            both = {name: torch.cat([batch.cond[name], batch.uncond[name]]) for name in batch.cond}
            told = teaching.denoiser(nets.teacher)(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
            branches = [Prediction(*part) for part in zip(*(values.chunk(2) for values in told), strict=True)]
            x_s = [
                ddim_step(lambda x, t, w=w: combine_linear(*branches, w, t), teaching.process, x_t, t, s) for w in ws
            ]
            n, w = len(ws), torch.cat(ws)
            cond = {name: values.repeat(n, *[1] * (values.ndim - 1)) for name, values in batch.cond.items()}
            target = teaching.jump(nets.target, torch.cat(x_s), s.repeat(n), cond, w)
        online = teaching.jump(nets.student, torch.cat([x_t] * n), t.repeat(n), cond, w)
        losses = self.distance(online, target)
        return Loss((self.weights(t, s).repeat(n) * losses if config.ict_weights else losses).mean(), {"w": w.mean()})

    def times(self, batch_size: int, progress: Progress) -> tuple[Tensor, Tensor]:
        """t and s below it, each `(B,)`; in the coarse part of the training t is every second of the grid, and s two below."""
        config, teaching = self.config, self.teaching
        if progress.step >= config.coarse_share * progress.max_steps:
            return teaching.pairs(batch_size, config.time_power)
        number = torch.randint(len(teaching.grid) // 2, (batch_size,)) * 2 + 1
        return teaching.grid[number], teaching.before[number - 1]

    def weights(self, t: Tensor, s: Tensor) -> Tensor:
        """Of the losses `(B,)`: 1 / (sigma(t) - sigma(s)) (2310.14189, Sec. 3.1), sigma the noise over the signal, mean 1 over the grid."""

        def step(t: Tensor, s: Tensor) -> Tensor:
            above, below = (process.sigma(each) / process.alpha(each) for each in (t, s))
            return above - below

        process, grid, before = self.teaching.process, self.teaching.grid, self.teaching.before
        return (1 / step(t, s) / (1 / step(grid, before)).mean()).float()

    def distance(self, online: Tensor, target: Tensor) -> Tensor:
        if self.config.distance == "sample_huber":
            return pseudo_huber(online, target, huber_c(online[0].numel())) / online[0].numel() ** 0.5
        if self.config.distance == "huber":
            return huber(online, target, self.config.huber_c)
        squared = l2(online, target)
        return squared / (squared.detach() + 0.01) if self.config.distance == "adaptive" else squared


CONFIGS = (
    TeacherConfig, StudentConfig, DataConfig, GenerationConfig, ClipConfig, VariantConfig, OptimConfig, TrainConfig,
    ValidationConfig, WatchConfig, HubConfig,
)  # fmt: skip


def main() -> None:
    source, student, _, _, _, method, optim, train, *_ = configs = parse_configs(CONFIGS, __doc__)
    refuse_changed(method, "solver loss_type", "here: the step is DDIM's, and --distance is the loss")
    seed_everything(train.seed)
    teacher = load_teacher(source, student.loaded_dtype, late=True)
    teaching = teaching_of(teacher, student.guidance_embedding_dim(network_of(teacher)), method)
    distill("lcm", teacher, VariedLCM(method, teaching, train.ema_decay), optim, configs, None)


if __name__ == "__main__":
    run(main)
