"""The scheduler of students in EDM's coordinates, as short as can be."""

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, LCMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from cm_diffusers.diffusion.preconditioning import BOUNDARY_SCALINGS, NOISE_CONDITIONINGS, input_scaling, vp_scalings
from cm_diffusers.diffusion.times import karras_grid


class StudentScheduler(SchedulerMixin, ConfigMixin):
    """Consistency sampling (2303.01469, Algorithm 1) in x = x0 + sigma noise, by all that the scheduler's config says.

    Such students are saved with `CMStochasticIterativeScheduler`, which reads a part of the fields and keeps the others.
    They mean what they mean to `EDMConsistencyScheduler` of cm_diffusers, whose steps these are.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 40,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        s_noise: float = 1.0,
        rho: float = 7.0,
        clip_denoised: bool = True,
        boundary_scalings: str = "cm",
        noise_conditioning: str = "adm",
        gamma: float = 1.0,
        network: str = "edm",
        prediction_type: str = "epsilon",
        num_vp_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        recommended_sigmas: list[float] | None = None,
    ) -> None:
        self.grid = karras_grid(num_train_timesteps, sigma_min, sigma_max, rho).flip(0).tolist()
        self.floor = sigma_min if boundary_scalings == "cm" else 0.0  # the noise level of f
        if network == "vp":
            betas = (beta_start, beta_end, beta_schedule, trained_betas)
            stock = LCMScheduler(num_vp_timesteps, *betas, rescale_betas_zero_snr=rescale_betas_zero_snr)
            signal = stock.alphas_cumprod[stock.alphas_cumprod > 0].double()
            self.log_sigmas = -torch.logit(signal).numpy() / 2

    @classmethod
    def of(cls, scheduler: SchedulerMixin, **changes: Any) -> "StudentScheduler":
        """Samples by the config of a scheduler."""
        fields = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        return cls.from_config(fields, **changes)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the noise levels: some of the grid, its places counted from the end, these, or the recommended ones."""
        points = len(self.grid)
        if num_inference_steps is None and timesteps is None and sigmas is None:
            sigmas = self.config.recommended_sigmas
        if sum(way is not None for way in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("Give exactly one of num_inference_steps, timesteps and sigmas.")
        if num_inference_steps is not None:
            if not isinstance(num_inference_steps, Integral) or not 1 <= num_inference_steps <= points:
                raise ValueError(
                    f"num_inference_steps must be a whole number from 1 to {points}, got {num_inference_steps!r}."
                )
            sigmas = self.grid[:: points // num_inference_steps][:num_inference_steps]
        elif timesteps is not None:
            if not all(isinstance(place, Integral) and 0 <= place < points for place in timesteps):
                raise ValueError(f"timesteps must be whole numbers from {points - 1} down to 0, got {timesteps}.")
            sigmas = [self.grid[place] for place in reversed(timesteps)]
        levels, low, high = [float(sigma) for sigma in sigmas], self.config.sigma_min, self.config.sigma_max
        known = bool(levels) and all(low <= level <= high for level in levels)
        if not known or any(a <= b for a, b in pairwise(levels)):
            raise ValueError(f"Noise levels must descend, from at most {high} to at least {low}; got {levels}.")
        self.sigmas = torch.tensor([*levels, self.floor], dtype=torch.float64)
        times = self._told(self.sigmas[:-1])
        self.timesteps = times.to(device, torch.float32) if str(device).startswith("mps") else times.to(device)
        self.init_noise_sigma, self.num_inference_steps, self.done = levels[0], len(levels), 0

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """What the network is shown `(B, ...)`."""
        std = 1.0 if self.config.network == "vp" else self.config.sigma_data
        return sample * float(input_scaling(self.sigmas[self.done], std))

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, Tensor]:
        """The next step of the schedule; all tensors `(B, ...)`: f = c_skip x + c_out F, and noise to the level after it."""
        sigma, following = self.sigmas[self.done], self.sigmas[self.done + 1]
        x = sample.to(torch.float32 if sample.device.type == "mps" else torch.float64)
        denoised = result = self._consistency(model_output.to(x.dtype), sigma, x)
        self.done += 1
        if self.done < self.num_inference_steps:
            gamma = self.config.gamma
            fresh = (1 - (1 - gamma) ** 2) ** 0.5 * self.config.s_noise
            above, level = ((float(one) ** 2 - self.floor**2) ** 0.5 for one in (sigma, following))
            if gamma < 1:
                result = result + level * (1 - gamma) / above * (x - denoised)
            if fresh > 0:
                noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
                result = result + level * fresh * noise.to(x.dtype)
        output = LCMSchedulerOutput(result.to(sample.dtype), denoised.to(sample.dtype))
        return output if return_dict else output.to_tuple()

    def _told(self, sigmas: Tensor) -> Tensor:
        """What the network is told of noise levels `(N,)`: its own time, or a logarithm."""
        if self.config.network == "vp":
            times = np.interp(sigmas.log().numpy(), self.log_sigmas, np.arange(len(self.log_sigmas)))
            return torch.as_tensor(times)
        return NOISE_CONDITIONINGS[self.config.noise_conditioning](sigmas)

    def _consistency(self, output: Tensor, sigma: Tensor, x: Tensor) -> Tensor:
        """f(x, sigma), exactly x at sigma = floor."""
        on_x, on_output = 0.0, 1.0  # F = on_x x + on_output output
        if self.config.network == "vp":
            on_x, on_output = map(float, vp_scalings(sigma, self.config.sigma_data, self.config.prediction_type))
        scalings = BOUNDARY_SCALINGS[self.config.boundary_scalings]
        c_skip, c_out = map(float, scalings(sigma, self.config.sigma_min, self.config.sigma_data))
        f = (c_skip + c_out * on_x) * x + c_out * on_output * output
        return f.clamp(-1, 1) if self.config.clip_denoised else f
