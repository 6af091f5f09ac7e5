# Written by `make single-files` in cm_diffusers, from pipeline_sources/consistency_images.py: change that, not this.
"""Images without prompts from students that know noise levels, as they were trained, without installing cm_diffusers.

A single file for `custom_pipeline`. It needs diffusers alone and serves the consistency models that cm_diffusers makes
without prompts, of pixels and latents, with classes or without, and published folders of `ConsistencyModelPipeline`. Put
it beside the weights as `pipeline.py`, or name it:

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        "runs/ect/pipeline", custom_pipeline="pipelines/consistency_images.py", trust_remote_code=True
    )
    image = pipe().images[0]  # at the noise levels that the student recommends
    image = pipe(class_labels=3, sigmas=[80.0, 0.821]).images[0]

What the stock pipeline lacks: it reads neither `cm_diffusers.json` nor what the scheduler's config says of boundary,
network and noise levels, and knows no latents. Images are those of `ConsistencyImagesPipeline`.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConfigMixin,
    DiffusionPipeline,
    ImagePipelineOutput,
    LCMScheduler,
    ModelMixin,
    SchedulerMixin,
    SCMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils import BaseOutput, logging
from diffusers.utils.import_utils import DummyObject
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import Generator, Tensor, nn


def exact(times: Tensor) -> Tensor:
    """Times, or what is computed of them, in float64 on the CPU."""
    return times.cpu().double()


def input_scaling(sigma: Tensor, sigma_data: float) -> Tensor:
    """c_in `(B,)` of EDM (2206.00364, Table 1): c_in x has unit variance."""
    return 1 / (exact(sigma) ** 2 + sigma_data**2).sqrt()


def cm_scalings(sigma: Tensor, sigma_min: float, sigma_data: float) -> tuple[Tensor, Tensor]:
    """c_skip and c_out `(B,)` of consistency models (2303.01469, Appendix C); exactly (1, 0) at sigma = sigma_min."""
    shifted = exact(sigma) - sigma_min
    return 1 / (1 + (shifted / sigma_data) ** 2), shifted * sigma_data * input_scaling(sigma, sigma_data)


def edm_scalings(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """c_skip and c_out `(B,)` of EDM's denoiser (2206.00364, Table 1); exactly (1, 0) at sigma = 0."""
    sigma = exact(sigma)
    return 1 / (1 + (sigma / sigma_data) ** 2), sigma * sigma_data * input_scaling(sigma, sigma_data)


# (sigma, sigma_min, sigma_data) -> (c_skip, c_out): where f(x, sigma) = x, at sigma_min or at 0
BOUNDARY_SCALINGS: dict[str, Callable[[Tensor, float, float], tuple[Tensor, Tensor]]] = {
    "cm": cm_scalings,
    "edm": lambda sigma, sigma_min, sigma_data: edm_scalings(sigma, sigma_data),
}
OUTPUT_SIGNS = {"epsilon": 1.0, "v_prediction": -1.0}  # as `EDMEulerScheduler` has them


class UserError(ValueError):
    """Something given is wrong; one sentence says what, what was found and what to do, and scripts print only that."""


# (sigma, sigma_data) -> c_noise, what a network is told of sigma: part of its architecture. "adm" as
# `CMStochasticIterativeScheduler`; "trigflow" is the time of sCM (2410.11081, Sec. 4.1), which ends at pi / 2.
NOISE_CONDITIONINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "edm": lambda sigma, sigma_data: sigma.log() / 4,
    "adm": lambda sigma, sigma_data: 1000 * torch.log(sigma + 1e-44) / 4,
    "trigflow": lambda sigma, sigma_data: torch.atan(sigma / sigma_data),
}


def noise_condition(sigma: Tensor, kind: str, sigma_data: float = 0.5) -> Tensor:
    """c_noise `(B,)`: ln(sigma) / 4 for networks of EDM, 1000 times that for ADM's and diffusers' `UNet2DModel`.

    Args:
        kind: One of `NOISE_CONDITIONINGS`.
        sigma_data: Of the data; "trigflow" depends on it. Its times go from 0 to pi / 2, of which the positional embedding
            of diffusers makes waves of frequencies from 1 to 1e-4, as slow as the paper wants them.
    """
    if kind not in NOISE_CONDITIONINGS:
        raise UserError(f"Unknown --noise_conditioning {kind!r}; one of {', '.join(NOISE_CONDITIONINGS)}.")
    return NOISE_CONDITIONINGS[kind](exact(sigma), sigma_data)


@dataclass(frozen=True)
class EDMKind:
    """A network of EDM (2206.00364, Eq. 7): its output is F, or -F for "v_prediction", as of Stable Video Diffusion.

    Attributes:
        sigma_data: Standard deviation of the data.
        noise_conditioning: See `noise_condition`.
        prediction_type: One of `OUTPUT_SIGNS`.
    """

    sigma_data: float
    noise_conditioning: str
    prediction_type: str

    def __post_init__(self) -> None:
        if self.prediction_type not in OUTPUT_SIGNS:
            raise UserError(
                f'A network of kind "edm" answers with F, "epsilon", or -F, "v_prediction", got '
                f'{self.prediction_type!r}; take network "vp" for a diffusion model of Stable Diffusion\'s kind.'
            )

    def times(self, sigmas: Tensor) -> Tensor:
        return noise_condition(sigmas, self.noise_conditioning, self.sigma_data)

    def sigmas(self, times: Tensor) -> Tensor:
        if self.noise_conditioning == "trigflow":
            return self.sigma_data * torch.tan(times)
        return torch.exp(times / self.times(torch.tensor(math.e, dtype=torch.float64)))

    def shown(self, sigma: Tensor) -> Tensor:
        return input_scaling(sigma, self.sigma_data)

    def as_edm(self, sigma: Tensor) -> tuple[float, float]:
        return 0.0, OUTPUT_SIGNS[self.prediction_type]

    def start(self, sigma: float) -> float:
        return math.hypot(sigma, self.sigma_data) if self.prediction_type == "v_prediction" else sigma


class NetworkKind(Protocol):
    """What a view of `cm_diffusers.diffusion.views` is to training. Every sigma is float64."""

    def times(self, sigmas: Tensor) -> Tensor:
        """What the network is told of noise levels `(N,)`."""

    def sigmas(self, times: Tensor) -> Tensor:
        """The inverse of `times`."""

    def shown(self, sigma: Tensor) -> Tensor:
        """The factor of x in the network's input."""

    def as_edm(self, sigma: Tensor) -> tuple[float, float]:
        """on_x and on_output with F = on_x x + on_output output."""

    def start(self, sigma: float) -> float:
        """The standard deviation of what sampling starts from at sigma."""


@dataclass
class ConsistencySchedulerOutput(BaseOutput):
    """What a step returns, both `(B, ...)`.

    Attributes:
        prev_sample: The sample at the next timestep of the schedule, or the result after the last one.
        denoised: The consistency function's answer f(x_t, t), without noise.
    """

    prev_sample: Tensor
    denoised: Tensor


NoiseSampler = Callable[[torch.Size, Generator | list[Generator] | None, torch.device, torch.dtype], Tensor]


def refuse_gamma(gamma: float) -> float:
    if not 0 <= gamma <= 1:
        raise UserError(f"gamma must be from 0 (deterministic) to 1 (fresh noise in every step), got {gamma}.")
    return gamma


class SteppingScheduler(SchedulerMixin, ConfigMixin):
    """Steps along a schedule: denoise, then move to the next place of it."""

    order = 1

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
    ) -> ConsistencySchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the schedule: denoise, then go to the next timestep.

        Args:
            model_output: `(B, ...)`, the network's answer to `scale_model_input` of the sample.
            timestep: One of `timesteps`. It finds the first step's place; the steps after it follow in order.
            sample: x_t `(B, ...)`; both results have its dtype, whatever the arithmetic is in.
        """
        index = self._enter(timestep)
        x = sample.to(self._precision(sample))
        denoised = self._denoise(model_output.to(x.dtype), self._schedule[index], x)
        prev_sample = self._move(denoised, x, index, lambda: self._draw(sample, generator).to(x.dtype))
        self._step_index += 1
        result = (prev_sample.to(sample.dtype), denoised.to(sample.dtype))
        return ConsistencySchedulerOutput(*result) if return_dict else result

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

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @classmethod
    def _get_compatibles(cls) -> list[type[SchedulerMixin]]:
        """Contains this class even where it is not registered, and none whose dependencies are missing."""
        return [cls, *(c for c in super()._get_compatibles() if c is not cls and not isinstance(c, DummyObject))]

    def _prepare(self, gamma: float) -> None:
        self.gamma = refuse_gamma(gamma)
        self.noise_sampler: NoiseSampler | None = None
        self.num_inference_steps: int | None = None
        self.custom_timesteps = False

    def _restart(self, schedule: list) -> None:
        self._schedule = schedule  # beside `timesteps`, so that no step waits for the device
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def _enter(self, timestep: float | Tensor) -> int:
        """The place of the step that begins."""
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if self._step_index >= len(self._schedule):
            raise UserError(f"All {len(self._schedule)} steps are done; call set_timesteps to start again.")
        return self._step_index

    def _draw(self, sample: Tensor, generator: Generator | list[Generator] | None) -> Tensor:
        """Fresh noise `(B, ...)` in the dtype of the sample: what a seed draws depends on it."""
        if self.noise_sampler is None:
            return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        noise = self.noise_sampler(sample.shape, generator, sample.device, sample.dtype)
        if noise.shape != sample.shape:
            raise UserError(f"noise_sampler must return noise of {tuple(sample.shape)}, got {tuple(noise.shape)}.")
        return noise


def as_level(level: float) -> Tensor:
    return torch.tensor(level, dtype=torch.float64)


class ToldScheduler(SteppingScheduler):
    """One whose `timesteps` are what the network is told, not indices.

    A subclass knows the levels of its schedule, each in float64: `_told` is what a network is told of them, `_levels` the
    inverse, `_shown` the factor of x in its input, `_levels_of` those of sigmas.
    """

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """What the network is shown of x `(B, ...)`, at the next step's level, before the first at the timestep's."""
        begun = self._step_index is not None and self._step_index < len(self._schedule)
        level = as_level(self._schedule[self._step_index]) if begun else self._levels_at(torch.as_tensor(timestep))
        return sample * float(self._shown(level))

    def sigma_to_t(self, sigmas: float | Sequence[float] | Tensor) -> Tensor:
        """What the network is told of noise levels, of the schedule or not, in float64."""
        return self._told(self._levels_of(torch.as_tensor(sigmas, dtype=torch.float64).cpu()))

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """The place of a timestep in the schedule.

        Raises:
            ValueError: It is an integer, or not there.
        """
        level = self._levels_at(torch.as_tensor(timestep)).flatten()[0].item()  # one for each sample, all alike
        for index, known in enumerate(self._schedule):
            if math.isclose(level, known, rel_tol=1e-4):  # a timestep may have passed through float32
                return index
        raise UserError(
            f"Timestep {float(timestep):g} ({self._level_name} {level:g}) is not in the schedule of {self._level_name}s "
            f"{self._schedule}; pass one of scheduler.timesteps, or call set_timesteps."
        )

    def _enter(self, timestep: float | Tensor) -> int:
        self._refuse_integers(torch.as_tensor(timestep))
        return super()._enter(timestep)

    def _levels_at(self, timesteps: Tensor) -> Tensor:
        self._refuse_integers(timesteps)
        return self._levels(timesteps.cpu().double())

    def _refuse_integers(self, timesteps: Tensor) -> None:
        if not timesteps.is_floating_point():
            raise UserError(
                f"Timesteps of {type(self).__name__} are what the network is told of the noise, not integer indices; "
                "pass entries of scheduler.timesteps."
            )

    def _precision(self, sample: Tensor) -> torch.dtype:
        return torch.float32 if sample.device.type == "mps" else torch.float64


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")  # of variance-preserving processes; see `interpret`


def vp_scalings(sigma: Tensor, sigma_data: float, prediction_type: str) -> tuple[Tensor, Tensor]:
    """on_x and on_output `(B,)` with F = on_x x + on_output output, for the output of a variance-preserving network.

    The network is shown x / sqrt(1 + sigma^2). F is (D - c_skip x) / c_out with its denoiser D and EDM's scalings,
    simplified by hand: no two terms cancel that need not.

    Args:
        prediction_type: What the output is: "epsilon", "v_prediction" or "sample".
    """
    sigma = exact(sigma)
    edm, vp = (sigma**2 + sigma_data**2).sqrt(), (1 + sigma**2).sqrt()
    if prediction_type == "epsilon":  # D = x - sigma output
        return sigma / (sigma_data * edm), -edm / sigma_data
    if prediction_type == "v_prediction":  # D = (x - sigma vp output) / vp^2
        return sigma * (1 - sigma_data**2) / (sigma_data * vp**2 * edm), -edm / (sigma_data * vp)
    if prediction_type == "sample":  # D = output
        return -sigma_data / (sigma * edm), edm / (sigma * sigma_data)
    raise UserError(f"Unknown prediction_type {prediction_type!r}; one of {', '.join(PREDICTION_TYPES)}.")


@dataclass(frozen=True, eq=False)
class VPKind:
    """A variance-preserving network; between its integer times ln sigma is interpolated linearly.

    Attributes:
        sigma_data: Standard deviation of the data.
        prediction_type: What its output is.
        log_sigmas: ln(sigma / alpha) at its times `(T,)`.
        noise_conditioning: "trigflow", or it is told its own time.
    """

    sigma_data: float
    prediction_type: str
    log_sigmas: np.ndarray
    noise_conditioning: str

    @classmethod
    def of(
        cls, sigma_data: float, prediction_type: str, alphas_cumprod: Tensor, noise_conditioning: str = "own"
    ) -> "VPKind":
        """Leaves out a last time of zero terminal SNR, where sigma is infinite."""
        signal = alphas_cumprod[alphas_cumprod > 0].double()
        return cls(sigma_data, prediction_type, -torch.logit(signal).numpy() / 2, noise_conditioning)

    def times(self, sigmas: Tensor) -> Tensor:
        if self.noise_conditioning == "trigflow":
            return noise_condition(sigmas, "trigflow", self.sigma_data)
        return torch.as_tensor(np.interp(sigmas.log().numpy(), self.log_sigmas, np.arange(len(self.log_sigmas))))

    def sigmas(self, times: Tensor) -> Tensor:
        if self.noise_conditioning == "trigflow":
            return self.sigma_data * torch.tan(times)
        return torch.as_tensor(np.interp(times.numpy(), np.arange(len(self.log_sigmas)), self.log_sigmas)).exp()

    def shown(self, sigma: Tensor) -> Tensor:
        return input_scaling(sigma, 1.0)

    def as_edm(self, sigma: Tensor) -> tuple[float, float]:
        on_x, on_output = vp_scalings(sigma, self.sigma_data, self.prediction_type)
        return float(on_x), float(on_output)

    def start(self, sigma: float) -> float:
        return sigma

    def check(self, sigma_min: float, sigma_max: float) -> None:
        """
        Raises:
            ValueError: The levels go beyond what the network knows.
        """
        low, high = np.exp(self.log_sigmas[[0, -1]])
        if sigma_min < low or sigma_max > high:
            raise UserError(
                f"This network knows sigmas from {low:.5g} to {high:.5g}, but sigma_min is {sigma_min} and sigma_max "
                f"{sigma_max}; give what it was trained with."
            )


def _is_whole(value: object) -> bool:
    try:
        return value == int(value)
    except (TypeError, ValueError, OverflowError):
        return False


def _share(length: int, strength: float) -> int:
    """How many of `length` remain; in floating point 50 * 0.58 is below 29."""
    return int(length * strength + 1e-6)


def check_strength(strength: float) -> None:
    """
    Raises:
        ValueError: It is not above 0 and at most 1.
    """
    if not isinstance(strength, Real) or not 0 < strength <= 1:
        raise UserError(f"strength must be above 0 and at most 1, got {strength!r}.")


logger = logging.get_logger(__name__)


def chosen(timesteps: Sequence[int], grid: Sequence[int], limit: int, strength: float) -> list[int]:
    """The share `strength` of a user's timesteps that has the least noise; those off the grid are warned of.

    Raises:
        ValueError: They are not whole, not in [0, limit), not descending, none remains, or strength is outside (0, 1].
    """
    check_strength(strength)
    timesteps = timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps
    if not isinstance(timesteps, Sequence) or not all(_is_whole(t) for t in timesteps):
        raise UserError(f"timesteps must be a list of whole numbers, got {timesteps!r}.")
    schedule = [int(t) for t in timesteps]
    if not schedule or not all(0 <= t < limit for t in schedule):
        raise UserError(f"timesteps must be a list of numbers from {limit - 1} down to 0, got {schedule}.")
    if any(a <= b for a, b in pairwise(schedule)):
        raise UserError(f"timesteps must descend without repetition, got {schedule}.")
    kept = _share(len(schedule), strength)
    if kept == 0:
        raise UserError(f"A strength of {strength} leaves none of the {len(schedule)} timesteps; take a higher one.")
    if strangers := [t for t in schedule[-kept:] if t not in grid]:
        logger.warning(f"Timesteps {strangers} are not on the distillation grid of {len(grid)} points.")
    return schedule[-kept:]


def at_places(grid: list[float], places: Sequence[int]) -> list[float]:
    """The levels at these places of a descending grid, which are listed from the last to the first.

    Raises:
        ValueError: They are not whole, not on the grid, or not descending.
    """
    return [grid[place] for place in chosen(places, range(len(grid)), len(grid), 1.0)[::-1]]


def checked(sigmas: Sequence[float], low: float, high: float, name: str = "sigmas") -> list[float]:
    """
    Raises:
        ValueError: They are no numbers from high down to low.
    """
    values = list(sigmas.tolist() if hasattr(sigmas, "tolist") else sigmas)
    known = all(isinstance(value, Real) and low <= value <= high for value in values)
    if not values or not known or any(a <= b for a, b in pairwise(values)):
        raise UserError(f"{name} must be numbers that descend, from at most {high} to at least {low}; got {values}.")
    return [float(value) for value in values]


def karras_grid(points: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """`(points,)` ascending sigmas of EDM (2206.00364, Eq. 5), float64: even in sigma^(1 / rho), with exact ends."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    grid = torch.linspace(low, high, points, dtype=torch.float64) ** rho
    grid[0], grid[-1] = sigma_min, sigma_max
    return grid


def on(device: str | torch.device | None, times: Tensor) -> Tensor:
    """Times in float64, but on a device that has none."""
    return times.to(device, torch.float32) if str(device).startswith("mps") else times.to(device)


def one_of(name: str, value: str | None, allowed: Sequence[str | None]) -> None:
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}.")


def strided(grid: list[float], count: int) -> list[float]:
    """`count` levels of a descending grid, the first and every (N // count)-th, as `CMStochasticIterativeScheduler`.

    Raises:
        ValueError: The count is no whole number from 1 to the points of the grid.
    """
    if not isinstance(count, Integral) or not 1 <= count <= len(grid):
        raise UserError(
            f"num_inference_steps must be a whole number from 1 to the {len(grid)} points of the training grid, got "
            f"{count!r}; for other noise levels give sigmas."
        )
    return grid[:: len(grid) // count][:count]


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


@dataclass(frozen=True, eq=False)
class DiscreteVP:
    """The variance-preserving process of DDPM (2006.11239, Eq. 4) on integer times 0..T-1.

    Between integers the half log-SNR is interpolated linearly; integer tensors read the table itself.

    Attributes:
        alphas_cumprod: The cumulative products `(T,)` of 1 - beta.
    """

    alphas_cumprod: Tensor

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin) -> "DiscreteVP":
        """The process of any diffusers scheduler that has `alphas_cumprod`, but for those of flow matching.

        Of these some have it all the same, and noise otherwise.
        """
        name, config = type(scheduler).__name__, scheduler.config
        flows = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
        if flows or name.startswith("Flow"):
            raise UserError(
                f"The scheduler {name} is one of flow matching and has no discrete variance-preserving schedule; see its "
                "network as one of RectifiedFlow, or give a Stable Diffusion style teacher (DDIM, DDPM, DPM-Solver, Euler ...)."
            )
        if not hasattr(scheduler, "alphas_cumprod"):
            raise UserError(
                f"The teacher's scheduler {name} has no discrete variance-preserving schedule "
                "(alphas_cumprod); give a Stable Diffusion style teacher (DDIM, DDPM, DPM-Solver, Euler ...)."
            )
        return cls(scheduler.alphas_cumprod.double().cpu())

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def alphas_cumprod_at(self, t: Tensor) -> Tensor:
        table, t = self.alphas_cumprod, t.cpu()
        if not t.is_floating_point():
            return table[t]
        lower = t.double().floor().long().clamp(0, len(table) - 2)
        ends = torch.logit(table[torch.stack([lower, lower + 1])])  # logit(alpha^2) = log(alpha^2 / sigma^2)
        return torch.sigmoid(torch.lerp(ends[0], ends[1], t.double() - lower))

    def alpha(self, t: Tensor) -> Tensor:
        return self.alphas_cumprod_at(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alphas_cumprod_at(t)).sqrt()

    def half_log_snr(self, t: Tensor) -> Tensor:
        return torch.logit(self.alphas_cumprod_at(t)) / 2

    @cached_property
    def _ascending(self) -> Tensor:
        """The half log-SNR `(T,)` of the times T-1..0."""
        return torch.logit(self.alphas_cumprod).flip(0) / 2

    def time_at(self, half_log_snr: Tensor) -> Tensor:
        table, half_log_snr = self._ascending, exact(half_log_snr)
        upper = torch.searchsorted(table, half_log_snr).clamp(1, len(table) - 1)
        lo, hi = table[upper - 1], table[upper]
        return len(table) - 1 - (upper - 1 + (half_log_snr - lo) / (hi - lo))


# What a network of each kind may answer with -> the output of `TrigFlowNetwork` that this is.
KINDS: dict[str | None, dict[str, str]] = {
    None: {"trigflow": "trigflow"},
    "edm": {"trigflow": "trigflow", "epsilon": "edm", "v_prediction": "trigflow"},
    "vp": {kind: kind for kind in ("epsilon", "v_prediction", "sample")},
    "flow": {"flow_prediction": "flow_prediction"},
}
LEAST_SIGMA = 1e-6
PURE_NOISE = 1.57080  # as SCMScheduler has pi / 2


@dataclass(frozen=True)
class RectifiedFlow:
    """Linear interpolation (2209.03003), t in [0, 1]: alpha = 1 - t, sigma = t.

    At t = 1, pure noise, half_log_snr is -inf and at t = 0 inf; `time_at` takes both.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - exact(t)

    def sigma(self, t: Tensor) -> Tensor:
        return exact(t)

    def half_log_snr(self, t: Tensor) -> Tensor:
        return torch.log((1 - exact(t)) / exact(t))

    def time_at(self, half_log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-exact(half_log_snr))


class Conversion(NamedTuple):
    """F = on_x x + on_output output, for the answer to `shown` x; each `(B,)`."""

    shown: Tensor
    on_x: Tensor
    on_output: Tensor


def _vp(cos: Tensor, sin: Tensor, d: float) -> Tensor:
    return 1 / (cos**2 + (d * sin) ** 2).sqrt()


def _epsilon(cos: Tensor, sin: Tensor, d: float) -> Conversion:
    return Conversion(_vp(cos, sin, d), -sin / (d * cos), 1 / cos)


def _sample(cos: Tensor, sin: Tensor, d: float) -> Conversion:
    return Conversion(_vp(cos, sin, d), cos / (d * sin), -1 / (d * sin))


def _v_prediction(cos: Tensor, sin: Tensor, d: float) -> Conversion:
    c = _vp(cos, sin, d)
    return Conversion(c, cos * sin * (d**2 - 1) / d * c**2, c)


def flow_scalings(cos: Tensor, sin: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """c, on_x and on_output `(B,)`: of a sample x in TrigFlow's coordinates, rectified flow's network is shown c x.

    Its answer v = noise - x0 (2209.03003) makes F = on_x x + on_output v, TrigFlow's F; EDM's is -F. For sigma_data = 1 this
    is the form of SANA-Sprint (2503.09641, Eq. 9).
    """
    c = 1 / (cos + sigma_data * sin)
    return c, c * (sigma_data * cos - sin) / sigma_data, c


# What a network answers with, by (cos, sin, sigma_data): EDM's F, a variance-preserving or a flow network's prediction.
OUTPUTS: dict[str, Callable[[Tensor, Tensor, float], Conversion]] = {
    "trigflow": lambda cos, sin, d: Conversion(cos.new_full(cos.shape, 1 / d), 0 * cos, cos.new_ones(cos.shape)),
    "edm": lambda cos, sin, d: Conversion(cos.new_full(cos.shape, 1 / d), 0 * cos, -cos.new_ones(cos.shape)),
    "epsilon": _epsilon,
    "v_prediction": _v_prediction,
    "sample": _sample,
    "flow_prediction": lambda cos, sin, d: Conversion(*flow_scalings(cos, sin, d)),
}


class Process(Protocol):
    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def half_log_snr(self, t: Tensor) -> Tensor: ...
    def time_at(self, half_log_snr: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class TrigFlowNetwork:
    """What a network is shown and told in TrigFlow's coordinates, and what its answer means, for trainer and sampler.

    Attributes:
        sigma_data: Standard deviation of the data.
        output: One of `OUTPUTS`.
        conditioning: What it is told: one of `NOISE_CONDITIONINGS`, or "own", the time of `process`, times `time_scale`.
        process: Of a network that is told its own time.
        time_scale: 1000 for flow networks that are told 0 to 1000, as diffusers' are.
    """

    sigma_data: float
    output: str = "trigflow"
    conditioning: str = "trigflow"
    process: Process | None = None
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < math.inf:
            raise UserError(f"--sigma_data is {self.sigma_data}, but the standard deviation of data must be positive.")
        for value, known in ((self.output, OUTPUTS), (self.conditioning, ("own", *NOISE_CONDITIONINGS))):
            if value not in known:
                raise UserError(f"{value!r} is not known of a network; one of {', '.join(known)}.")

    @property
    def difference_step(self) -> float:
        """By how much to move what the network is told for a difference: in float32 it errs by some 1e-3 then, or less."""
        own = 5e-5 * self.time_scale if isinstance(self.process, RectifiedFlow) else 0.05
        return {"trigflow": 3e-3, "edm": 2e-4}.get(self.conditioning, own)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The least and greatest sigma that the network knows."""
        if not isinstance(self.process, DiscreteVP):
            return 0.0, math.inf
        low, high = torch.exp(
            -self.process.half_log_snr(torch.tensor([0, self.process.num_train_timesteps - 1]))
        ).tolist()
        return low, high

    def told(self, t: Tensor) -> Tensor:
        """What the network is told of times `(B,)`, in float64."""
        t = exact(t)
        if self.conditioning == "trigflow":
            return t
        sigma = self.sigma_data * torch.tan(t)
        if self.conditioning == "own":
            return self.process.time_at(-sigma.log()) * self.time_scale
        return noise_condition(sigma, self.conditioning, self.sigma_data)

    def times(self, told: Tensor) -> Tensor:
        """The inverse of `told`."""
        if self.conditioning == "trigflow":
            return exact(told)
        if self.conditioning == "own":
            sigma = torch.exp(-self.process.half_log_snr(exact(told) / self.time_scale))
        else:
            sigma = torch.exp(
                exact(told) / noise_condition(torch.tensor(math.e, dtype=torch.float64), self.conditioning)
            )
        return torch.atan(sigma / self.sigma_data)

    def conversion(self, t: Tensor) -> Conversion:
        t = exact(t)
        return OUTPUTS[self.output](torch.cos(t), torch.sin(t), self.sigma_data)


HAIR = 1e-5  # above what a time may be: SANA-Sprint (2503.09641) starts at 1.57080


def checked_times(times: Sequence[float], high: float) -> list[float]:
    """Times of TrigFlow without a last 0, which is the end; one a hair above `high`, as pi / 2 is rounded, is `high`.

    Raises:
        ValueError: They are no floating numbers from high down to above 0.
    """
    values = list(times.tolist() if hasattr(times, "tolist") else times)
    values = values[:-1] if values and values[-1] == 0 else values
    if any(isinstance(value, Integral) for value in values):
        raise UserError(f"Timesteps of TrigFlow are times from {high:.6g} to 0, no integer indices; got {values}.")
    known = all(isinstance(value, Real) and 0 < value <= high + HAIR for value in values)
    if not values or not known or any(a <= b for a, b in pairwise(values)):
        raise UserError(f"Times must be numbers that descend, from at most {high:.6g} to above 0; got {values}.")
    return [min(float(value), high) for value in values]


class TrigFlowConsistencyScheduler(ToldScheduler):
    """Consistency sampling (sCM, 2410.11081, Sec. 3.1) of x = cos(t) x0 + sigma_data sin(t) noise, t from pi / 2 to 0.

    A step from t to s denoises, f = cos(t) x - sin(t) sigma_data F, and noises again::

        x' = cos(s) f + sin(s) ((1 - gamma) e + sqrt(1 - (1 - gamma)^2) sigma_data z),    e = (x - cos(t) f) / sin(t)

    gamma = 1 is the paper's sampler; gamma = 0 is deterministic, cos(t - s) x - sin(t - s) sigma_data F. The last step adds
    no noise and draws none.

    The config of an `SCMScheduler` serves: `pipe.scheduler = TrigFlowConsistencyScheduler.from_config(pipe.scheduler.config)`.
    It has no `network`: its pipeline, as `SanaSprintPipeline`, scales inputs itself, hands `step` the product sigma_data F,
    and drops the last of `timesteps`, which are the times t in float32 with the end, 0, behind them.

    With a `network` the scheduler converts, as training did (`cm_diffusers.diffusion.trigflow.TrigFlowNetwork`): `timesteps`
    are what the network is told, and `step` takes its answer to `scale_model_input`. Images are those of an
    `EDMConsistencyScheduler` with the same fields and the boundary "edm".

    Args:
        num_train_timesteps: Without effect, as in `SCMScheduler`.
        prediction_type: What the network's output is. "trigflow": F, or sigma_data F without a `network`. Of "edm" also
            "epsilon", EDM's F, which is -F, or "v_prediction", its opposite; of "vp" "epsilon", "v_prediction" or "sample";
            of "flow" "flow_prediction", noise - x0.
        sigma_data: Standard deviation of the data, as in training.
        sigma_max: Most noise of training: sampling starts at t = atan(sigma_max / sigma_data). None for pure noise, or for
            the most that a network "vp" knows.
        network: None, or "edm": shown x / sigma_data and told `noise_conditioning`, "vp": a diffusion model of Stable
            Diffusion's kind, "flow": one of rectified flow; the latter two are told their own times.
        noise_conditioning: What "edm" is told: "trigflow" (t, also if None), "edm" (ln sigma / 4) or "adm" (250 ln sigma);
            "vp" may be told "trigflow", too, after time rescaling.
        num_vp_timesteps: How many times "vp" knows; the fields from here to `rescale_betas_zero_snr` are for it.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: As in its scheduler.
        time_scale: What "flow" is told of pure noise: 1000 as most, 1 as SANA-Sprint.
        clip_denoised: Clip f to [-1, 1]; not for latents.
        gamma: The share of fresh noise, 0 to 1.
        recommended_sigmas: Noise levels sigma_data tan(t) that `set_timesteps` takes when it is given none, or their number.

    Attributes:
        sigmas: The noise levels `(steps + 1,)` in float64, the last is 0; infinite at pi / 2.
        noise_sampler: As in `ConsistencyScheduler`.
    """

    _compatibles = ["SCMScheduler"]
    _level_name = "time"

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        prediction_type: str = "trigflow",
        sigma_data: float = 0.5,
        sigma_max: float | None = None,
        network: str | None = None,
        noise_conditioning: str | None = None,
        num_vp_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: np.ndarray | list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        time_scale: float = 1000.0,
        clip_denoised: bool = False,
        gamma: float = 1.0,
        recommended_sigmas: list[float] | None = None,
    ) -> None:
        one_of("network", network, tuple(KINDS))
        one_of("prediction_type", prediction_type, tuple(KINDS[network]))
        one_of("noise_conditioning", noise_conditioning, (None, *NOISE_CONDITIONINGS))
        if not 0 < sigma_data < math.inf or not (sigma_max is None or 0 < sigma_max < math.inf):
            raise UserError(f"sigma_data and sigma_max must be positive, got {sigma_data} and {sigma_max}.")
        told, process, scale = noise_conditioning or "trigflow", None, 1.0
        if network == "vp":
            betas = (beta_start, beta_end, beta_schedule, trained_betas)
            stock = LCMScheduler(num_vp_timesteps, *betas, rescale_betas_zero_snr=rescale_betas_zero_snr)
            process = DiscreteVP(stock.alphas_cumprod[stock.alphas_cumprod > 0].double())
            told = "trigflow" if noise_conditioning == "trigflow" else "own"
        elif network == "flow":
            told, process, scale = "own", RectifiedFlow(), time_scale
        self._network = TrigFlowNetwork(sigma_data, KINDS[network][prediction_type], told, process, scale)
        self._sigma_max = self._most(sigma_max)
        self._t_max = math.atan(self._sigma_max / sigma_data) if network or sigma_max else PURE_NOISE
        if recommended_sigmas is not None:
            checked(recommended_sigmas, LEAST_SIGMA, self._sigma_max)
        self._prepare(gamma)
        self._set_schedule([self._t_max], device=None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        gamma: float | None = None,
        max_timesteps: float | None = None,
        intermediate_timesteps: float | None = 1.3,
    ) -> None:
        """Choose the times of the next sampling run; without any, those the student recommends.

        Args:
            num_inference_steps: So many times: the recommended ones if they are so many and `max_timesteps` is not given,
                else evenly spaced from it, but of two the second is `intermediate_timesteps`.
            timesteps: These times t instead, descending; they may end in 0, as those of `SCMScheduler`.
            sigmas: Or the times of these noise levels, descending.
            gamma: For this run, instead of the config's.
            max_timesteps: The first time; that of most noise by default.
            intermediate_timesteps: The second of two steps, if it is below the first; 1.3 is SANA-Sprint's
                (2503.09641), 1.1 sCM's for ImageNet. None for even spacing. Without effect for other numbers of steps.

        Raises:
            ValueError: An argument is out of range, or not exactly one way to choose is given.
        """
        if num_inference_steps is None and timesteps is None and sigmas is None:
            sigmas = self.config.recommended_sigmas
        if sum(way is not None for way in (timesteps, sigmas, max_timesteps)) > 1:
            raise UserError("Give only one of timesteps, sigmas and max_timesteps.")
        if timesteps is not None:
            schedule = checked_times(timesteps, self._t_max)
        elif sigmas is not None:
            schedule = self._times_of(sigmas)
        else:
            schedule = checked_times(
                self._spread(num_inference_steps, max_timesteps, intermediate_timesteps), self._t_max
            )
        if num_inference_steps not in (None, len(schedule)):
            raise UserError(
                f"num_inference_steps is {num_inference_steps}, but {len(schedule)} times are given; leave it out."
            )
        self.gamma = refuse_gamma(self.config.gamma if gamma is None else gamma)
        self.num_inference_steps = len(schedule)
        self.custom_timesteps = timesteps is not None or sigmas is not None
        self._set_schedule(schedule, device)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x `(B, ...)` from clean data and noise `(B, ...)` at `timesteps` `(B,)`, of the schedule or not.

        Raises:
            ValueError: The timesteps are integers.
        """
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        t = self._levels_at(timesteps).reshape(-1, *[1] * (noise.ndim - 1))
        cos, sin = (factor.to(dtype).to(noise.device) for factor in (t.cos(), self.config.sigma_data * t.sin()))
        return (cos * original_samples + sin * noise).to(original_samples.dtype)

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the noise at the first time; 1 without a `network`, where the pipeline scales."""
        return self.config.sigma_data * math.sin(self._schedule[0]) if self.config.network else 1.0

    def _most(self, sigma_max: float | None) -> float:
        """The greatest noise level to sample at.

        Raises:
            ValueError: The network does not know so much.
        """
        known = self._network.sigma_range[1]
        if sigma_max is not None and sigma_max > known * (1 + 1e-9):
            raise UserError(f"This network knows sigmas up to {known:.5g}, but sigma_max is {sigma_max}; give less.")
        return known if sigma_max is None else sigma_max

    def _spread(self, count: int | None, first: float | None, second: float | None) -> list[float]:
        if count is None:
            raise UserError("Give num_inference_steps, timesteps or sigmas.")
        if not isinstance(count, Integral) or count < 1:
            raise UserError(f"num_inference_steps must be a whole number of at least 1, got {count!r}.")
        recommended = self.config.recommended_sigmas or []
        if first is None and len(recommended) == count:
            return self._times_of(recommended)
        first = self._t_max if first is None else float(first)
        if count == 2 and second is not None and second < first:
            return [first, second]
        return torch.linspace(first, 0, int(count) + 1, dtype=torch.float64).tolist()

    def _times_of(self, sigmas: Sequence[float]) -> list[float]:
        values = checked(sigmas, LEAST_SIGMA, self._sigma_max)
        return self._levels_of(torch.tensor(values, dtype=torch.float64)).tolist()

    def _set_schedule(self, schedule: list[float], device: str | torch.device | None) -> None:
        self._restart(schedule)
        t = torch.tensor(schedule, dtype=torch.float64)
        sigmas = torch.where(t < math.pi / 2, self.config.sigma_data * t.tan(), math.inf)
        self.sigmas = torch.cat([sigmas, t.new_zeros(1)])
        with_end = torch.tensor([*schedule, 0.0], dtype=torch.float32)
        self.timesteps = on(device, self._told(t)) if self.config.network else with_end.to(device)

    def _told(self, levels: Tensor) -> Tensor:
        return self._network.told(levels)

    def _levels(self, told: Tensor) -> Tensor:
        return self._network.times(told)

    def _levels_of(self, sigmas: Tensor) -> Tensor:
        return torch.atan(sigmas / self.config.sigma_data)

    def _shown(self, level: Tensor) -> Tensor | float:
        return self._network.conversion(level).shown if self.config.network else 1.0

    def _denoise(self, output: Tensor, t: float, x: Tensor) -> Tensor:
        """f(x, t) = cos(t) x - sin(t) sigma_data F, F = on_x x + on_output output."""
        cos, sin = math.cos(t), self.config.sigma_data * math.sin(t)
        on_x, on_output = 0.0, 1 / self.config.sigma_data
        if self.config.network:
            _, on_x, on_output = map(float, self._network.conversion(as_level(t)))
        f = (cos - sin * on_x) * x - sin * on_output * output
        return f.clamp(-1, 1) if self.config.clip_denoised else f

    def _move(self, denoised: Tensor, x: Tensor, index: int, draw: Callable[[], Tensor]) -> Tensor:
        """The sample at the next time."""
        if index + 1 == len(self._schedule):
            return denoised
        t, s = self._schedule[index : index + 2]
        reused, fresh = 1 - self.gamma, (1 - (1 - self.gamma) ** 2) ** 0.5 * self.config.sigma_data
        result = math.cos(s) * denoised
        if reused > 0:
            result = result + math.sin(s) * reused / math.sin(t) * (x - math.cos(t) * denoised)
        return result + math.sin(s) * fresh * draw() if fresh > 0 else result


IN_SIGMA = {  # of students that know noise levels -> what samples as it says
    "EDMConsistencyScheduler": EDMConsistencyScheduler,
    "CMStochasticIterativeScheduler": EDMConsistencyScheduler,
    "TrigFlowConsistencyScheduler": TrigFlowConsistencyScheduler,
    "SCMScheduler": TrigFlowConsistencyScheduler,
}
Generators = Generator | list[Generator] | None


def _drawn(classes: int, batch: int, generator: Generators) -> Tensor:
    """Labels `(B,)`, each by its generator if there is a list."""
    if isinstance(generator, list):
        return torch.cat([_drawn(classes, 1, one) for one in generator])
    device = "cpu" if generator is None else generator.device
    return torch.randint(classes, (batch,), generator=generator, device=device).cpu()


ANY_CLASS = "any_class"  # in the config of a network whose last class stands for all of them


def classes_of(unet: nn.Module) -> int | None:
    """How many classes it knows, without the one for any; None if it takes none."""
    known = unet.config.num_class_embeds
    return known if known is None or unet.config.get(ANY_CLASS) is None else known - 1


def _affine(vae: ModelMixin, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Scale and mean (1, C, 1, 1) by which latents differ from what the VAE computes."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
    mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(like) for values in (mean, std))
    return vae.config.scaling_factor / std, mean


COMPUTED_IN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def dtype_of(model: ModelMixin) -> torch.dtype:
    """What the model computes in, without diffusers' walk over every module, unless the weights are stored otherwise."""
    first = next(model.parameters()).dtype
    return first if first in COMPUTED_IN else model.dtype


@contextmanager
def _safe_precision(pipe: DiffusionPipeline) -> Iterator[torch.dtype]:
    """The VAE's dtype; SDXL's VAE overflows in half precision and is float32 for the while."""
    vae, dtype = pipe.vae, dtype_of(pipe.vae)
    if not (pipe.is_xl and dtype == torch.float16 and vae.config.get("force_upcast")):
        yield dtype
        return
    vae.to(dtype=torch.float32)
    try:
        yield torch.float32
    finally:
        vae.to(dtype=torch.float16)


def check_finite(values: Tensor, what: str) -> None:
    """
    Args:
        what: Begins the sentence.

    Raises:
        ValueError: A value is not finite: images would be black.
    """
    if not values.isfinite().all():
        raise UserError(
            f"{what} hold values that are not finite ({values.dtype}); where the weights, LoRAs and inputs are finite, load the "
            "model in float32 or bfloat16, whose range is wider than float16's."
        )


def decode(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) around [-1, 1] of latents (B, C, h, w).

    Raises:
        ValueError: They are not finite.
    """
    scale, mean = _affine(pipe.vae, latents)
    with _safe_precision(pipe) as dtype:
        images = pipe.vae.decode((latents / scale + mean).to(dtype), return_dict=False)[0]
    check_finite(images, "The images that the VAE made of finite latents")
    return images


def _pixel_norm(a: Tensor) -> Tensor:
    """pnorm(a) = a / sqrt(mean(a^2) + eps) over the channels of `(B, C)`, at least in float32."""
    wide = a.to(torch.promote_types(a.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-8)).to(a.dtype)


class NormalizedScaleShift(nn.Linear):
    """What a residual block makes of the time: y = norm(x) pnorm(s(t)) + pnorm(b(t)).

    It has place, names and weights of the block's own layer. The block adds 1 to a scale, so 1 is taken off.
    """

    def forward(self, embedding: Tensor) -> Tensor:
        """Scale and shift `(B, 2 C)`."""
        scale, shift = super().forward(embedding).chunk(2, dim=1)
        return torch.cat([_pixel_norm(scale) - 1, _pixel_norm(shift)], dim=1)


def double_normed(unet: nn.Module) -> nn.Module:
    """The network itself, with double normalisation if its config says `double_norm`; diffusers alone leaves it out."""
    for block in unet.modules() if unet.config.get("double_norm") else ():
        if isinstance(block, ResnetBlock2D) and type(layer := block.time_emb_proj) is nn.Linear:
            block.time_emb_proj = NormalizedScaleShift(layer.in_features, layer.out_features, device="meta")
            block.time_emb_proj.weight, block.time_emb_proj.bias = layer.weight, layer.bias
    return unet


RECORD = "cm_diffusers.json"


def read_record(source: str) -> dict[str, Any]:
    """The record of a folder or Hub repository; {} where there is none, or none in reach."""
    path = Path(source) / RECORD
    if not Path(source).exists():
        try:
            path = Path(hf_hub_download(source, RECORD))
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
            return {}
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


@dataclass
class PortableImagesOutput(ImagePipelineOutput):
    """Images, and the classes `(B,)` they show; None for a network without classes."""

    class_labels: Tensor | None = None


class PortableImagesPipeline(DiffusionPipeline):
    """Samples a student without prompts by what its folder says.

    Args:
        unet: A `UNet2DConditionModel` must not read text.
        scheduler: Carries the fields that `EDMConsistencyScheduler` or `TrigFlowConsistencyScheduler` samples by.
        vae: For a student of latents.
        latents_mean, latents_std, sigma_data: The student's latents are (latents - mean) / std * sigma_data, of latents as
            Stable Diffusion scales them; None for those as they are.
        record: `cm_diffusers.json`, read where the folder is if None.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]
    is_xl = True  # for `decode`: the VAE may be one that overflows in half precision

    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: CMStochasticIterativeScheduler | SCMScheduler,
        vae: AutoencoderKL | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        sigma_data: float = 0.5,
        record: dict | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=double_normed(unet), scheduler=scheduler, vae=vae)
        statistics = {"latents_mean": latents_mean, "latents_std": latents_std, "sigma_data": sigma_data}
        self.register_to_config(**statistics, record=record)
        self.image_processor = VaeImageProcessor()

    @property
    def record(self) -> dict[str, Any]:
        """How the student was made; {} where nothing tells."""
        return self.config.record or read_record(self.config.get("_name_or_path") or "")

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | list[int] | Tensor | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> PortableImagesOutput | tuple:
        """Images.

        Args:
            batch_size: Number of images; by default as many as there are labels, latents or generators, else 1.
            class_labels: One for all images or one for each; drawn by the generators if None.
            num_inference_steps, timesteps, sigmas: How many noise levels, which places on the training grid (or times of
                TrigFlow), or these, descending; by default what the student recommends.
            generator: Draws noise, then labels, then the noise of each step; one for each image makes it independent of
                its batch.
            latents: Noise (B, C, H, W) of variance 1 to start from.
            output_type: "pil", "np" (B, H, W, C), "pt" (B, C, H, W), both in [0, 1], or "latent".
            return_dict: False for a tuple.

        Raises:
            ValueError: The request is malformed, or the student cannot fulfil it.
        """
        wanted = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
        batch = _batch(batch_size=batch_size, class_labels=wanted, latents=latents, generator=generator)
        size = self.unet.config.sample_size
        shape = (batch, self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}.")
        labels = self._labels(wanted, batch)
        device, dtype = self._execution_device, dtype_of(self.unet)
        scheduler = IN_SIGMA[type(self.scheduler).__name__].from_config(self.scheduler.config)
        if num_inference_steps is None and timesteps is None and sigmas is None:
            if scheduler.config.recommended_sigmas is None:
                num_inference_steps = self.record.get("recommended_num_inference_steps", 1)
        scheduler.set_timesteps(num_inference_steps, device, timesteps, sigmas)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if labels is None and (known := classes_of(self.unet)) is not None:
            labels = _drawn(known, batch, generator)
        labels = None if labels is None else labels.to(device)
        x = latents.to(device, dtype) * scheduler.init_noise_sigma
        told = {"encoder_hidden_states": None} if isinstance(self.unet, UNet2DConditionModel) else {}
        for t in self.progress_bar(scheduler.timesteps):
            shown = scheduler.scale_model_input(x, t)
            if getattr(self.unet, "is_told_target", False):
                told["target_timestep"] = scheduler.target_timestep(t)
            output = self.unet(shown, t, **told, class_labels=labels, return_dict=False)[0]
            x = scheduler.step(output, t, x, generator=generator).prev_sample
        images = self._output(x, output_type)
        self.maybe_free_model_hooks()
        return PortableImagesOutput(images, labels) if return_dict else PortableImagesOutput(images, labels).to_tuple()

    def _output(self, latents: Tensor, output_type: str) -> Any:
        if self.config.latents_std is not None:
            mean, std = (
                torch.tensor(self.config[name]).view(1, -1, 1, 1).to(latents)
                for name in ("latents_mean", "latents_std")
            )
            latents = latents * std / self.config.sigma_data + mean
        if output_type == "latent":
            return latents
        images = latents if self.vae is None else decode(self, latents)
        return self.image_processor.postprocess(images, output_type=output_type)

    def _labels(self, labels: int | list[int] | None, batch: int) -> Tensor | None:
        """The labels `(B,)` that were given."""
        classes = self.unet.config.num_class_embeds
        if labels is None:
            return None
        if classes is None:
            raise ValueError("This student knows no classes; leave class_labels out.")
        values = labels if isinstance(labels, list) else [labels] * batch
        if not all(isinstance(value, Integral) and 0 <= value < classes for value in values):
            raise ValueError(f"class_labels must be whole numbers from 0 to {classes - 1}, got {labels!r}.")
        return torch.tensor(values)


def _batch(**given: Any) -> int:
    """How many images are asked for: the number, or the length of everything that is given for each."""
    counts = {name: len(value) for name, value in given.items() if isinstance(value, list | Tensor)}
    if (size := given["batch_size"]) is not None:
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {size!r}.")
        counts["batch_size"] = size
    if len(set(counts.values())) > 1:
        raise ValueError(f"batch_size, class_labels, latents and generator must be equally many, got {counts}.")
    return next(iter(counts.values()), 1)
