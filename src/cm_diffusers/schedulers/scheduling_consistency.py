"""Few-step sampling of consistency models on Stable Diffusion's discrete process, from re-noising to deterministic."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import LCMScheduler, SchedulerMixin  # noqa: F401 (diffusers looks for it where saved pipelines lead)
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from torch import Tensor

from cm_diffusers.diffusion.preconditioning import lcm_scalings
from cm_diffusers.errors import UserError
from cm_diffusers.schedulers.stepping import SteppingScheduler, one_of, refuse_gamma
from cm_diffusers.schedulers.timesteps import chosen, distillation_grid, spread


CLEAN = (1.0, 0.0)  # alpha and sigma of data without noise


class ConsistencyScheduler(SteppingScheduler):
    """Multistep consistency sampling with as much fresh noise as `gamma` says.

    A step from t to t' denoises, f = c_skip x + c_out x0_hat, goes to s = floor((1 - gamma) t') along the noise that x
    and f imply, and from s to t' by fresh noise (2402.19159, Sec. 4.3). With gamma = 1 that is LCM's
    alpha' f + sigma' z (2310.04378, Algorithm 3), with gamma = 0 it is DDIM. The last step adds no noise.

    Fresh noise keeps the law of the data; reused noise depends on f, and only a student that was distilled for it (TCD)
    makes up for that: an exact consistency function ends with too much variance below gamma = 1.

    The config of any Stable Diffusion scheduler serves: `ConsistencyScheduler.from_config(pipe.scheduler.config)`, and
    `from_config(..., gamma=0.3, boundary_scalings="none")` for a student sampled with `TCDScheduler`.

    Args:
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2"; `trained_betas` takes its place.
        original_inference_steps: Points of the grid that the student was distilled on.
        clip_sample: Clip x0_hat to +-`clip_sample_range`; `thresholding` (2205.11487, Sec. 2.3) goes before it.
        set_alpha_to_one: The last step with gamma < 1 ends at clean data, else at the noise level of timestep 0.
        timestep_scaling, sigma_data: Constants of `lcm_scalings`.
        gamma: The share of fresh noise, 0 to 1.
        rescale_betas_zero_snr: Rescale the betas to zero terminal SNR (2305.08891, Algorithm 1).
        boundary_scalings: "lcm" for `cm_diffusers.diffusion.preconditioning.lcm_scalings`, "none" for f = x0_hat (TCD).
        recommended_timesteps: What `set_timesteps` takes when it is asked for as many: those of a student's phases (PCM).

    Attributes:
        noise_sampler: Draws every injected noise, in place of `randn_tensor`, when it is set: called with the shape of
            the sample, the generator, the device and the dtype. Frames `(B, C, F, H, W)` share their noise with::

                lambda shape, *where: randn_tensor((*shape[:2], 1, *shape[3:]), *where).expand(shape)
    """

    # Their config fields are kept, without a warning, for the way back to them.
    _compatibles = ["LCMScheduler", "TCDScheduler", *(scheduler.name for scheduler in KarrasDiffusionSchedulers)]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: np.ndarray | list[float] | None = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
        gamma: float = 1.0,
        sigma_data: float = 0.5,
        boundary_scalings: str = "lcm",
        recommended_timesteps: list[int] | None = None,
    ) -> None:
        one_of("beta_schedule", beta_schedule, ("linear", "scaled_linear", "squaredcos_cap_v2"))
        one_of("prediction_type", prediction_type, ("epsilon", "sample", "v_prediction"))
        one_of("boundary_scalings", boundary_scalings, ("lcm", "none"))
        betas = (beta_start, beta_end, beta_schedule, trained_betas)
        stock = LCMScheduler(num_train_timesteps, *betas, rescale_betas_zero_snr=rescale_betas_zero_snr)
        self.betas, self.alphas_cumprod = stock.betas, stock.alphas_cumprod
        self.init_noise_sigma = 1.0
        self._prepare(gamma)
        self._set_schedule(list(range(num_train_timesteps))[::-1], device=None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
        gamma: float | None = None,
    ) -> None:
        """Choose the timesteps of the next sampling run.

        Args:
            num_inference_steps: So many timesteps: the recommended ones if they are so many, else evenly spaced on the
                distillation grid.
            original_inference_steps: Points of that grid; the config's number by default.
            timesteps: These timesteps instead, descending.
            strength: The share of the grid, or of `timesteps`, that remains, from its less noisy end.
            gamma: For this run, instead of the config's.

        Raises:
            ValueError: An argument is out of range, or not exactly one of the first and `timesteps` is given.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise UserError("Give exactly one of num_inference_steps and timesteps.")
        total = len(self.alphas_cumprod)
        points = self.config.original_inference_steps if original_inference_steps is None else original_inference_steps
        grid, recommended = distillation_grid(total, points), self.config.recommended_timesteps
        if recommended and (strength, original_inference_steps, num_inference_steps) == (1, None, len(recommended)):
            schedule = list(recommended)
        elif timesteps is None:
            schedule = spread(grid, num_inference_steps, strength)
        else:
            schedule = chosen(timesteps, grid, total, strength)
        self.gamma = refuse_gamma(self.config.gamma if gamma is None else gamma)
        self.num_inference_steps = len(schedule)
        self.custom_timesteps = timesteps is not None
        self._set_schedule(schedule, device)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t `(B, ...)` from clean data and noise `(B, ...)` at `timesteps` `(B,)`."""
        alpha, sigma = self._rates_like(original_samples, timesteps)
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = alpha noise - sigma x0 `(B, ...)` (2202.00512) of clean data and noise at `timesteps` `(B,)`."""
        alpha, sigma = self._rates_like(sample, timesteps)
        return (alpha * noise - sigma * sample).to(sample.dtype)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample itself: this process needs no scaling."""
        return sample

    def target_timestep(self, timestep: int | Tensor) -> int:
        """Where the step that begins at a timestep goes before it adds noise: what a network is told that knows its target."""
        index = self.index_for_timestep(timestep) if self._step_index is None else self._step_index
        following = self._schedule[index + 1] if index + 1 < len(self._schedule) else 0
        return self._target(following)

    def index_for_timestep(self, timestep: int | Tensor) -> int:
        """The place of a timestep in the schedule."""
        if int(timestep) not in self._schedule:
            raise UserError(f"Timestep {int(timestep)} is not in the schedule {self._schedule}; call set_timesteps.")
        return self._schedule.index(int(timestep))

    def _set_schedule(self, schedule: list[int], device: str | torch.device | None) -> None:
        self._restart(schedule)
        self.timesteps = torch.tensor(schedule, dtype=torch.long, device=device)

    def _enter(self, timestep: int | Tensor) -> int:
        if self.num_inference_steps is None:
            raise UserError("The scheduler has no schedule yet; call set_timesteps before step.")
        return super()._enter(timestep)

    def _precision(self, sample: Tensor) -> torch.dtype:
        return torch.float64 if sample.dtype == torch.float64 else torch.float32

    def _denoise(self, output: Tensor, t: int, x: Tensor) -> Tensor:
        """f(x_t, t) = c_skip x + c_out x0_hat."""
        x0 = self._bounded(self._predict(output, t, x))
        if self.config.boundary_scalings == "none":
            return x0
        c_skip, c_out = lcm_scalings(torch.tensor(t), self.config.timestep_scaling, self.config.sigma_data)
        return float(c_skip) * x + float(c_out) * x0

    def _predict(self, output: Tensor, t: int, x: Tensor) -> Tensor:
        alpha, sigma = self._rates(t)
        if self.config.prediction_type == "epsilon":
            if alpha == 0:
                raise UserError(
                    f"Timestep {t} is pure noise (zero terminal SNR), where prediction_type 'epsilon' says nothing; use "
                    "'v_prediction' or 'sample', or set rescale_betas_zero_snr=False."
                )
            return (x - sigma * output) / alpha
        if self.config.prediction_type == "v_prediction":
            return alpha * x - sigma * output
        return output

    def _bounded(self, x0: Tensor) -> Tensor:
        if self.config.thresholding:
            size = torch.quantile(x0.flatten(1).abs(), self.config.dynamic_thresholding_ratio, dim=1)
            size = size.clamp(1, self.config.sample_max_value).reshape(-1, *[1] * (x0.ndim - 1))
            return x0.clamp(-size, size) / size
        size = self.config.clip_sample_range
        return x0.clamp(-size, size) if self.config.clip_sample else x0

    def _move(self, denoised: Tensor, x: Tensor, index: int, draw: Callable[[], Tensor]) -> Tensor:
        """The sample at the next timestep: along the implied noise to s, then by fresh noise to t'."""
        last = index + 1 == len(self._schedule)
        alpha_s, sigma_s = self._before_noise(None if last else self._schedule[index + 1])
        x_s = alpha_s * denoised
        if sigma_s > 0:
            alpha, sigma = self._rates(self._schedule[index])
            x_s = x_s + sigma_s / sigma * (x - alpha * denoised)
        if last or self.gamma == 0:
            return x_s
        ratio = self._rates(self._schedule[index + 1])[0] / alpha_s
        return ratio * x_s + (1 - ratio**2) ** 0.5 * draw()

    def _before_noise(self, t: int | None) -> tuple[float, float]:
        """alpha and sigma at s before the next timestep, or at the end; LCM's s is clean data, not timestep 0."""
        is_lcm = self.gamma == 1 and self.config.boundary_scalings == "lcm"
        if is_lcm or (t is None and self.config.set_alpha_to_one):
            return CLEAN
        return self._rates(self._target(t or 0))

    def _target(self, t: int) -> int:
        """s = floor((1 - gamma) t), rounded as `TCDScheduler` does."""
        return int(np.floor(np.float32(1 - self.gamma) * np.float32(t)))

    def _rates(self, t: int) -> tuple[float, float]:
        """alpha and sigma at a timestep, in float64."""
        alpha_cumprod = float(self.alphas_cumprod[t])
        return alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5

    def _rates_like(self, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma `(B, 1, ...)` on the device of x, in float32, or float64 where x has it."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        table = self.alphas_cumprod.to(x.device, dtype)[timesteps.to(x.device)].reshape(-1, *[1] * (x.ndim - 1))
        return table.sqrt(), (1 - table).sqrt()
