"""Few-step sampling of students of flow-matching teachers, x = (1 - t) x0 + t noise, inside the stock pipelines."""

import math
from collections.abc import Callable, Sequence
from hashlib import sha256
from numbers import Integral

import torch
from diffusers import SchedulerMixin  # noqa: F401 (diffusers looks for it where saved pipelines lead)
from diffusers.configuration_utils import register_to_config
from torch import Generator, Tensor

from cm_diffusers.diffusion.times import shifted
from cm_diffusers.errors import UserError
from cm_diffusers.schedulers.noise_levels import checked
from cm_diffusers.schedulers.stepping import ToldScheduler, refuse_gamma
from cm_diffusers.schedulers.timesteps import check_strength


LEAST_SIGMA = 1e-6
AS_FLOAT32 = 1e-6  # what a time of at most 1 may lose there


class FlowConsistencyScheduler(ToldScheduler):
    """Multistep sampling of a network that predicts the velocity v = noise - x0 of rectified flow (2209.03003).

    A step from t to t' denoises, D = x - t v, goes along the straight line to s = (1 - gamma) t', and from there by fresh
    noise up to t'::

        x_s = D + s / t (x - D),    x' = a x_s + sqrt(t'^2 - (a s)^2) z,    a = (1 - t') / (1 - s)

    gamma = 1 is consistency sampling, (1 - t') D + t' z, as `FlowMatchEulerDiscreteScheduler` with `stochastic_sampling`
    has it; gamma = 0 is Euler's x + (t' - t) v, for a student that knows the flow between any two times. An exact
    consistency function ends with too much variance below gamma = 1. The last step adds no noise and draws none.

    The times are those of u = 1, 1 - 1/n, ..., 1/n, shifted once, k u / (1 + (k - 1) u) with k = `shift`. The shift is the
    student's own, as in training: nothing of the pipeline, neither the size of the image nor the number of steps, changes it.

    Most stock pipelines keep their generator from the scheduler. Without one the noise of a row comes from a seed that is
    a hash of the row's first latents: what a pipeline starts from decides all that follows, in a batch as alone. Nothing
    is ever drawn from torch's own generator.

    Args:
        shift: As in training; 1 is none. For a student of one that shifts dynamically e^mu.
        gamma: The share of fresh noise, 0 to 1.
        num_train_timesteps: What the network is told of t = 1, before the pipeline's own scaling.
        recommended_sigmas: What `set_timesteps` takes when it is given none, or no more than their number: u's, before the
            shift, as `sigmas` there.
        original_inference_steps: Points of the grid that the student was distilled on, for who trains it further.
        use_dynamic_shifting, shift_terminal, invert_sigmas: Of stock configs; only the values that change nothing.

    Attributes:
        sigmas: The noise levels t `(steps + 1,)` in float64, the last is 0.
        timesteps: What the network is told of them `(steps,)`: `num_train_timesteps` times t, float32.
        noise_sampler: As in `ConsistencyScheduler`.
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler", "FlowMapEulerDiscreteScheduler"]
    _level_name = "sigma"
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        *,  # what is given by position diffusers takes for a default, which from_config forgets
        shift: float,
        gamma: float = 1.0,
        num_train_timesteps: int = 1000,
        recommended_sigmas: list[float] | None = None,
        original_inference_steps: int = 50,
        use_dynamic_shifting: bool = False,
        shift_terminal: float | None = None,
        invert_sigmas: bool = False,
    ) -> None:
        if not 0 < shift < math.inf:
            raise UserError(
                f"shift must be above 0 and finite, got {shift}; give the one that the student was trained with."
            )
        if use_dynamic_shifting or shift_terminal or invert_sigmas:
            raise UserError(
                "A student has one shift of its own, but this config has use_dynamic_shifting, shift_terminal or "
                "invert_sigmas; build FlowConsistencyScheduler(shift=...) with the shift of its training instead."
            )
        if recommended_sigmas is not None:
            checked(recommended_sigmas, LEAST_SIGMA, 1.0)
        self._prepare(gamma)
        self._set_schedule([1.0], device=None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
        strength: float = 1.0,
        gamma: float | None = None,
    ) -> None:
        """Choose the times of the next sampling run; without any, those the student recommends.

        Args:
            num_inference_steps: So many times: the recommended ones if they are so many, else of an even grid.
            sigmas: u's instead, descending from 1; each is shifted once, as in the stock schedulers. An even grid from 1,
                which many stock pipelines pass, counts as its number alone.
            mu: Without effect: what a pipeline makes of the size of the image is a shift of the teacher's.
            timesteps: What the network is told instead, descending, `num_train_timesteps` t: not shifted, and each is the
                time of its step. With `sigmas` both must say the same.
            strength: The grid starts at u = strength: so noisy an image starts as in the stock pipelines at this strength,
                but all steps that are asked for are taken.
            gamma: For this run, instead of the config's.

        Raises:
            ValueError: An argument is out of range, or the ways to choose contradict each other.
        """
        if num_inference_steps is None and sigmas is None and timesteps is None:
            sigmas = self.config.recommended_sigmas
        check_strength(strength)
        if strength < 1 and (sigmas is not None or timesteps is not None):
            raise UserError(
                f"A strength of {strength} goes with num_inference_steps, not with sigmas or timesteps of yours."
            )
        if timesteps is not None:
            schedule = self._levels_told(timesteps)
        else:
            schedule = self._shifted(self._even(num_inference_steps, strength) if sigmas is None else sigmas)
        if timesteps is not None and sigmas is not None:
            _check_agreement(schedule, self._shifted(sigmas))
        if num_inference_steps not in (None, len(schedule)):
            raise UserError(
                f"num_inference_steps is {num_inference_steps}, but {len(schedule)} times are given; leave it out."
            )
        self.gamma = refuse_gamma(self.config.gamma if gamma is None else gamma)
        self.num_inference_steps = len(schedule)
        self.custom_timesteps = sigmas is not None or timesteps is not None
        self._set_schedule(schedule, device)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample `(B, ...)` itself."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t `(B, ...)` from clean data and noise `(B, ...)` at `timesteps` `(B,)`, of the schedule or not.

        Raises:
            ValueError: The timesteps are integers.
        """
        t, dtype = self._levels_at(timesteps).reshape(-1, *[1] * (noise.ndim - 1)), self._precision(original_samples)
        alpha, sigma = (factor.to(dtype).to(noise.device) for factor in (1 - t, t))
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise`, as image-to-image pipelines of flow-matching networks call it."""
        return self.add_noise(sample, noise, timestep)

    def _even(self, count: int | None, strength: float) -> list[float]:
        """u's: those recommended, or an even grid."""
        if count is None:
            raise UserError("Give num_inference_steps, sigmas or timesteps.")
        if not isinstance(count, Integral) or count < 1:
            raise UserError(f"num_inference_steps must be a whole number of at least 1, got {count!r}.")
        recommended = self.config.recommended_sigmas or []
        if strength == 1 and len(recommended) == count:
            return recommended
        return [strength * (1 - i / count) for i in range(count)]

    def _shifted(self, sigmas: Sequence[float]) -> list[float]:
        values = checked(sigmas, LEAST_SIGMA, 1.0)
        grid = [1 - i / len(values) for i in range(len(values))]
        if all(abs(a - b) < AS_FLOAT32 for a, b in zip(values, grid, strict=True)):
            values = self._even(len(values), 1.0)
        return shifted(torch.tensor(values, dtype=torch.float64), self.config.shift).tolist()

    def _levels_told(self, timesteps: Sequence[float]) -> list[float]:
        most = self.config.num_train_timesteps
        return [t / most for t in checked(timesteps, LEAST_SIGMA * most, float(most), "timesteps")]

    def _set_schedule(self, schedule: list[float], device: str | torch.device | None) -> None:
        self._restart(schedule)
        self._digests: list[bytes] | None = None
        self.sigmas = torch.tensor([*schedule, 0.0], dtype=torch.float64)
        self.timesteps = self.sigma_to_t(schedule).to(torch.float32).to(device)

    def _told(self, levels: Tensor) -> Tensor:
        return levels * self.config.num_train_timesteps

    def _levels(self, told: Tensor) -> Tensor:
        return told / self.config.num_train_timesteps

    def _levels_of(self, sigmas: Tensor) -> Tensor:
        return sigmas

    def _precision(self, sample: Tensor) -> torch.dtype:
        return torch.promote_types(sample.dtype, torch.float32)

    def _denoise(self, output: Tensor, t: float, x: Tensor) -> Tensor:
        """D = x - t v."""
        return x - t * output

    def _move(self, denoised: Tensor, x: Tensor, index: int, draw: Callable[[], Tensor]) -> Tensor:
        """The sample at the next time."""
        if index + 1 == len(self._schedule):
            return denoised
        t, following = self._schedule[index : index + 2]
        s = (1 - self.gamma) * following
        kept = (1 - following) / (1 - s)
        result = kept * (denoised + s / t * (x - denoised)) if s > 0 else kept * denoised
        fresh = max(following**2 - (kept * s) ** 2, 0.0) ** 0.5
        return result + fresh * draw() if self.gamma > 0 else result

    def _draw(self, sample: Tensor, generator: Generator | list[Generator] | None) -> Tensor:
        if generator is None and self.noise_sampler is None:
            generator = self._seeded(sample)
        return super()._draw(sample.to(self._precision(sample)), generator)

    def _seeded(self, sample: Tensor) -> list[Generator]:
        """A generator for each row `(B,)`, whose seed tells the row's first latents and the step."""
        if self._digests is None:
            rows = sample.detach().to(self._precision(sample)).cpu().contiguous()
            self._digests = [sha256(row.numpy().tobytes()).digest() for row in rows]
        step = self._step_index.to_bytes(4, "little")
        seeds = [int.from_bytes(sha256(digest + step).digest()[:8], "little") for digest in self._digests]
        return [Generator().manual_seed(seed) for seed in seeds]


def _check_agreement(told: list[float], of_sigmas: list[float]) -> None:
    if len(told) != len(of_sigmas) or any(abs(a - b) > AS_FLOAT32 for a, b in zip(told, of_sigmas, strict=True)):
        raise UserError(
            f"The timesteps are those of sigmas {told}, but sigmas, shifted once, are {of_sigmas}; give one."
        )
