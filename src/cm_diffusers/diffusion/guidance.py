"""Classifier-free guidance (2207.12598).

The one note on conventions: w = 0 means no guidance here, as in the LCM paper (2310.04378, Sec. 4.2):
x0 = (1 + w) x0(c) - w x0(empty). diffusers' `guidance_scale` is w + 1, so 1 means none. Its pipelines embed
`guidance_scale - 1`, which is the w of this package; `guidance_embedding` is the same function.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cm_diffusers.diffusion.process import Prediction, append_dims, exact


Conditions = dict[str, Tensor]
Denoiser = Callable[[Tensor, Tensor], Prediction]  # (x_t, t) -> Prediction
ConditionalDenoiser = Callable[[Tensor, Tensor, Conditions], Prediction]


def combine_linear(conditional: Prediction, unconditional: Prediction, w: Tensor, t: Tensor) -> Prediction:
    """Guidance of w `(B,)`, which is the same in data, noise and velocity."""
    pairs = zip(conditional, unconditional, strict=True)
    return Prediction(*(with_cond + append_dims(w, with_cond) * (with_cond - without) for with_cond, without in pairs))


Combine = Callable[[Prediction, Prediction, Tensor, Tensor], Prediction]  # (conditional, unconditional, w, t)


def guide(
    denoise: ConditionalDenoiser, cond: Conditions, uncond: Conditions, w: Tensor, combine: Combine = combine_linear
) -> Denoiser:
    """A guided denoiser that evaluates both branches as one batch of 2B.

    Args:
        denoise: (x_t, t, conditions) -> Prediction.
        cond, uncond: Network arguments of the two branches, each `(B, ...)`.
        w: Guidance strengths `(B,)`; 0 is the conditional branch alone, -1 the unconditional one.
        combine: Of the branches; some pipelines rescale.
    """
    both = {name: torch.cat([cond[name], uncond[name]]) for name in cond}

    def guided(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        with_cond, without = zip(*(values.chunk(2) for values in prediction), strict=True)
        return combine(Prediction(*with_cond), Prediction(*without), w, t)

    return guided


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding `(B, dim)` of guidance strengths w `(B,)`, as diffusers' LCM pipelines compute it."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=w.dtype, device=w.device) * -(math.log(10000.0) / (half - 1)))
    angles = 1000.0 * w[:, None] * frequencies
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def target_embedding(s: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding `(B, dim)` of the timesteps s `(B,)` where jumps end, of frequencies from 1 to 1e-4, in float64."""
    return guidance_embedding(exact(s) / 1000, dim)
