# Written by `make single-files` in cm_diffusers, from pipeline_sources/consistency_editing.py: change that, not this.
"""Zero-shot editing with consistency models: inpainting, colorization and super-resolution, without installing cm_diffusers.

A single file for `custom_pipeline` (2303.01469, Algorithm 4 and Appendix D). It needs diffusers alone and takes folders of
`ConsistencyModelPipeline` in pixels, and those of cm_diffusers:

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        "openai/diffusers-cd_bedroom256_l2", custom_pipeline="pipelines/consistency_editing.py", trust_remote_code=True
    )
    image = pipe("inpainting", photo, mask_image=mask).images[0]  # new where the mask is white
    image = pipe("colorization", photo.convert("L")).images[0]
    image = pipe("super-resolution", photo.resize((64, 64))).images[0]  # to the size of the network

What is given stays: the pixels outside the mask, the grey of every pixel, the mean of every block. The paper writes it as
A^-1 [(A y)(1 - mask) + (A x) mask] with an orthogonal A whose first rows are what is known of y; only the plane that they
span matters, so here x moves onto it by the shortest way.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Protocol

import numpy as np
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConfigMixin,
    DiffusionPipeline,
    ImagePipelineOutput,
    LCMScheduler,
    SchedulerMixin,
    SCMScheduler,
    UNet2DModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils import BaseOutput, logging
from diffusers.utils.import_utils import DummyObject
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d


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


TASKS = ("inpainting", "colorization", "super-resolution")
GREY = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601, as PIL has it; the paper's 0.2989 is this, cut
STEPS = 40  # of the paper's grids for images
IN_EDM = {"boundary_scalings": "edm", "num_train_timesteps": STEPS}  # the same network as one of sCM
Change = Callable[[Tensor], Tensor]


def inpainting(image: Tensor, mask: Tensor) -> tuple[Change, Change]:
    """What puts the known into x `(B, C, H, W)`, and what also keeps it there in [-1, 1].

    Args:
        image: `(B, C, H, W)` in [-1, 1].
        mask: `(B, 1, H, W)`, above 0.5 where it is unknown.
    """

    def replace(x: Tensor) -> Tensor:
        return torch.where(mask > 0.5, x, image)

    return replace, lambda x: replace(x).clamp(-1, 1)


def colorization(grey: Tensor) -> tuple[Change, Change]:
    """As `inpainting`, for a known grey `(B, 1, H, W)` in [-1, 1] of x `(B, 3, H, W)`."""
    weights = torch.tensor(GREY).view(1, 3, 1, 1).to(grey)

    def replace(x: Tensor) -> Tensor:
        return x + weights * (grey - (weights * x).sum(1, keepdim=True)) / weights.square().sum()

    return replace, lambda x: _within(replace(x), grey, lambda shares: shares.amin(1, keepdim=True))


def super_resolution(small: Tensor, factor: int) -> tuple[Change, Change]:
    """As `inpainting`, for known means `(B, C, h, w)` in [-1, 1] of the blocks of x `(B, C, h * factor, w * factor)`."""

    def enlarged(values: Tensor) -> Tensor:
        return interpolate(values, scale_factor=factor)

    def replace(x: Tensor) -> Tensor:
        return x + enlarged(small - avg_pool2d(x, factor))

    return replace, lambda x: _within(
        replace(x), enlarged(small), lambda shares: -enlarged(max_pool2d(-shares, factor))
    )


def _within(x: Tensor, known: Tensor, least: Change) -> Tensor:
    """x, drawn to `known` as far as it takes to come into [-1, 1]; `least` makes one share of those that belong together."""
    shares = torch.where(x.abs() > 1, (x.sign() - known) / (x - known), 1.0)
    return known + least(shares) * (x - known)


class ConsistencyEditingPipeline(DiffusionPipeline):
    """Edits images with a consistency model that was not trained for it.

    Args:
        unet: Of pixels, 1 or 3 channels.
        scheduler: Carries the fields that `EDMConsistencyScheduler` or `TrigFlowConsistencyScheduler` samples by.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: CMStochasticIterativeScheduler | SCMScheduler) -> None:
        super().__init__()
        if unet.config.in_channels not in (1, 3):
            raise ValueError(
                f"Zero-shot editing holds pixels fast, and this network of {unet.config.in_channels} channels sees none; "
                "take a consistency model of pixels."
            )
        self.register_modules(unet=double_normed(unet), scheduler=scheduler)
        how = {"do_resize": False, "vae_scale_factor": 1}
        colored = unet.config.in_channels == 3
        self.image_processor = VaeImageProcessor(do_convert_rgb=colored, do_convert_grayscale=not colored, **how)
        self.mask_processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True, **how)

    @torch.no_grad()
    def __call__(
        self,
        task: str,
        image: PipelineImageInput,
        mask_image: PipelineImageInput | None = None,
        class_labels: int | list[int] | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        generator: Generator | list[Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Edited images.

        Args:
            task: "inpainting", "colorization" or "super-resolution".
            image: PIL images, arrays (N, H, W, C) or tensors (N, C, H, W) in [0, 1], of the network's size; for
                super-resolution a whole number of times smaller.
            mask_image: For inpainting, white where the image is to be made anew.
            class_labels: One for all images or one for each, where the network knows classes.
            num_inference_steps: By default those of the training grid, at most 40.
            timesteps, sigmas: As for the scheduler, instead of a number of steps.
            generator: Draws all noise; one for each image makes it independent of its batch.
            output_type: "pil", "np" (N, H, W, C) or "pt" (N, C, H, W), both in [0, 1].
            return_dict: False for a tuple.

        Raises:
            ValueError: The request is malformed, or the network cannot fulfil it.
        """
        device = self._execution_device
        replace, finish = self._known(task, image, mask_image, device)
        scheduler = self._silent_scheduler(device, num_inference_steps, timesteps, sigmas)
        known = replace(torch.zeros(1, self.unet.config.in_channels, *self._size, device=device))
        labels = self._labels(class_labels, len(known), device)
        if isinstance(generator, list) and len(generator) != len(known):
            raise ValueError(
                f"Found {len(generator)} generators for {len(known)} images; give one for each, or a single."
            )
        levels = scheduler.sigmas.tolist()
        x = known + levels[0] * randn_tensor(known.shape, generator=generator, device=device)
        for i, t in enumerate(self.progress_bar(scheduler.timesteps)):
            shown = scheduler.scale_model_input(x, t).to(self.unet.dtype)
            output = self.unet(shown, t, class_labels=labels, return_dict=False)[0]
            x = replace(scheduler.step(output.float(), t, x).denoised)
            if i + 1 < len(scheduler.timesteps):
                std = (levels[i + 1] ** 2 - levels[-1] ** 2) ** 0.5
                x = x + std * randn_tensor(x.shape, generator=generator, device=device)
        images = self.image_processor.postprocess(finish(x), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def _size(self) -> tuple[int, int]:
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def _known(
        self, task: str, image: PipelineImageInput, mask: PipelineImageInput | None, device: torch.device
    ) -> tuple[Change, Change]:
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}.")
        if (mask is None) == (task == "inpainting"):
            raise ValueError(
                "Inpainting needs a mask_image, white where the image is to be made anew; others take none."
            )
        pixels, channels = self.image_processor.preprocess(image).to(device), self.unet.config.in_channels
        if task == "colorization":
            if channels != 3:
                raise ValueError("This network sees grey images only; colorization needs one of 3 channels.")
            self._check_size("image", pixels)
            return colorization((torch.tensor(GREY, device=device).view(1, 3, 1, 1) * pixels).sum(1, keepdim=True))
        if pixels.shape[1] != channels:
            raise ValueError(f"The image must have {channels} channels, but it has {pixels.shape[1]}.")
        if task == "super-resolution":
            return super_resolution(pixels, self._factor(pixels))
        unknown = self.mask_processor.preprocess(mask).to(device)
        self._check_size("image", pixels)
        self._check_size("mask", unknown)
        return inpainting(pixels, unknown)

    def _check_size(self, name: str, pixels: Tensor) -> None:
        if (found := tuple(pixels.shape[2:])) != self._size:
            raise ValueError(f"The {name} must have the network's size {self._size}, but it is {found}; resize it.")

    def _factor(self, small: Tensor) -> int:
        size, found = self._size, tuple(small.shape[2:])
        factor = size[0] // found[0]
        if factor < 2 or (found[0] * factor, found[1] * factor) != size:
            raise ValueError(f"The image must be a whole number of times smaller than {size}, but it is {found}.")
        return factor

    def _silent_scheduler(
        self, device: torch.device, steps: int | None, timesteps: list[int] | None, sigmas: list[float] | None
    ) -> EDMConsistencyScheduler:
        """One whose steps draw no noise, with its noise levels chosen."""
        changes = IN_EDM if isinstance(self.scheduler, SCMScheduler) else {}
        scheduler = EDMConsistencyScheduler.from_config(self.scheduler.config, gamma=0.0, **changes)
        if steps is None and timesteps is None and sigmas is None:
            steps = min(STEPS, scheduler.config.num_train_timesteps)
        scheduler.set_timesteps(steps, device, timesteps, sigmas)
        return scheduler

    def _labels(self, labels: int | list[int] | None, batch: int, device: torch.device) -> Tensor | None:
        classes = self.unet.config.num_class_embeds
        if (labels is None) != (classes is None):
            raise ValueError("Give class_labels exactly where the network knows classes.")
        if labels is None:
            return None
        values = [labels] * batch if isinstance(labels, int) else list(labels)
        if len(values) != batch or not all(0 <= value < classes for value in values):
            raise ValueError(f"class_labels must be {batch} numbers from 0 to {classes - 1}, or one; got {labels}.")
        return torch.tensor(values, device=device)
