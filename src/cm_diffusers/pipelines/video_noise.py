"""What draws the noise of a clip, at the start and in every step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from cm_diffusers.errors import UserError
from cm_diffusers.pipelines.frame_noise import repeated_frames, shuffled_frames
from cm_diffusers.pipelines.latents import Generators
from cm_diffusers.schedulers.stepping import NoiseSampler


def noise_sharing(pipe: DiffusionPipeline, asked: NoiseSampler | None) -> NoiseSampler | None:
    """What draws all noise of a run; with FreeNoise, by default its `noise_type`, which alone acts on the start only.

    Raises:
        ValueError: It is no function, or the scheduler or FreeInit draws noise itself.
    """
    sharing = _of_free_noise(pipe) if asked is None else asked
    if sharing is not None and not callable(sharing):
        raise UserError(
            "noise_sharing must be a function (shape, generator, device, dtype) -> noise, such as "
            f"cm_diffusers.pipelines.frame_noise.shuffled_frames(16, 4); got {sharing!r}."
        )
    if sharing is not None and not hasattr(pipe.scheduler, "noise_sampler"):
        raise UserError(
            f"{type(pipe.scheduler).__name__} draws noise that frames do not share; use a ConsistencyScheduler, or leave "
            "out noise_sharing (with FreeNoise: noise_type='random')."
        )
    if sharing is not None and pipe.free_init_enabled:
        raise UserError(
            "FreeInit draws noise that frames do not share: disable_free_init(), or leave out noise_sharing."
        )
    return sharing


def _of_free_noise(pipe: DiffusionPipeline) -> NoiseSampler | None:
    if not pipe.free_noise_enabled or pipe._free_noise_noise_type == "random":
        return None
    window = pipe._free_noise_context_length
    if pipe._free_noise_noise_type == "repeat_context":
        return repeated_frames(window)
    return shuffled_frames(window, pipe._free_noise_context_stride)


def initial_noise(
    sharing: NoiseSampler | None,
    shape: tuple[int, ...],
    generator: Generators,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Noise of this shape (B, C, F, h, w), shared or independent."""
    noise = (sharing or _independent)(torch.Size(shape), generator, device, dtype)
    if noise.shape != shape:
        raise UserError(f"noise_sharing must return noise of {shape}, got {tuple(noise.shape)}.")
    return noise


def _independent(shape: torch.Size, generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    return randn_tensor(shape, generator=generator, device=device, dtype=dtype)


@contextmanager
def injecting(scheduler: SchedulerMixin, sharing: NoiseSampler | None) -> Iterator[None]:
    """The scheduler with this sampler of injected noise; None leaves it as it is."""
    if sharing is None:
        yield
        return
    before, scheduler.noise_sampler = scheduler.noise_sampler, sharing
    try:
        yield
    finally:
        scheduler.noise_sampler = before
