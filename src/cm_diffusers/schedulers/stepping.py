"""What all samplers share: the place in their schedule, and the noise that they draw."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.import_utils import DummyObject
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from cm_diffusers.errors import UserError


NoiseSampler = Callable[[torch.Size, Generator | list[Generator] | None, torch.device, torch.dtype], Tensor]


@dataclass
class ConsistencySchedulerOutput(BaseOutput):
    """What a step returns, both `(B, ...)`.

    Attributes:
        prev_sample: The sample at the next timestep of the schedule, or the result after the last one.
        denoised: The consistency function's answer f(x_t, t), without noise.
    """

    prev_sample: Tensor
    denoised: Tensor


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


def as_level(level: float) -> Tensor:
    return torch.tensor(level, dtype=torch.float64)


def on(device: str | torch.device | None, times: Tensor) -> Tensor:
    """Times in float64, but on a device that has none."""
    return times.to(device, torch.float32) if str(device).startswith("mps") else times.to(device)


def refuse_gamma(gamma: float) -> float:
    if not 0 <= gamma <= 1:
        raise UserError(f"gamma must be from 0 (deterministic) to 1 (fresh noise in every step), got {gamma}.")
    return gamma


def one_of(name: str, value: str | None, allowed: Sequence[str | None]) -> None:
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}.")
