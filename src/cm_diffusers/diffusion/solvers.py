"""From t down to s, for any process and any denoiser (x_t, t) -> Prediction.

`SOLVERS` are steps of the probability-flow ODE: `step(denoise, process, x_t, t, s) -> x_s` with x `(B, ...)` and times
`(B,)`. `ddim_sde` and `er_sde` cross the same interval in several steps that may add noise. All of them make
distillation targets; sampling is the schedulers' work.

All of them start at pure noise, t = 1 of `RectifiedFlow`, too, and end at s = 0. At the end of other processes, where alpha
is 0 as well, `heun` and `dpm_2s` have no step.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Generator, Tensor

from cm_diffusers.diffusion.guidance import Denoiser
from cm_diffusers.diffusion.process import DiscreteVP, Process, RectifiedFlow, append_dims, exact, moved_to
from cm_diffusers.errors import UserError


def ddim_step(denoise: Denoiser, process: Process, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """DDIM with eta = 0 (2010.02502, Eq. 12): x_s = alpha_s x0 + sigma_s noise. First order, one evaluation."""
    x0, noise = denoise(x_t, t)
    return append_dims(process.alpha(s), x_t) * x0 + append_dims(process.sigma(s), x_t) * noise


def heun_step(denoise: Denoiser, process: Process, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Heun's method (2206.00364, Alg. 1) on d(x / alpha) = noise d(sigma / alpha). Second order, two evaluations.

    For rectified flow on dx = (noise - x0) dt, as sigma / alpha ends nowhere at t = 1: beside it the other loses its order.
    """
    alpha_t, alpha_s = process.alpha(t), process.alpha(s)
    x0, noise = denoise(x_t, t)
    euler = append_dims(alpha_s, x_t) * x0 + append_dims(process.sigma(s), x_t) * noise
    x0_s, noise_s = denoise(euler, s)
    slope = (noise + noise_s) / 2
    if isinstance(process, RectifiedFlow):
        return x_t + append_dims(exact(s) - exact(t), x_t) * (slope - (x0 + x0_s) / 2)
    step = process.sigma(s) - alpha_s * process.sigma(t) / alpha_t
    return append_dims(alpha_s / alpha_t, x_t) * x_t + append_dims(step, x_t) * slope


def dpm_2s_step(denoise: Denoiser, process: Process, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """DPM-Solver++ 2S (2211.01095, Alg. 1, midpoint in half log-SNR). Second order, two evaluations."""
    half_t, half_s = process.half_log_snr(t), process.half_log_snr(s)
    m = process.time_at(torch.nan_to_num((half_t + half_s) / 2, 0.0, math.inf, -math.inf))  # from inf to -inf: 0
    h = half_s - half_t

    def exponential_step(x0: Tensor, end: Tensor, span: Tensor) -> Tensor:
        shrink = append_dims(process.sigma(end) / process.sigma(t), x_t)
        return shrink * x_t - append_dims(process.alpha(end) * torch.expm1(-span), x_t) * x0

    middle = exponential_step(denoise(x_t, t).x0, m, h / 2)
    return exponential_step(denoise(middle, m).x0, s, h)


SOLVERS = {"ddim": ddim_step, "heun": heun_step, "dpm_2s": dpm_2s_step}


def sub_times(t: Tensor, s: Tensor, steps: int) -> Tensor:
    """`(steps + 1, B)` times from t down to s, evenly spaced; whole numbers where t and s are, so some may repeat."""
    share = torch.arange(steps + 1, dtype=torch.float64)[:, None] / steps
    times = torch.lerp(exact(t), exact(s), share)
    return times if t.is_floating_point() else times.round().long()


def ddim_noise(process: Process, t: Tensor, s: Tensor, eta: float) -> Tensor:
    """The standard deviation `(B,)` of the noise in a step of DDIM(eta) (2010.02502, Eq. 16), for any process."""
    kept = (process.alpha(t) / process.alpha(s)) ** 2
    if isinstance(process, DiscreteVP):
        fresh = 1 - kept
    else:  # the variance of x_t, given x_s; the paper's alpha^2 + sigma^2 is 1
        fresh = process.sigma(t) ** 2 - kept * process.sigma(s) ** 2
    return eta * process.sigma(s) / process.sigma(t) * fresh.clamp(min=0).sqrt()


def ddim_sde(
    denoise: Denoiser,
    process: Process,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    steps: int = 1,
    eta: float = 0.0,
    generator: Generator | None = None,
) -> Tensor:
    """DDIM(eta) (2010.02502, Eq. 12) in `steps` steps. First order, one evaluation a step.

    Args:
        eta: 0 is the ODE and draws no noise, 1 the posterior of DDPM.
        generator: Where noise is drawn from; torch's own if None.

    Raises:
        ValueError: eta is not between 0 and 1.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta is {eta} but must lie between 0 (no noise) and 1 (that of DDPM).")
    x = x_t
    for now, end in pairwise(sub_times(t, s, steps)):
        x0, noise = denoise(x, now)
        std = ddim_noise(process, now, end, eta)
        along = (process.sigma(end) ** 2 - std**2).clamp(min=0).sqrt()
        y = append_dims(process.alpha(end), x) * x0 + append_dims(along, x) * noise
        if eta > 0:
            y = y + append_dims(std, x) * _normal(x, generator)
        x = moved(now, end, x, y)
    return x


# phi(lam) of ER-SDE-Solvers (2309.06169), lam = sigma / alpha: "ode" adds no noise, "sde" as much as the reverse SDE of
# DDPM, "sde_5" something between that grows with lam.
NOISE_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "ode": lambda lam: lam,
    "sde": lambda lam: lam**2,
    "sde_5": lambda lam: lam * (torch.exp(lam**0.3) + 10),
}
QUADRATURE_POINTS = 100


def er_sde(
    denoise: Denoiser,
    process: Process,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    steps: int = 1,
    noise_scale: str = "sde_5",
    order: int = 2,
    generator: Generator | None = None,
) -> Tensor:
    """The extended reverse-time SDE (2309.06169, Alg. 1 and 2 in VP form) in `steps` steps, one evaluation each.

    Args:
        noise_scale: One of `NOISE_SCALES`; "ode" draws no noise.
        order: 2 follows the change of x0 over the last step, from the second step on; 1 does not.
        generator: Where noise is drawn from; torch's own if None.

    Raises:
        ValueError: An unknown noise scale or order.
    """
    for name, value, known in (("noise_scale", noise_scale, NOISE_SCALES), ("order", order, (1, 2))):
        if value not in known:
            raise UserError(f"Unknown {name} {value!r}; one of {', '.join(map(str, known))}.")
    phi, x, last = NOISE_SCALES[noise_scale], x_t, None
    for now, end in pairwise(sub_times(t, s, steps)):
        x0, alpha = denoise(x, now).x0, process.alpha(end)
        lam, lam_end = process.sigma(now) / process.alpha(now), process.sigma(end) / alpha
        all_noise = process.sigma(end) / process.sigma(now) if noise_scale == "ode" else 0.0  # what is kept of x then
        shrink = phi(lam_end) / phi(lam)
        kept = torch.where(lam.isinf(), all_noise, alpha / process.alpha(now) * shrink)
        y = append_dims(kept, x) * x + append_dims(alpha * (1 - shrink), x) * x0
        if order == 2 and last is not None:
            y = y + append_dims(alpha * _slope_weight(phi, lam, lam_end, last[1]), x) * (x0 - last[0])
        if noise_scale != "ode":
            old = torch.where(lam.isinf(), 0, lam * shrink)
            std = alpha * (lam_end**2 - old**2).clamp(min=0).sqrt()
            y = y + append_dims(std, x) * _normal(x, generator)
        x, last = moved(now, end, x, y), _latest(now, end, (x0, lam), last)
    return x


def _latest(now: Tensor, end: Tensor, new: tuple[Tensor, Tensor], old: tuple | None) -> tuple[Tensor, Tensor]:
    """What the last step that went anywhere found: a step without way would hide it."""
    return new if old is None else tuple(moved(now, end, o, n) for o, n in zip(old, new, strict=True))


def _slope_weight(phi: Callable[[Tensor], Tensor], lam: Tensor, lam_end: Tensor, lam_before: Tensor) -> Tensor:
    """What the last change of x0 counts `(B,)`: the integral of the slope's term over its denominator, or 0 over 0."""
    share = torch.linspace(0, 1, QUADRATURE_POINTS, dtype=lam.dtype)[:, None]
    grid = torch.lerp(lam_end, lam, share)
    decay = torch.where(lam_end == 0, 0, phi(lam_end) * torch.trapezoid(1 / phi(grid), grid, dim=0))
    term = lam_end - lam + decay
    change = lam - lam_before
    return torch.where(change == 0, 0, term / change)


def moved(now: Tensor, end: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """y where there was a way to go, x itself where rounding left none."""
    return torch.where(moved_to((now == end).reshape(-1, *[1] * (x.ndim - 1)), x), x, y)


def _normal(like: Tensor, generator: Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
