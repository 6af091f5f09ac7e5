"""Few-step sampling of consistency models in EDM's coordinates, x = x0 + sigma noise, at any noise levels."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import LCMScheduler, SchedulerMixin  # noqa: F401 (diffusers looks for it where saved pipelines lead)
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from cm_diffusers.diffusion.preconditioning import BOUNDARY_SCALINGS, NOISE_CONDITIONINGS
from cm_diffusers.diffusion.times import karras_grid
from cm_diffusers.errors import UserError
from cm_diffusers.schedulers.noise_levels import EDMKind, NetworkKind, VPKind, at_places, checked, strided
from cm_diffusers.schedulers.stepping import ToldScheduler, as_level, on, one_of, refuse_gamma


class EDMConsistencyScheduler(ToldScheduler):
    """Multistep consistency sampling (2303.01469, Algorithm 1) at any descending noise levels.

    A step from sigma to sigma' denoises, f = c_skip x + c_out F, and noises again::

        x' = f + e' ((1 - gamma) (x - f) / e + sqrt(1 - (1 - gamma)^2) s_noise z),    e^2 = sigma^2 - floor^2

    where f has the noise level floor: sigma_min with the boundary "cm", 0 with "edm". gamma = 1 is the paper's
    sampler, gamma = 0 is deterministic; the last step adds no noise. Fresh noise z keeps the law of the data; reused
    noise depends on f, so an exact consistency function ends with too much variance below gamma = 1.

    With the defaults this is `CMStochasticIterativeScheduler` step for step, and the config of either makes the other.
    "cm" is c_skip = d^2 / ((sigma - sigma_min)^2 + d^2) and c_out = d (sigma - sigma_min) / sqrt(sigma^2 + d^2) with
    d = sigma_data: the shift is not under the root. So have it the paper (Appendix C), the authors' code in torch and
    in JAX, which trained the published checkpoints, and diffusers. "edm" has no shift (2406.14548, in training).

    A network of kind "edm" is shown x / sqrt(sigma^2 + sigma_data^2) and told `noise_conditioning` of sigma, which is
    also what `timesteps` holds; it answers with F, or with -F if it predicts v, as Stable Video Diffusion. One of kind
    "vp" is a diffusion model of Stable Diffusion's kind that was made a consistency model
    (`cm_diffusers.diffusion.views.VPView`): it is shown x / sqrt(1 + sigma^2) and told its own time, or "trigflow".

    Args:
        num_train_timesteps: Points of the Karras grid that numbers of steps and indices refer to.
        sigma_data: Standard deviation of the data, as in training.
        s_noise: Factor of fresh noise.
        rho: Exponent of the grid.
        clip_denoised: Clip f to [-1, 1]; not for latents.
        boundary_scalings: "cm" or "edm", as in training.
        noise_conditioning: "adm" (250 ln sigma, as `UNet2DModel` of the published checkpoints), "edm" (ln sigma / 4) or
            "trigflow" (atan(sigma / sigma_data)).
        gamma: The share of fresh noise, 0 to 1.
        network: "edm" or "vp".
        prediction_type: What the network's output is: "epsilon", "v_prediction" or "sample"; of kind "edm" F is
            "epsilon", -F "v_prediction". The fields below are for "vp".
        num_vp_timesteps: How many times the network knows.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: As in its scheduler.
        recommended_sigmas: What `set_timesteps` takes when it is given none, e.g. [80.0, 0.821].

    Attributes:
        sigmas: The noise levels `(steps + 1,)` in float64, the last is that of the result; at first the whole grid.
        noise_sampler: As in `ConsistencyScheduler`.
    """

    _compatibles = ["CMStochasticIterativeScheduler"]
    _level_name = "sigma"

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
        trained_betas: np.ndarray | list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        recommended_sigmas: list[float] | None = None,
    ) -> None:
        one_of("boundary_scalings", boundary_scalings, tuple(BOUNDARY_SCALINGS))
        one_of("noise_conditioning", noise_conditioning, tuple(NOISE_CONDITIONINGS))
        one_of("network", network, ("edm", "vp"))
        one_of("prediction_type", prediction_type, ("epsilon", "v_prediction", "sample"))
        if not 0 < sigma_min < sigma_max < math.inf or not 0 < sigma_data < math.inf:
            found = f"{sigma_min}, {sigma_max} and {sigma_data}"
            raise UserError(f"sigma_min, the larger sigma_max and sigma_data must be positive, got {found}.")
        if network == "vp":
            betas = (beta_start, beta_end, beta_schedule, trained_betas)
            stock = LCMScheduler(num_vp_timesteps, *betas, rescale_betas_zero_snr=rescale_betas_zero_snr)
            self._kind: NetworkKind = VPKind.of(sigma_data, prediction_type, stock.alphas_cumprod, noise_conditioning)
            self._kind.check(sigma_min, sigma_max)
        else:
            self._kind = EDMKind(sigma_data, noise_conditioning, prediction_type)
        self._floor = sigma_min if boundary_scalings == "cm" else 0.0
        self._grid = karras_grid(num_train_timesteps, sigma_min, sigma_max, rho).flip(0).tolist()
        if recommended_sigmas is not None:
            checked(recommended_sigmas, sigma_min, sigma_max)
        self._prepare(gamma)
        self._set_schedule(self._grid, device=None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        gamma: float | None = None,
    ) -> None:
        """Choose the noise levels of the next sampling run; without any, those the student recommends.

        Args:
            num_inference_steps: So many levels, spaced on the training grid as in `CMStochasticIterativeScheduler`.
            timesteps: These places on the grid instead, where 0 is sigma_max; listed in descending order, as there.
            sigmas: Or these levels themselves, descending.
            gamma: For this run, instead of the config's.

        Raises:
            ValueError: An argument is out of range, or not exactly one way to choose is given.
        """
        if num_inference_steps is None and timesteps is None and sigmas is None:
            sigmas = self.config.recommended_sigmas
        if sum(way is not None for way in (num_inference_steps, timesteps, sigmas)) != 1:
            raise UserError("Give exactly one of num_inference_steps, timesteps and sigmas.")
        if sigmas is not None:
            schedule = checked(sigmas, self.config.sigma_min, self.config.sigma_max)
        elif timesteps is not None:
            schedule = at_places(self._grid, timesteps)
        else:
            schedule = strided(self._grid, num_inference_steps)
        self.gamma = refuse_gamma(self.config.gamma if gamma is None else gamma)
        self.num_inference_steps = len(schedule)
        self.custom_timesteps = num_inference_steps is None
        self._set_schedule(schedule, device)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x `(B, ...)` from clean data and noise `(B, ...)` at `timesteps` `(B,)`, of the schedule or not.

        Raises:
            ValueError: The timesteps are integers.
        """
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        sigma = self._levels_at(timesteps).to(dtype).to(original_samples.device)
        return (original_samples + sigma.reshape(-1, *[1] * (noise.ndim - 1)) * noise).to(original_samples.dtype)

    def target_timestep(self, timestep: float | Tensor) -> Tensor:
        """What a network that is told where its jump ends (2310.02279) is told at the next step: in float64, for all alike.

        That is the level (1 - gamma) sigma', from which fresh noise leads to sigma'; of the data it is told sigma_min.
        """
        index = self._step_index
        if index is None:
            index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        end = 0.0 if index + 1 == len(self._schedule) else (1 - self.gamma) * self._schedule[index + 1]
        return self.sigma_to_t(max(end, self.config.sigma_min))

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation that sampling starts from: the first noise level; with -F, of data at that level."""
        return self._kind.start(self._schedule[0])

    def _set_schedule(self, schedule: list[float], device: str | torch.device | None) -> None:
        self._restart(schedule)
        self.sigmas = torch.tensor([*schedule, self._floor], dtype=torch.float64)
        self.timesteps = on(device, self.sigma_to_t(self.sigmas[:-1]))

    def _told(self, levels: Tensor) -> Tensor:
        return self._kind.times(levels)

    def _levels(self, told: Tensor) -> Tensor:
        return self._kind.sigmas(told)

    def _levels_of(self, sigmas: Tensor) -> Tensor:
        return sigmas

    def _shown(self, level: Tensor) -> Tensor:
        return self._kind.shown(level)

    def _denoise(self, output: Tensor, sigma: float, x: Tensor) -> Tensor:
        """f(x, sigma) = c_skip x + c_out F."""
        on_x, on_output = self._kind.as_edm(as_level(sigma))
        scalings = BOUNDARY_SCALINGS[self.config.boundary_scalings]
        c_skip, c_out = map(float, scalings(as_level(sigma), self.config.sigma_min, self.config.sigma_data))
        f = (c_skip + c_out * on_x) * x + c_out * on_output * output
        return f.clamp(-1, 1) if self.config.clip_denoised else f

    def _move(self, denoised: Tensor, x: Tensor, index: int, draw: Callable[[], Tensor]) -> Tensor:
        """The sample at the next level."""
        if index + 1 == len(self._schedule):
            return denoised
        above, following = ((self._schedule[i] ** 2 - self._floor**2) ** 0.5 for i in (index, index + 1))
        reused, fresh = 1 - self.gamma, (1 - (1 - self.gamma) ** 2) ** 0.5 * self.config.s_noise
        result = denoised
        if reused > 0:
            result = result + following * reused / above * (x - denoised)
        return result + following * fresh * draw() if fresh > 0 else result
