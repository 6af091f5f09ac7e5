"""Few-step sampling of consistency models in EDM's coordinates, x = x0 + sigma noise, at any noise levels."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import ConfigMixin, LCMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.import_utils import DummyObject
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from cm_diffusers.diffusion.preconditioning import BOUNDARY_SCALINGS, NOISE_CONDITIONINGS
from cm_diffusers.diffusion.times import karras_grid
from cm_diffusers.errors import UserError
from cm_diffusers.schedulers.noise_levels import EDMKind, NetworkKind, VPKind, at_places, checked, strided
from cm_diffusers.schedulers.scheduling_consistency import (
    ConsistencySchedulerOutput,
    NoiseSampler,
    _checked_gamma,
    _one_of,
)


class EDMConsistencyScheduler(SchedulerMixin, ConfigMixin):
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
        noise_conditioning: "adm" (250 ln sigma, as published networks), "edm" (ln sigma / 4) or "trigflow" (atan(sigma / d)).
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
        trained_betas: np.ndarray | list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        recommended_sigmas: list[float] | None = None,
    ) -> None:
        _one_of("boundary_scalings", boundary_scalings, tuple(BOUNDARY_SCALINGS))
        _one_of("noise_conditioning", noise_conditioning, tuple(NOISE_CONDITIONINGS))
        _one_of("network", network, ("edm", "vp"))
        _one_of("prediction_type", prediction_type, ("epsilon", "v_prediction", "sample"))
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
        self.gamma = _checked_gamma(gamma)
        self.noise_sampler: NoiseSampler | None = None
        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
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
        self.gamma = _checked_gamma(self.config.gamma if gamma is None else gamma)
        self.num_inference_steps = len(schedule)
        self.custom_timesteps = num_inference_steps is None
        self._set_schedule(schedule, device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
    ) -> ConsistencySchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the schedule: denoise, then noise again to the next level.

        Args:
            model_output: `(B, ...)`, the network's answer to `scale_model_input` of the sample.
            timestep: One of `timesteps`. It finds the first step's place; the steps after it follow in order.
            sample: x `(B, ...)`; both results have its dtype, the arithmetic is in float64.
        """
        index = self._enter(timestep)
        x = sample.to(torch.float32 if sample.device.type == "mps" else torch.float64)
        denoised = self._denoise(model_output.to(x.dtype), self._schedule[index], x)
        prev_sample = self._noise_again(denoised, x, index, sample, generator)
        self._step_index += 1
        result = (prev_sample.to(sample.dtype), denoised.to(sample.dtype))
        return ConsistencySchedulerOutput(*result) if return_dict else result

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """What the network is shown: c_in x `(B, ...)`, at the next step's level, before the first at the timestep's."""
        begun = self._step_index is not None and self._step_index < len(self._schedule)
        sigma = _level(self._schedule[self._step_index]) if begun else self._sigmas_at(torch.as_tensor(timestep))
        return sample * float(self._kind.shown(sigma))

    def sigma_to_t(self, sigmas: float | Sequence[float] | Tensor) -> Tensor:
        """What the network is told of noise levels, of the schedule or not, in float64."""
        return self._kind.times(torch.as_tensor(sigmas, dtype=torch.float64).cpu())

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x `(B, ...)` from clean data and noise `(B, ...)` at `timesteps` `(B,)`, of the schedule or not.

        Raises:
            ValueError: The timesteps are integers.
        """
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        sigma = self._sigmas_at(timesteps).to(dtype).to(original_samples.device)
        return (original_samples + sigma.reshape(-1, *[1] * (noise.ndim - 1)) * noise).to(original_samples.dtype)

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation that sampling starts from: the first noise level; with -F, of data at that level."""
        return self._kind.start(self._schedule[0])

    @property
    def step_index(self) -> int | None:
        """The next step's place in the schedule, None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where the first step starts, None where its timestep tells."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this place of the schedule, as image-to-image pipelines do."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """The place of a timestep in the schedule.

        Raises:
            ValueError: It is an integer, or not there.
        """
        sigma = self._sigmas_at(torch.as_tensor(timestep)).item()
        for index, level in enumerate(self._schedule):
            if math.isclose(sigma, level, rel_tol=1e-4):  # a timestep may have passed through float32
                return index
        raise UserError(
            f"Timestep {float(timestep):g} (sigma {sigma:g}) is not in the schedule of sigmas {self._schedule}; pass one "
            "of scheduler.timesteps, or call set_timesteps."
        )

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @classmethod
    def _get_compatibles(cls) -> list[type[SchedulerMixin]]:
        """Contains this class even where it is not registered, and none whose dependencies are missing."""
        return [cls, *(c for c in super()._get_compatibles() if c is not cls and not isinstance(c, DummyObject))]

    def _set_schedule(self, schedule: list[float], device: str | torch.device | None) -> None:
        self._schedule = schedule
        self.sigmas = torch.tensor([*schedule, self._floor], dtype=torch.float64)
        times = self.sigma_to_t(self.sigmas[:-1])
        self.timesteps = times.to(device, torch.float32) if str(device).startswith("mps") else times.to(device)
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def _enter(self, timestep: float | Tensor) -> int:
        """The place of the step that begins."""
        _refuse_integers(torch.as_tensor(timestep))
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if self._step_index >= len(self._schedule):
            raise UserError(f"All {len(self._schedule)} steps are done; call set_timesteps to start again.")
        return self._step_index

    def _denoise(self, output: Tensor, sigma: float, x: Tensor) -> Tensor:
        """f(x, sigma) = c_skip x + c_out F."""
        on_x, on_output = self._kind.as_edm(_level(sigma))
        scalings = BOUNDARY_SCALINGS[self.config.boundary_scalings]
        c_skip, c_out = map(float, scalings(_level(sigma), self.config.sigma_min, self.config.sigma_data))
        f = (c_skip + c_out * on_x) * x + c_out * on_output * output
        return f.clamp(-1, 1) if self.config.clip_denoised else f

    def _noise_again(
        self, denoised: Tensor, x: Tensor, index: int, sample: Tensor, generator: Generator | list[Generator] | None
    ) -> Tensor:
        """The sample at the next level."""
        if index + 1 == len(self._schedule):
            return denoised
        above, following = ((self._schedule[i] ** 2 - self._floor**2) ** 0.5 for i in (index, index + 1))
        reused, fresh = 1 - self.gamma, (1 - (1 - self.gamma) ** 2) ** 0.5 * self.config.s_noise
        result = denoised
        if reused > 0:
            result = result + following * reused / above * (x - denoised)
        if fresh > 0:
            result = result + following * fresh * self._draw(sample, generator).to(x.dtype)
        return result

    def _draw(self, sample: Tensor, generator: Generator | list[Generator] | None) -> Tensor:
        """Fresh noise `(B, ...)` in the dtype of the sample: what a seed draws depends on it."""
        if self.noise_sampler is None:
            return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        noise = self.noise_sampler(sample.shape, generator, sample.device, sample.dtype)
        if noise.shape != sample.shape:
            raise UserError(f"noise_sampler must return noise of {tuple(sample.shape)}, got {tuple(noise.shape)}.")
        return noise

    def _sigmas_at(self, timesteps: Tensor) -> Tensor:
        _refuse_integers(timesteps)
        return self._kind.sigmas(timesteps.cpu().double())


def _level(sigma: float) -> Tensor:
    return torch.tensor(sigma, dtype=torch.float64)


def _refuse_integers(timesteps: Tensor) -> None:
    if not timesteps.is_floating_point():
        raise UserError(
            "Timesteps of EDMConsistencyScheduler are what the network is told of the noise, not integer indices; pass "
            "entries of scheduler.timesteps."
        )
