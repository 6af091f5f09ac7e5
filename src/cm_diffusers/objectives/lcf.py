"""Latent consistency fine-tuning: an LCM learns from own data, without a teacher (LCF of 2310.04378, Sec. 4.4)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.denoisers import as_denoiser
from cm_diffusers.diffusion.distances import DISTANCES
from cm_diffusers.diffusion.guidance import guidance_embedding
from cm_diffusers.diffusion.preconditioning import lcm_scalings
from cm_diffusers.diffusion.process import DiscreteVP, append_dims, diffuse
from cm_diffusers.diffusion.rng import rewind_rng
from cm_diffusers.diffusion.times import sample_solver_pairs, solver_grid
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
        process: The student's noising process.
        prediction_type: What the student predicts.
        guidance_embedding_dim: Size of the student's guidance embedding, or None where it has none.
        num_solver_steps: Points of the time grid it was distilled on: `original_inference_steps` of its scheduler.
        timestep_scaling: Scale of t in the boundary scalings, as in its scheduler.
    """

    def __init__(
        self,
        config: LCFConfig,
        process: DiscreteVP,
        prediction_type: str,
        guidance_embedding_dim: int | None,
        num_solver_steps: int = 50,
        timestep_scaling: float = 10.0,
    ) -> None:
        if guidance_embedding_dim is not None and config.w_min > config.w_max:
            raise UserError(f"--w_min {config.w_min} is above --w_max {config.w_max}; swap them.")
        if config.loss_type not in DISTANCES:
            raise UserError(f"Unknown --loss_type {config.loss_type!r}; one of {', '.join(DISTANCES)}.")
        if process.alphas_cumprod.min() <= 0 and prediction_type == "epsilon":
            raise UserError(
                "The student's schedule has zero terminal SNR: its last timestep holds no signal, which an epsilon "
                "prediction cannot read; this needs a v-prediction or sample student."
            )
        self.config, self.process, self.prediction_type = config, process, prediction_type
        self.guidance_embedding_dim, self.timestep_scaling = guidance_embedding_dim, timestep_scaling
        self.grid = solver_grid(process.num_train_timesteps, num_solver_steps)
        self.players = {"student": self}

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        x0, cond, logs = batch.x0, batch.cond, {}
        t, s = sample_solver_pairs(len(x0), self.grid)
        if self.guidance_embedding_dim is not None:
            w = torch.empty(len(x0), device=x0.device).uniform_(self.config.w_min, self.config.w_max)
            cond = cond | {"timestep_cond": guidance_embedding(w, self.guidance_embedding_dim)}
            logs = {"w": w.mean()}
        noise = torch.randn_like(x0)
        with torch.no_grad(), rewind_rng(x0.device):  # the student draws the same dropout masks
            target = self.consistency(nets.target or nets.student, diffuse(self.process, x0, noise, s), s, cond)
        online = self.consistency(nets.student, diffuse(self.process, x0, noise, t), t, cond)
        return Loss(DISTANCES[self.config.loss_type](online, target).mean(), logs)

    def consistency(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """f(x_t, t) = c_skip x_t + c_out x0 (Sec. 4.1), `(B, ...)`, as `LCMScheduler.step` computes it."""
        x0 = as_denoiser(network, self.process, self.prediction_type)(x_t, t, cond).x0
        c_skip, c_out = lcm_scalings(t, self.timestep_scaling)
        return append_dims(c_skip, x_t) * x_t + append_dims(c_out, x_t) * x0
