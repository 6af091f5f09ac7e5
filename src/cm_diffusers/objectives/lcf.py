"""Latent consistency fine-tuning: an LCM learns from own data, without a teacher (LCF of 2310.04378, Sec. 4.4)."""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.distances import DISTANCES
from cm_diffusers.diffusion.process import diffuse
from cm_diffusers.diffusion.rng import rewind_rng
from cm_diffusers.diffusion.teaching import Teaching
from cm_diffusers.errors import UserError
from cm_diffusers.types import Batch, Loss, Networks, Progress


@dataclass
class LCFConfig:
    """How the student is compared with itself; its time grid and scalings are those it was distilled with."""

    w_min: float | None = HfArg(
        default=None,
        help="Least guidance w = guidance_scale - 1 shown to a student that takes it; its own if not given.",
    )
    w_max: float | None = HfArg(default=None, help="Greatest guidance w; the student's own if not given.")
    loss_type: Literal["huber", "l2"] = HfArg(default="huber", help="Distance between student and target.")


class LCFObjective:
    """A jump from t agrees with the target's jump from s, both from the same data and the same noise.

    On average this is distillation from an exact teacher of the data with DDIM steps, without guidance: no w enters
    the pair, so a student with a guidance input learns the data's own distribution for every w. The loss does not fall
    to zero and says little about progress.

    Args:
        config: See `LCFConfig`; w_min and w_max given where the student takes guidance.
        teaching: Of the student, on the grid and with the scalings that it was distilled with, its scheduler's.
    """

    def __init__(self, config: LCFConfig, teaching: Teaching) -> None:
        if teaching.guiding.told is not None and config.w_min > config.w_max:
            raise UserError(f"--w_min {config.w_min} is above --w_max {config.w_max}; swap them.")
        if config.loss_type not in DISTANCES:
            raise UserError(f"Unknown --loss_type {config.loss_type!r}; one of {', '.join(DISTANCES)}.")
        if teaching.starts_from_noise and teaching.prediction_type == "epsilon":
            raise UserError(
                "The student's schedule has zero terminal SNR: its last timestep holds no signal, which an epsilon "
                "prediction cannot read; this needs a v-prediction or sample student."
            )
        self.config, self.teaching = config, teaching
        self.players = {"student": self}

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        x0, teaching, w, logs = batch.x0, self.teaching, None, {}
        t, s = teaching.pairs(len(x0))
        if teaching.guiding.told is not None:
            w = torch.empty(len(x0), device=x0.device).uniform_(self.config.w_min, self.config.w_max)
            logs = {"w": w.mean()}
        noise = torch.randn_like(x0)
        with torch.no_grad(), rewind_rng(x0.device):  # the student draws the same dropout masks
            x_s = diffuse(teaching.process, x0, noise, s)
            target = teaching.jump(nets.target or nets.student, x_s, s, batch.cond, w)
        online = teaching.jump(nets.student, diffuse(teaching.process, x0, noise, t), t, batch.cond, w)
        return Loss(DISTANCES[self.config.loss_type](online, target).mean(), logs)
