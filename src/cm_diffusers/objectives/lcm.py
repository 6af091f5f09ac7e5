"""Latent consistency distillation: LCM (2310.04378, Alg. 1) and LCM-LoRA (2311.05556)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.denoisers import as_denoiser
from cm_diffusers.diffusion.distances import DISTANCES
from cm_diffusers.diffusion.guidance import guidance_embedding, guide
from cm_diffusers.diffusion.preconditioning import lcm_scalings
from cm_diffusers.diffusion.process import DiscreteVP, append_dims, diffuse
from cm_diffusers.diffusion.rng import rewind_rng
from cm_diffusers.diffusion.solvers import SOLVERS
from cm_diffusers.diffusion.times import sample_solver_pairs, solver_grid
from cm_diffusers.errors import UserError
from cm_diffusers.types import Batch, Loss, Networks, Progress


@dataclass
class LCMConfig:
    """How the consistency target is formed."""

    num_ddim_timesteps: int = HfArg(default=50, help="Points of the time grid; the sampler must know them.")
    w_min: float = HfArg(default=2.0, help="Least guidance w; w = guidance_scale - 1, so 0 means none.")
    w_max: float = HfArg(default=14.0, help="Greatest guidance w.")
    solver: Literal["ddim", "heun", "dpm_2s"] = HfArg(
        default="ddim", help="The teacher's ODE step; heun and dpm_2s cost two."
    )
    loss_type: Literal["huber", "l2"] = HfArg(default="huber", help="Distance between student and target.")
    timestep_scaling_factor: float = HfArg(default=10.0, help="Scale of t in the boundary scalings.")


class LCMObjective:
    """A jump from t agrees with the target's jump from where the guided teacher gets in one solver step.

    Args:
        config: See `LCMConfig`.
        process: The teacher's noising process.
        prediction_type: What teacher and student predict.
        guidance_embedding_dim: Size of the student's guidance embedding, or None where it has none (LoRA).
    """

    def __init__(
        self, config: LCMConfig, process: DiscreteVP, prediction_type: str, guidance_embedding_dim: int | None
    ) -> None:
        if config.w_min > config.w_max:
            raise UserError(f"--w_min {config.w_min} is above --w_max {config.w_max}; swap them.")
        for kind, choice, known in (("solver", config.solver, SOLVERS), ("loss_type", config.loss_type, DISTANCES)):
            if choice not in known:
                raise UserError(f"Unknown --{kind} {choice!r}; one of {', '.join(known)}.")
        if process.alphas_cumprod.min() <= 0 and (prediction_type == "epsilon" or config.solver != "ddim"):
            raise UserError(
                "The teacher has zero terminal SNR: its last timestep holds no signal, which needs a v-prediction or sample "
                f"teacher and --solver ddim; this is {prediction_type} with {config.solver}."
            )
        self.config, self.process, self.prediction_type = config, process, prediction_type
        self.guidance_embedding_dim = guidance_embedding_dim
        self.grid = solver_grid(process.num_train_timesteps, config.num_ddim_timesteps)
        self.players = {"student": self}

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        online, target, w = self.pair(nets, batch)
        return Loss(self.distance(online, target), {"w": w.mean()})

    def distance(self, online: Tensor, target: Tensor) -> Tensor:
        return DISTANCES[self.config.loss_type](online, target).mean()  # Algorithm 1

    def pair(self, nets: Networks, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The student's jump from t, with a gradient, the target's from s, each `(B, ...)`, and the guidance w `(B,)`."""
        config, x0, device = self.config, batch.x0, batch.x0.device
        t, s = sample_solver_pairs(len(x0), self.grid)
        w = torch.empty(len(x0), device=device).uniform_(config.w_min, config.w_max)
        x_t = diffuse(self.process, x0, torch.randn_like(x0), t)
        with torch.no_grad():  # first, so that its activations are gone before the student's are kept
            denoise = as_denoiser(nets.teacher, self.process, self.prediction_type)
            guided = guide(denoise, batch.cond, batch.uncond, w)
            x_s = SOLVERS[config.solver](guided, self.process, x_t, t, s)  # Sec. 4.2 and 4.3
            with rewind_rng(device):  # the student draws the same dropout masks
                target = self.consistency(nets.target or nets.student, x_s, s, batch.cond, w)
        return self.consistency(nets.student, x_t, t, batch.cond, w), target, w

    def consistency(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor], w: Tensor) -> Tensor:
        """f(x_t, t) = c_skip x_t + c_out x0 (Sec. 4.1), `(B, ...)`, as `LCMScheduler.step` computes it."""
        if self.guidance_embedding_dim is not None:
            cond = cond | {"timestep_cond": guidance_embedding(w, self.guidance_embedding_dim)}
        x0 = as_denoiser(network, self.process, self.prediction_type)(x_t, t, cond).x0
        c_skip, c_out = lcm_scalings(t, self.config.timestep_scaling_factor)
        return append_dims(c_skip, x_t) * x_t + append_dims(c_out, x_t) * x0
