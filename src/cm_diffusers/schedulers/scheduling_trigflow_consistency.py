"""Few-step sampling of continuous-time consistency models in TrigFlow's coordinates, in any number of steps."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral

import numpy as np
import torch
from diffusers import LCMScheduler, SchedulerMixin  # noqa: F401 (diffusers looks for it where saved pipelines lead)
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from cm_diffusers.diffusion.preconditioning import NOISE_CONDITIONINGS
from cm_diffusers.diffusion.process import DiscreteVP, RectifiedFlow
from cm_diffusers.diffusion.trigflow import TrigFlowNetwork
from cm_diffusers.errors import UserError
from cm_diffusers.schedulers.noise_levels import checked, checked_times
from cm_diffusers.schedulers.stepping import ToldScheduler, as_level, on, one_of, refuse_gamma


# What a network of each kind may answer with -> the output of `TrigFlowNetwork` that this is.
KINDS: dict[str | None, dict[str, str]] = {
    None: {"trigflow": "trigflow"},
    "edm": {"trigflow": "trigflow", "epsilon": "edm", "v_prediction": "trigflow"},
    "vp": {kind: kind for kind in ("epsilon", "v_prediction", "sample")},
    "flow": {"flow_prediction": "flow_prediction"},
}
PURE_NOISE = 1.57080  # as SCMScheduler has pi / 2
LEAST_SIGMA = 1e-6


class TrigFlowConsistencyScheduler(ToldScheduler):
    """Consistency sampling (sCM, 2410.11081, Sec. 3.1) of x = cos(t) x0 + sigma_data sin(t) noise, t from pi / 2 to 0.

    A step from t to s denoises, f = cos(t) x - sin(t) sigma_data F, and noises again::

        x' = cos(s) f + sin(s) ((1 - gamma) e + sqrt(1 - (1 - gamma)^2) sigma_data z),    e = (x - cos(t) f) / sin(t)

    gamma = 1 is the paper's sampler; gamma = 0 is deterministic, cos(t - s) x - sin(t - s) sigma_data F. The last step adds
    no noise and draws none.

    The config of an `SCMScheduler` serves: `pipe.scheduler = TrigFlowConsistencyScheduler.from_config(pipe.scheduler.config)`.
    It has no `network`: its pipeline, as `SanaSprintPipeline`, scales inputs itself, hands `step` the product sigma_data F,
    and drops the last of `timesteps`, which are the times t in float32 with the end, 0, behind them.

    With a `network` the scheduler converts, as training did (`cm_diffusers.diffusion.trigflow.TrigFlowNetwork`): `timesteps`
    are what the network is told, and `step` takes its answer to `scale_model_input`. Images are those of an
    `EDMConsistencyScheduler` with the same fields and the boundary "edm".

    Args:
        num_train_timesteps: Without effect, as in `SCMScheduler`.
        prediction_type: What the network's output is. "trigflow": F, or sigma_data F without a `network`. Of "edm" also
            "epsilon", EDM's F, which is -F, or "v_prediction", its opposite; of "vp" "epsilon", "v_prediction" or "sample";
            of "flow" "flow_prediction", noise - x0.
        sigma_data: Standard deviation of the data, as in training.
        sigma_max: Most noise of training: sampling starts at t = atan(sigma_max / sigma_data). None for pure noise, or for
            the most that a network "vp" knows.
        network: None, or "edm": shown x / sigma_data and told `noise_conditioning`, "vp": a diffusion model of Stable
            Diffusion's kind, "flow": one of rectified flow; the latter two are told their own times.
        noise_conditioning: What "edm" is told: "trigflow" (t, also if None), "edm" (ln sigma / 4) or "adm" (250 ln sigma);
            "vp" may be told "trigflow", too, after time rescaling.
        num_vp_timesteps: How many times "vp" knows; the fields from here to `rescale_betas_zero_snr` are for it.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: As in its scheduler.
        time_scale: What "flow" is told of pure noise: 1000 as most, 1 as SANA-Sprint.
        clip_denoised: Clip f to [-1, 1]; not for latents.
        gamma: The share of fresh noise, 0 to 1.
        recommended_sigmas: Noise levels sigma_data tan(t) that `set_timesteps` takes when it is given none, or their number.

    Attributes:
        sigmas: The noise levels `(steps + 1,)` in float64, the last is 0; infinite at pi / 2.
        noise_sampler: As in `ConsistencyScheduler`.
    """

    _compatibles = ["SCMScheduler"]
    _level_name = "time"

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        prediction_type: str = "trigflow",
        sigma_data: float = 0.5,
        sigma_max: float | None = None,
        network: str | None = None,
        noise_conditioning: str | None = None,
        num_vp_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: np.ndarray | list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        time_scale: float = 1000.0,
        clip_denoised: bool = False,
        gamma: float = 1.0,
        recommended_sigmas: list[float] | None = None,
    ) -> None:
        one_of("network", network, tuple(KINDS))
        one_of("prediction_type", prediction_type, tuple(KINDS[network]))
        one_of("noise_conditioning", noise_conditioning, (None, *NOISE_CONDITIONINGS))
        if not 0 < sigma_data < math.inf or not (sigma_max is None or 0 < sigma_max < math.inf):
            raise UserError(f"sigma_data and sigma_max must be positive, got {sigma_data} and {sigma_max}.")
        told, process, scale = noise_conditioning or "trigflow", None, 1.0
        if network == "vp":
            betas = (beta_start, beta_end, beta_schedule, trained_betas)
            stock = LCMScheduler(num_vp_timesteps, *betas, rescale_betas_zero_snr=rescale_betas_zero_snr)
            process = DiscreteVP(stock.alphas_cumprod[stock.alphas_cumprod > 0].double())
            told = "trigflow" if noise_conditioning == "trigflow" else "own"
        elif network == "flow":
            told, process, scale = "own", RectifiedFlow(), time_scale
        self._network = TrigFlowNetwork(sigma_data, KINDS[network][prediction_type], told, process, scale)
        self._sigma_max = self._most(sigma_max)
        self._t_max = math.atan(self._sigma_max / sigma_data) if network or sigma_max else PURE_NOISE
        if recommended_sigmas is not None:
            checked(recommended_sigmas, LEAST_SIGMA, self._sigma_max)
        self._prepare(gamma)
        self._set_schedule([self._t_max], device=None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        gamma: float | None = None,
        max_timesteps: float | None = None,
        intermediate_timesteps: float | None = 1.3,
    ) -> None:
        """Choose the times of the next sampling run; without any, those the student recommends.

        Args:
            num_inference_steps: So many times: the recommended ones if they are so many and `max_timesteps` is not given,
                else evenly spaced from it, but of two the second is `intermediate_timesteps`.
            timesteps: These times t instead, descending; they may end in 0, as those of `SCMScheduler`.
            sigmas: Or the times of these noise levels, descending.
            gamma: For this run, instead of the config's.
            max_timesteps: The first time; that of most noise by default.
            intermediate_timesteps: The second of two steps, if it is below the first; 1.3 is SANA-Sprint's
                (2503.09641), 1.1 sCM's for ImageNet. None for even spacing. Without effect for other numbers of steps.

        Raises:
            ValueError: An argument is out of range, or not exactly one way to choose is given.
        """
        if num_inference_steps is None and timesteps is None and sigmas is None:
            sigmas = self.config.recommended_sigmas
        if sum(way is not None for way in (timesteps, sigmas, max_timesteps)) > 1:
            raise UserError("Give only one of timesteps, sigmas and max_timesteps.")
        if timesteps is not None:
            schedule = checked_times(timesteps, self._t_max)
        elif sigmas is not None:
            schedule = self._times_of(sigmas)
        else:
            schedule = checked_times(
                self._spread(num_inference_steps, max_timesteps, intermediate_timesteps), self._t_max
            )
        if num_inference_steps not in (None, len(schedule)):
            raise UserError(
                f"num_inference_steps is {num_inference_steps}, but {len(schedule)} times are given; leave it out."
            )
        self.gamma = refuse_gamma(self.config.gamma if gamma is None else gamma)
        self.num_inference_steps = len(schedule)
        self.custom_timesteps = timesteps is not None or sigmas is not None
        self._set_schedule(schedule, device)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x `(B, ...)` from clean data and noise `(B, ...)` at `timesteps` `(B,)`, of the schedule or not.

        Raises:
            ValueError: The timesteps are integers.
        """
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        t = self._levels_at(timesteps).reshape(-1, *[1] * (noise.ndim - 1))
        cos, sin = (factor.to(dtype).to(noise.device) for factor in (t.cos(), self.config.sigma_data * t.sin()))
        return (cos * original_samples + sin * noise).to(original_samples.dtype)

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the noise at the first time; 1 without a `network`, where the pipeline scales."""
        return self.config.sigma_data * math.sin(self._schedule[0]) if self.config.network else 1.0

    def _most(self, sigma_max: float | None) -> float:
        """The greatest noise level to sample at.

        Raises:
            ValueError: The network does not know so much.
        """
        known = self._network.sigma_range[1]
        if sigma_max is not None and sigma_max > known * (1 + 1e-9):
            raise UserError(f"This network knows sigmas up to {known:.5g}, but sigma_max is {sigma_max}; give less.")
        return known if sigma_max is None else sigma_max

    def _spread(self, count: int | None, first: float | None, second: float | None) -> list[float]:
        if count is None:
            raise UserError("Give num_inference_steps, timesteps or sigmas.")
        if not isinstance(count, Integral) or count < 1:
            raise UserError(f"num_inference_steps must be a whole number of at least 1, got {count!r}.")
        recommended = self.config.recommended_sigmas or []
        if first is None and len(recommended) == count:
            return self._times_of(recommended)
        first = self._t_max if first is None else float(first)
        if count == 2 and second is not None and second < first:
            return [first, second]
        return torch.linspace(first, 0, int(count) + 1, dtype=torch.float64).tolist()

    def _times_of(self, sigmas: Sequence[float]) -> list[float]:
        values = checked(sigmas, LEAST_SIGMA, self._sigma_max)
        return self._levels_of(torch.tensor(values, dtype=torch.float64)).tolist()

    def _set_schedule(self, schedule: list[float], device: str | torch.device | None) -> None:
        self._restart(schedule)
        t = torch.tensor(schedule, dtype=torch.float64)
        sigmas = torch.where(t < math.pi / 2, self.config.sigma_data * t.tan(), math.inf)
        self.sigmas = torch.cat([sigmas, t.new_zeros(1)])
        with_end = torch.tensor([*schedule, 0.0], dtype=torch.float32)
        self.timesteps = on(device, self._told(t)) if self.config.network else with_end.to(device)

    def _told(self, levels: Tensor) -> Tensor:
        return self._network.told(levels)

    def _levels(self, told: Tensor) -> Tensor:
        return self._network.times(told)

    def _levels_of(self, sigmas: Tensor) -> Tensor:
        return torch.atan(sigmas / self.config.sigma_data)

    def _shown(self, level: Tensor) -> Tensor | float:
        return self._network.conversion(level).shown if self.config.network else 1.0

    def _denoise(self, output: Tensor, t: float, x: Tensor) -> Tensor:
        """f(x, t) = cos(t) x - sin(t) sigma_data F, F = on_x x + on_output output."""
        cos, sin = math.cos(t), self.config.sigma_data * math.sin(t)
        on_x, on_output = 0.0, 1 / self.config.sigma_data
        if self.config.network:
            _, on_x, on_output = map(float, self._network.conversion(as_level(t)))
        f = (cos - sin * on_x) * x - sin * on_output * output
        return f.clamp(-1, 1) if self.config.clip_denoised else f

    def _move(self, denoised: Tensor, x: Tensor, index: int, draw: Callable[[], Tensor]) -> Tensor:
        """The sample at the next time."""
        if index + 1 == len(self._schedule):
            return denoised
        t, s = self._schedule[index : index + 2]
        reused, fresh = 1 - self.gamma, (1 - (1 - self.gamma) ** 2) ** 0.5 * self.config.sigma_data
        result = math.cos(s) * denoised
        if reused > 0:
            result = result + math.sin(s) * reused / math.sin(t) * (x - math.cos(t) * denoised)
        return result + math.sin(s) * fresh * draw() if fresh > 0 else result
