"""One step of sampling as a Gaussian policy: the law of what `scheduler.step` returns, and its densities.

A step that adds noise z returns mean + std z, where the network's output decides the mean alone. Every function is
pure: a scheduler that is read here is not changed.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SchedulerMixin,
    SCMScheduler,
    TCDScheduler,
)
from torch import Tensor

from cm_diffusers.diffusion.preconditioning import cm_scalings, lcm_scalings
from cm_diffusers.diffusion.process import DiscreteVP, Prediction, doubled, interpret
from cm_diffusers.errors import UserError
from cm_diffusers.schedulers import (
    ConsistencyScheduler,
    EDMConsistencyScheduler,
    FlowConsistencyScheduler,
    TrigFlowConsistencyScheduler,
)
from cm_diffusers.schedulers.stepping import SteppingScheduler


Reduction = Literal["sum", "mean"]
Parts = tuple[Tensor, float | Tensor, Tensor]  # mean, std and denoised


class Transition(NamedTuple):
    """The law N(mean, std^2 I) of the next sample.

    Attributes:
        mean: `(B, ...)`, float32.
        std: A number, float32, on the CPU, so that it can be asked about; 0 where the step adds no noise.
        denoised: The clean data that the network sees in the sample `(B, ...)`, float32.
    """

    mean: Tensor
    std: Tensor
    denoised: Tensor


def transition(
    scheduler: SchedulerMixin, index: int, model_output: Tensor, sample: Tensor, eta: float = 0.0
) -> Transition:
    """The law of `scheduler.step(model_output, scheduler.timesteps[index], sample).prev_sample`.

    It is computed in float64 whatever the dtypes (on the CPU where the device has none), sample by sample, and has a gradient in both tensors. At the last
    index std is 0 and mean the result of sampling, but where `step` itself adds noise there: `DDIMScheduler` without
    `set_alpha_to_one` may.

    Args:
        scheduler: One of `LAWS` or `LAWS_WITH_ETA`, after `set_timesteps`.
        index: Which of its steps, from 0.
        model_output: What `step` would get `(B, ...)`.
        sample: x_t `(B, ...)`.
        eta: As in `step` of `TCDScheduler` and `DDIMScheduler`, above 0; the others have none.

    Raises:
        ValueError: The scheduler is not known or adds no noise as it is set, or an argument does not fit it.
    """
    law = _law(scheduler, eta)
    _check_index(scheduler, index)
    _check_shapes("model_output", model_output, "the sample", sample)
    mean, std, denoised = law(scheduler, index, doubled(model_output), doubled(sample))
    mean, denoised = (part.float().to(sample.device) for part in (mean, denoised))
    return Transition(mean, torch.as_tensor(std).float(), denoised)


def draw(transition: Transition, noise: Tensor) -> Tensor:
    """The action mean + std noise `(B, ...)`, float32, for standard normal noise `(B, ...)`."""
    _check_shapes("noise", noise, "the transition", transition.mean)
    return transition.mean + transition.std * noise.float()


def log_prob(transition: Transition, action: Tensor, reduction: Reduction = "sum") -> Tensor:
    """The log density `(B,)` of actions `(B, ...)`, `doubled`: sums over a latent are too large for small differences else.

    Args:
        reduction: "sum" over a sample's elements, which is the density, or their "mean", as in DDPO (2305.13301).

    Raises:
        ValueError: The step adds no noise, or shapes differ.
    """
    _check_noise(transition)
    _check_shapes("action", action, "the transition", transition.mean)
    z = (action.float() - transition.mean) / transition.std
    return _reduced(-z.square() / 2 - transition.std.log() - math.log(2 * math.pi) / 2, reduction)


def kl_divergence(transition: Transition, reference: Transition, reduction: Reduction = "sum") -> Tensor:
    """`KL(transition || reference) = |mean - mean_ref|^2 / (2 std^2)` `(B,)` of two laws with one std, `doubled`.

    Raises:
        ValueError: The step adds no noise, or the laws are not of the same step.
    """
    _check_noise(transition)
    _check_shapes("reference", reference.mean, "the transition", transition.mean)
    if transition.std != reference.std:
        raise UserError(
            f"The two laws have std {transition.std:g} and {reference.std:g}; take the same scheduler, index and eta."
        )
    return _reduced(((transition.mean - reference.mean) / transition.std).square() / 2, reduction)


def _consistency(scheduler: SteppingScheduler, index: int, output: Tensor, x: Tensor) -> Parts:
    _check_own(scheduler)
    denoised = scheduler._denoise(output, scheduler._schedule[index], x)
    zero, one = torch.zeros((), dtype=x.dtype), torch.ones((), dtype=x.dtype)
    std = scheduler._move(zero, zero, index, lambda: one)  # a step is linear in f, x and the noise
    return scheduler._move(denoised, x, index, lambda: zero), std, denoised


def _lcm(scheduler: LCMScheduler, index: int, output: Tensor, x: Tensor) -> Parts:
    """alpha' f + sigma' z (2310.04378, Algorithm 3)."""
    t = int(scheduler.timesteps[index])
    c_skip, c_out = map(float, lcm_scalings(torch.tensor(t), scheduler.config.timestep_scaling))
    denoised = c_skip * x + c_out * _bounded(scheduler, _predicted(scheduler, t, output, x).x0)
    if index + 1 == scheduler.num_inference_steps:
        return denoised, 0.0, denoised
    following = scheduler.timesteps[index : index + 2][-1]  # t itself at the end of timesteps cut by strength
    signal = float(scheduler.alphas_cumprod[following])
    return signal**0.5 * denoised, (1 - signal) ** 0.5, denoised


def _tcd(scheduler: TCDScheduler, index: int, output: Tensor, x: Tensor, eta: float) -> Parts:
    """Along the noise to s = floor((1 - eta) t'), then by fresh noise to t' (2402.19159, Sec. 4.3); 0 ends it."""
    x0, noise = _predicted(scheduler, int(scheduler.timesteps[index]), output, x)
    following = torch.tensor([*scheduler.timesteps.tolist(), 0][index + 1])
    s = torch.floor((1 - eta) * following).long()  # rounds as the scheduler does
    signal, signal_s = float(scheduler.alphas_cumprod[following]), float(scheduler.alphas_cumprod[s])
    x_s = signal_s**0.5 * x0 + (1 - signal_s) ** 0.5 * noise
    return (signal / signal_s) ** 0.5 * x_s, (1 - signal / signal_s) ** 0.5, x0


def _ddim(scheduler: DDIMScheduler, index: int, output: Tensor, x: Tensor, eta: float) -> Parts:
    """2010.02502, Eqs. 12 and 16."""
    t = int(scheduler.timesteps[index])
    earlier = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    x0, noise = _predicted(scheduler, t, output, x)
    x0 = _bounded(scheduler, x0)
    signal_t = float(scheduler.alphas_cumprod[t])
    signal = float(scheduler.alphas_cumprod[earlier] if earlier >= 0 else scheduler.final_alpha_cumprod)
    std = eta * ((1 - signal) / (1 - signal_t) * (1 - signal_t / signal)) ** 0.5
    return signal**0.5 * x0 + max(1 - signal - std**2, 0.0) ** 0.5 * noise, std, x0


def _cm(scheduler: CMStochasticIterativeScheduler, index: int, output: Tensor, x: Tensor) -> Parts:
    """f + sqrt(sigma'^2 - sigma_min^2) z (2303.01469, Algorithm 1); no noise at sigma_min, which float32 rounds."""
    config = scheduler.config
    sigma, following = scheduler.sigmas[index : index + 2].tolist()
    c_skip, c_out = map(float, cm_scalings(torch.tensor(sigma), config.sigma_min, config.sigma_data))
    denoised = c_skip * x + c_out * output
    denoised = denoised.clamp(-1, 1) if config.clip_denoised else denoised
    at_end = following < config.sigma_min * (1 + 1e-6)
    return denoised, 0.0 if at_end else config.s_noise * (following**2 - config.sigma_min**2) ** 0.5, denoised


def _flow_match_lcm(scheduler: FlowMatchLCMScheduler, index: int, output: Tensor, x: Tensor) -> Parts:
    """(1 - sigma') x0 + sigma' z."""
    if scheduler._scale_factors and scheduler._upscale_mode:
        raise UserError("With scale_factors samples change their size; call scheduler.set_scale_factors(None, None).")
    sigma, following = scheduler.sigmas[index : index + 2].tolist()
    x0 = x - sigma * output
    return (1 - following) * x0, following, x0


def _scm(scheduler: SCMScheduler, index: int, output: Tensor, x: Tensor) -> Parts:
    """cos(s) x0 + sin(s) sigma_data z (2410.11081, Sec. 3.1)."""
    if scheduler.config.prediction_type != "trigflow":
        raise UserError(f"prediction_type is {scheduler.config.prediction_type!r}; SCMScheduler knows 'trigflow'.")
    t, s = scheduler.timesteps[index : index + 2].tolist()
    x0 = math.cos(t) * x - math.sin(t) * output
    return math.cos(s) * x0, math.sin(s) * scheduler.config.sigma_data, x0


# Called with the scheduler, the index, the output and the sample.
LAWS: dict[type[SchedulerMixin], Callable[..., Parts]] = {
    ConsistencyScheduler: _consistency,
    EDMConsistencyScheduler: _consistency,
    TrigFlowConsistencyScheduler: _consistency,
    FlowConsistencyScheduler: _consistency,
    LCMScheduler: _lcm,
    CMStochasticIterativeScheduler: _cm,
    FlowMatchLCMScheduler: _flow_match_lcm,
    SCMScheduler: _scm,
}
# And with eta, which is an argument of their step.
LAWS_WITH_ETA: dict[type[SchedulerMixin], Callable[..., Parts]] = {TCDScheduler: _tcd, DDIMScheduler: _ddim}


def _law(scheduler: SchedulerMixin, eta: float) -> Callable[..., Parts]:
    kind = type(scheduler)
    if kind in LAWS:
        return LAWS[kind]
    if kind not in LAWS_WITH_ETA:
        known = ", ".join(known.__name__ for known in (*LAWS, *LAWS_WITH_ETA))
        raise UserError(f"The noise in a step of {kind.__name__} is not known; take one of {known}.")
    if not 0 < eta <= 1:
        raise UserError(
            f"A step of {kind.__name__} is a policy with an eta above 0, where it is deterministic, and at most 1; got "
            f"{eta}."
        )
    return partial(LAWS_WITH_ETA[kind], eta=eta)


def _predicted(scheduler: SchedulerMixin, t: int, output: Tensor, x: Tensor) -> Prediction:
    kind = scheduler.config.prediction_type
    if kind == "epsilon" and scheduler.alphas_cumprod[t] == 0:
        raise UserError(
            f"Timestep {t} is pure noise (zero terminal SNR), where prediction_type 'epsilon' says nothing; use "
            "'v_prediction' or 'sample', or set rescale_betas_zero_snr=False."
        )
    schedule = DiscreteVP(scheduler.alphas_cumprod[t : t + 1].double())  # of that time alone
    return interpret(schedule, output, x, torch.tensor([0]), kind)


def _bounded(scheduler: SchedulerMixin, x0: Tensor) -> Tensor:
    if scheduler.config.thresholding:
        return scheduler._threshold_sample(x0)
    size = scheduler.config.clip_sample_range
    return x0.clamp(-size, size) if scheduler.config.clip_sample else x0


def _reduced(values: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("sum", "mean"):
        raise UserError(f"reduction must be 'sum' or 'mean', got {reduction!r}.")
    values = doubled(values.flatten(1))
    return values.sum(1) if reduction == "sum" else values.mean(1)


def _check_own(scheduler: SteppingScheduler) -> None:
    if scheduler.gamma == 0:
        raise UserError(
            f"{type(scheduler).__name__} is deterministic with gamma 0; give set_timesteps or the config a gamma above 0."
        )
    if scheduler.noise_sampler is not None:
        raise UserError("The law of the scheduler's noise_sampler is not known; set it to None.")


def _check_index(scheduler: SchedulerMixin, index: int) -> None:
    if getattr(scheduler, "num_inference_steps", None) is None and not getattr(scheduler, "custom_timesteps", False):
        raise UserError("The scheduler has no schedule yet; call set_timesteps.")
    with_end = isinstance(scheduler, SCMScheduler) or scheduler.config.get("network", "") is None
    steps = len(scheduler.timesteps) - with_end
    if not 0 <= index < steps:
        raise UserError(f"index must be from 0 to {steps - 1}, as there are {steps} steps; got {index}.")


def _check_shapes(name: str, values: Tensor, other: str, like: Tensor) -> None:
    if values.shape != like.shape:
        raise UserError(f"{name} must have the shape of {other}, {tuple(like.shape)}; got {tuple(values.shape)}.")


def _check_noise(transition: Transition) -> None:
    if transition.std == 0:
        raise UserError("This step adds no noise, so its actions have no density; leave it out, as the last step.")
