"""One step of the probability-flow ODE from t down to s, for any process and any denoiser (x_t, t) -> Prediction.

`step(denoise, process, x_t, t, s) -> x_s` with x `(B, ...)` and times `(B,)`. They make distillation targets;
sampling is the schedulers' work.
"""

import torch
from torch import Tensor

from cm_diffusers.guidance import Denoiser
from cm_diffusers.process import Process, append_dims


def ddim_step(denoise: Denoiser, process: Process, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """DDIM with eta = 0 (2010.02502, Eq. 12): x_s = alpha_s x0 + sigma_s noise. First order, one evaluation."""
    x0, noise = denoise(x_t, t)
    return append_dims(process.alpha(s), x_t) * x0 + append_dims(process.sigma(s), x_t) * noise


def heun_step(denoise: Denoiser, process: Process, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Heun's method (2206.00364, Alg. 1) on d(x / alpha) = noise d(sigma / alpha). Second order, two evaluations."""
    alpha_t, alpha_s = process.alpha(t), process.alpha(s)
    x0, noise = denoise(x_t, t)
    euler = append_dims(alpha_s, x_t) * x0 + append_dims(process.sigma(s), x_t) * noise
    slope = (noise + denoise(euler, s).noise) / 2
    step = process.sigma(s) - alpha_s * process.sigma(t) / alpha_t
    return append_dims(alpha_s / alpha_t, x_t) * x_t + append_dims(step, x_t) * slope


def dpm_2s_step(denoise: Denoiser, process: Process, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """DPM-Solver++ 2S (2211.01095, Alg. 1, midpoint in half log-SNR). Second order, two evaluations."""
    half_t, half_s = process.half_log_snr(t), process.half_log_snr(s)
    m = process.time_at((half_t + half_s) / 2)
    h = half_s - half_t

    def exponential_step(x0: Tensor, end: Tensor, span: Tensor) -> Tensor:
        shrink = append_dims(process.sigma(end) / process.sigma(t), x_t)
        return shrink * x_t - append_dims(process.alpha(end) * torch.expm1(-span), x_t) * x0

    middle = exponential_step(denoise(x_t, t).x0, m, h / 2)
    return exponential_step(denoise(middle, m).x0, s, h)


SOLVERS = {"ddim": ddim_step, "heun": heun_step, "dpm_2s": dpm_2s_step}
