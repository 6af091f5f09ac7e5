"""Noise that the frames of a clip share: for the start of sampling, and for all noise injected after it.

Fresh noise in every step undoes what frames had in common at the start (with AnimateDiff's betas and four steps, 98
percent of the variance after the first step is new). Each function here makes a `NoiseSampler`, which draws noise of
one and the same structure whenever it is called: `ConsistencyVideoPipeline` uses it for both, any other pipeline can as
`ConsistencyScheduler.noise_sampler`. Each frame's noise is standard normal.
"""

import math
from collections.abc import Callable
from numbers import Real

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from cm_diffusers.errors import UserError
from cm_diffusers.pipelines.checks import check_whole
from cm_diffusers.schedulers.stepping import NoiseSampler


def shuffled_frames(window: int, stride: int, seed: int = 0) -> NoiseSampler:
    """FreeNoise's sharing (2310.15169, Eq. 7): the first frames' noise returns later, in local shuffles.

    Of the frames from any multiple of `stride` on, each `window` in succession hold every noise once.

    Args:
        window: Frames with noise of their own, as many as the motion modules see at once.
        stride: Frames that are shuffled among themselves, at most `window`.
        seed: Of the shuffles, which are the same in every call and for every clip of a batch.

    Raises:
        ValueError: `window` or `stride` is no whole number of at least 1, or the stride is the larger one.
    """
    check_whole(1, window=window, stride=stride)
    if stride > window:
        raise UserError(f"stride must be at most window, whose noise it shuffles; got {stride} and {window}.")
    return _returning(window, lambda frames: _shuffled(frames, window, stride, seed))


def repeated_frames(window: int) -> NoiseSampler:
    """Noise with the period `window`: frame f has that of frame f - window.

    Raises:
        ValueError: `window` is no whole number of at least 1.
    """
    check_whole(1, window=window)
    return _returning(window, lambda frames: [frame % window for frame in range(frames)])


def mixed_frames(alpha: float = 1.0) -> NoiseSampler:
    """Noise of its own in each frame, and one that all have in common, in the ratio 1 to `alpha` (2305.10474, Eq. 2).

    Any two frames correlate by alpha^2 / (1 + alpha^2).

    Raises:
        ValueError: `alpha` is negative or not finite.
    """
    own, common = _shares(alpha)

    def sample(
        shape: torch.Size, generator: Generator | list[Generator] | None, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        noise = _drawn(shape, shape[2] + 1, generator, device, dtype)
        return common * noise[:, :, :1] + own * noise[:, :, 1:]

    return sample


def progressive_frames(alpha: float = 2.0) -> NoiseSampler:
    """Noise that drifts: each frame's is the last one's and one of its own, in the ratio `alpha` to 1 (2305.10474, Eq. 3).

    Frames n apart correlate by (alpha^2 / (1 + alpha^2))^(n / 2).

    Raises:
        ValueError: `alpha` is negative or not finite.
    """
    own, kept = _shares(alpha)

    def sample(
        shape: torch.Size, generator: Generator | list[Generator] | None, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        noise = _drawn(shape, shape[2], generator, device, dtype)
        for frame in range(1, shape[2]):
            noise[:, :, frame] = kept * noise[:, :, frame - 1] + own * noise[:, :, frame]
        return noise

    return sample


def _returning(window: int, order: Callable[[int], list[int]]) -> NoiseSampler:
    """Noise of `window` frames, in the order that `order` says for a number of frames."""

    def sample(
        shape: torch.Size, generator: Generator | list[Generator] | None, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        return _drawn(shape, min(window, shape[2]), generator, device, dtype)[:, :, order(shape[2])]

    return sample


def _shuffled(frames: int, window: int, stride: int, seed: int) -> list[int]:
    shuffles, order = Generator().manual_seed(seed), list(range(window))
    while len(order) < frames:
        block = order[len(order) - window :][:stride]
        order += [block[place] for place in torch.randperm(stride, generator=shuffles)]
    return order[:frames]


def _drawn(
    shape: torch.Size,
    frames: int,
    generator: Generator | list[Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Independent noise of `frames` frames."""
    if len(shape) != 5:
        raise UserError(f"Frames share noise in clips (B, C, F, h, w); here the shape is {tuple(shape)}.")
    return randn_tensor((*shape[:2], frames, *shape[3:]), generator=generator, device=device, dtype=dtype)


def _shares(alpha: float) -> tuple[float, float]:
    """Standard deviations of the own and of the common part."""
    if not isinstance(alpha, Real) or not 0 <= alpha < math.inf:
        raise UserError(f"alpha must be a number of at least 0, where 0 shares nothing; got {alpha!r}.")
    size = math.sqrt(1 + alpha**2)
    return 1 / size, alpha / size
