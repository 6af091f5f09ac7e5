"""How likely a diffusion model finds data, by its probability-flow ODE (2011.13456, Sec. 4.3) in EDM's coordinates."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.guidance import Denoiser
from cm_diffusers.errors import UserError
from cm_diffusers.ranges import check_ranges


RHO = 7.0  # the solver's time is sigma^(1 / rho), in which EDM's flow bends about evenly
LEVELS = 127.5  # of 8 bits, in the unit of pixels in [-1, 1]


@dataclass
class LikelihoodConfig:
    """What is measured, and how exactly."""

    output_dir: str = HfArg(help="Where table.md and table.json are written.")
    num_images: int = HfArg(default=1000, help="Images to average over, none twice before all were taken.")
    sigma_min: float = HfArg(default=0.002, help="Noise level whose density is taken for the data's.")
    sigma_max: float = HfArg(default=80.0, help="Noise level that is taken for pure noise.")
    tolerance: float = HfArg(
        default=1e-3, help="Relative and absolute tolerance of the adaptive Runge-Kutta solver of order 5 (4)."
    )
    num_probes: int = HfArg(
        default=1, help="Random directions in which the divergence is estimated for each image; more, less noise."
    )
    seed: int = HfArg(default=0, help="Seed of the images' order, dequantization and directions.")

    def __post_init__(self) -> None:
        check_ranges(self)


def log_likelihood(
    denoise: Denoiser, x: Tensor, sigma_min: float, sigma_max: float, tolerance: float, generator: torch.Generator
) -> tuple[Tensor, int]:
    """ln p `(B,)` in float64 of data `(B, ...)`, and how often the denoiser was asked.

    ln p(x) = ln N(x_T; 0, sigma_max^2) + the integral of the divergence of dx / dsigma = noise along the flow (Eq. 39), the
    divergence by Hutchinson's estimator in a direction of signs (Eq. 40).

    Args:
        denoise: In the process `EDM`; differentiable in x.
        tolerance: Relative and absolute.
        generator: Draws the directions, on the CPU.
    """
    shape, size = x.shape, x[0].numel()
    probe = (torch.randint(2, shape, generator=generator) * 2 - 1).to(x)
    begin, end = sigma_min ** (1 / RHO), sigma_max ** (1 / RHO)

    def slope(tau: float, state: np.ndarray) -> np.ndarray:
        sigma = torch.full((shape[0],), tau**RHO, dtype=torch.float64)
        at = torch.from_numpy(state[: x.numel()]).to(x).reshape(shape).requires_grad_()
        with torch.enable_grad():
            noise = denoise(at, sigma).noise
            (pulled,) = torch.autograd.grad(noise, at, probe.to(noise))
        divergence = (pulled * probe).flatten(1).sum(1)
        moved = torch.cat([noise.detach().flatten(), divergence]).double().cpu().numpy()
        return moved * RHO * tau ** (RHO - 1)

    start = np.concatenate([x.double().cpu().numpy().ravel(), np.zeros(len(x))])
    path = solve_ivp(slope, (begin, end), start, "RK45", t_eval=[end], rtol=tolerance, atol=tolerance)
    if not path.success:
        raise UserError(f"The probability-flow ODE could not be solved to --tolerance {tolerance}: {path.message}")
    final = torch.from_numpy(path.y[:, -1])
    noise, integral = final[: x.numel()].reshape(len(x), size), final[x.numel() :]
    prior = -noise.square().sum(1) / (2 * sigma_max**2) - size * math.log(sigma_max * math.sqrt(2 * math.pi))
    return prior + integral, path.nfev


def bits_per_dimension(log_p: Tensor, size: int, levels: float = 1.0) -> Tensor:
    """-ln p / (size ln 2), of values that are told apart `levels` times a unit: `LEVELS` for pixels, 1 for a density's."""
    return -log_p / (size * math.log(2)) + math.log2(levels)


def dequantized(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels `(B, ...)` of 8 bits in [-1, 1], each somewhere within its level (1511.01844, Sec. 3.1)."""
    return x + ((torch.rand(x.shape, generator=generator) - 0.5) / LEVELS).to(x)
