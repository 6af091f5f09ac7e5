"""Gaussian noising processes x_t = alpha(t) x0 + sigma(t) noise, and the views of a network output.

Every process answers in float64 on the CPU, wherever its times are: not every device has float64. `as_like` and
`append_dims` bring an answer to the samples. `half_log_snr(t) = log(alpha / sigma)` falls with t; `time_at` is its inverse.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple, Protocol

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from cm_diffusers.errors import UserError


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")  # of variance-preserving processes; see `interpret`


class Process(Protocol):
    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def half_log_snr(self, t: Tensor) -> Tensor: ...
    def time_at(self, half_log_snr: Tensor) -> Tensor: ...


class Prediction(NamedTuple):
    """What a network output says about x_t: the clean data and the noise, both `(B, ...)`."""

    x0: Tensor
    noise: Tensor


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


@dataclass(frozen=True)
class EDM:
    """The variance-exploding process of EDM (2206.00364): alpha = 1, sigma = t."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(exact(t))

    def sigma(self, t: Tensor) -> Tensor:
        return exact(t)

    def half_log_snr(self, t: Tensor) -> Tensor:
        return -exact(t).log()

    def time_at(self, half_log_snr: Tensor) -> Tensor:
        return torch.exp(-exact(half_log_snr))


@dataclass(frozen=True)
class TrigFlow:
    """The process of sCM (2410.11081, Sec. 3.1): x = cos(t) x0 + sigma_data sin(t) noise, t in [0, pi / 2].

    Data of standard deviation sigma_data have it at all times; `trigflow` sees networks in these coordinates.
    """

    sigma_data: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(exact(t))

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.sin(exact(t))

    def half_log_snr(self, t: Tensor) -> Tensor:
        return -torch.log(self.sigma_data * torch.tan(exact(t)))

    def time_at(self, half_log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-exact(half_log_snr)) / self.sigma_data)


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


def exact(times: Tensor) -> Tensor:
    """Times, or what is computed of them, in float64 on the CPU."""
    return times.cpu().double()


@cache
def home_of_float64(device: torch.device) -> torch.device:
    """The device itself, or the CPU where it has no float64, as Apple's GPUs."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return torch.device("cpu")
    return device


def doubled(samples: Tensor) -> Tensor:
    """In float64, where they are or on the CPU: for sums over samples, which coefficients do without."""
    return samples.to(home_of_float64(samples.device)).double()


def as_like(values: Tensor, like: Tensor) -> Tensor:
    """In the dtype and on the device of `like`: cast first, as its device may have no float64."""
    return moved_to(values.to(like.dtype), like)


def moved_to(values: Tensor, like: Tensor) -> Tensor:
    """On the device of `like`, without waiting for it."""
    return values.to(like.device, non_blocking=like.is_cuda)  # which copies from the CPU before it returns


def append_dims(values: Tensor, like: Tensor) -> Tensor:
    """Shape per-sample values `(B,)` as `(B, 1, ...)`, in dtype and on the device of `like`, so that they multiply it."""
    return as_like(values.reshape(-1, *[1] * (like.ndim - 1)), like)


def diffuse(process: Process, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t `(B, ...)` from clean data and noise at times t `(B,)`."""
    return append_dims(process.alpha(t), x0) * x0 + append_dims(process.sigma(t), x0) * noise


def diffuse_further(process: Process, x_s: Tensor, noise: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """x_t `(B, ...)` from x_s by fresh noise, at times t at or above s, each `(B,)`."""
    kept = process.alpha(t) / process.alpha(s)
    fresh = (process.sigma(t) ** 2 - (kept * process.sigma(s)) ** 2).clamp(min=0).sqrt()
    return append_dims(kept, x_s) * x_s + append_dims(fresh, x_s) * noise


def interpret(process: Process, output: Tensor, x_t: Tensor, t: Tensor, prediction_type: str) -> Prediction:
    """What `output` `(B, ...)` at x_t says about clean data and noise.

    Args:
        prediction_type: "epsilon" (the noise), "sample" (the data), or "v_prediction"
            (v = alpha noise - sigma x0, 2202.00512; needs alpha^2 + sigma^2 = 1), or "flow_prediction" (noise - x0,
            2209.03003; needs alpha + sigma = 1).
    """
    alpha, sigma = append_dims(process.alpha(t), x_t), append_dims(process.sigma(t), x_t)
    if prediction_type == "epsilon":
        return Prediction((x_t - sigma * output) / alpha, output)
    if prediction_type == "v_prediction":
        return Prediction(alpha * x_t - sigma * output, alpha * output + sigma * x_t)
    if prediction_type == "sample":
        return Prediction(output, (x_t - alpha * output) / sigma)
    if prediction_type == "flow_prediction":
        return Prediction(x_t - sigma * output, x_t + alpha * output)
    known = ", ".join((*PREDICTION_TYPES, "flow_prediction"))
    raise UserError(f"Unknown prediction_type {prediction_type!r}; one of {known}.")
