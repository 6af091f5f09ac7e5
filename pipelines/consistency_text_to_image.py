# Written by `make single-files` in cm_diffusers, from pipeline_sources/consistency_text_to_image.py: change that, not this.
"""A student's own defaults, and sampling between re-noising and determinism, without installing cm_diffusers.

A single file for `custom_pipeline`. It needs diffusers alone and serves Stable Diffusion shaped students of cm_diffusers
and published LCMs (what LCMs of Stable Diffusion XL's shape need, the stock pipeline does). Put it beside the weights as
`pipeline.py`, or name it:

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        "assets/fashion_lcm", custom_pipeline="pipelines/consistency_text_to_image.py", trust_remote_code=True
    )
    image = pipe("a photo of a bag").images[0]  # steps and guidance as the student wants them
    image = pipe("a photo of a bag", gamma=0.0).images[0]  # deterministic

What the stock pipelines lack: they neither read `cm_diffusers.json` nor refuse a negative prompt that cannot act,
LatentConsistencyModelPipeline cannot sample with TCD's stochasticity, and none samples students of CD and ECT, whose noise
levels `sigmas` names.
"""

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, LCMScheduler, SchedulerMixin, StableDiffusionPipeline
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import Generator, Tensor


RECORD = "cm_diffusers.json"


def read_record(source: str) -> dict[str, Any]:
    """The record of a folder or Hub repository; {} where there is none, or none in reach."""
    path = Path(source) / RECORD
    if not Path(source).exists():
        try:
            path = Path(hf_hub_download(source, RECORD))
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
            return {}
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def input_scaling(sigma: Tensor, sigma_data: float) -> Tensor:
    """c_in `(B,)` of EDM (2206.00364, Table 1): c_in x has unit variance."""
    return 1 / (sigma.double() ** 2 + sigma_data**2).sqrt()


def cm_scalings(sigma: Tensor, sigma_min: float, sigma_data: float) -> tuple[Tensor, Tensor]:
    """c_skip and c_out `(B,)` of consistency models (2303.01469, Appendix C); exactly (1, 0) at sigma = sigma_min."""
    shifted = sigma.double() - sigma_min
    return 1 / (1 + (shifted / sigma_data) ** 2), shifted * sigma_data * input_scaling(sigma, sigma_data)


def edm_scalings(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """c_skip and c_out `(B,)` of EDM's denoiser (2206.00364, Table 1); exactly (1, 0) at sigma = 0."""
    sigma = sigma.double()
    return 1 / (1 + (sigma / sigma_data) ** 2), sigma * sigma_data * input_scaling(sigma, sigma_data)


# (sigma, sigma_min, sigma_data) -> (c_skip, c_out): where f(x, sigma) = x, at sigma_min or at 0
BOUNDARY_SCALINGS: dict[str, Callable[[Tensor, float, float], tuple[Tensor, Tensor]]] = {
    "cm": cm_scalings,
    "edm": lambda sigma, sigma_min, sigma_data: edm_scalings(sigma, sigma_data),
}
# c_noise, what a network is told of sigma: part of its architecture. "adm" as `CMStochasticIterativeScheduler`.
NOISE_CONDITIONINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "edm": lambda sigma: sigma.log() / 4,
    "adm": lambda sigma: 1000 * torch.log(sigma + 1e-44) / 4,
}


def karras_grid(points: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """`(points,)` ascending sigmas of EDM (2206.00364, Eq. 5), float64: even in sigma^(1 / rho), with exact ends."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    grid = torch.linspace(low, high, points, dtype=torch.float64) ** rho
    grid[0], grid[-1] = sigma_min, sigma_max
    return grid


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def vp_scalings(sigma: Tensor, sigma_data: float, prediction_type: str) -> tuple[Tensor, Tensor]:
    """on_x and on_output `(B,)` with F = on_x x + on_output output, for the output of a variance-preserving network.

    The network is shown x / sqrt(1 + sigma^2). F is (D - c_skip x) / c_out with its denoiser D and EDM's scalings,
    simplified by hand: no two terms cancel that need not.

    Args:
        prediction_type: What the output is: "epsilon", "v_prediction" or "sample".
    """
    sigma = sigma.double()
    edm, vp = (sigma**2 + sigma_data**2).sqrt(), (1 + sigma**2).sqrt()
    if prediction_type == "epsilon":  # D = x - sigma output
        return sigma / (sigma_data * edm), -edm / sigma_data
    if prediction_type == "v_prediction":  # D = (x - sigma vp output) / vp^2
        return sigma * (1 - sigma_data**2) / (sigma_data * vp**2 * edm), -edm / (sigma_data * vp)
    if prediction_type == "sample":  # D = output
        return -sigma_data / (sigma * edm), edm / (sigma * sigma_data)
    raise ValueError(f"Unknown prediction_type {prediction_type!r}; one of {', '.join(PREDICTION_TYPES)}.")


class StudentScheduler(SchedulerMixin, ConfigMixin):
    """Consistency sampling (2303.01469, Algorithm 1) in x = x0 + sigma noise, by all that the scheduler's config says.

    Such students are saved with `CMStochasticIterativeScheduler`, which reads a part of the fields and keeps the others.
    They mean what they mean to `EDMConsistencyScheduler` of cm_diffusers, whose steps these are.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 40,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        s_noise: float = 1.0,
        rho: float = 7.0,
        clip_denoised: bool = True,
        boundary_scalings: str = "cm",
        noise_conditioning: str = "adm",
        gamma: float = 1.0,
        network: str = "edm",
        prediction_type: str = "epsilon",
        num_vp_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        recommended_sigmas: list[float] | None = None,
    ) -> None:
        self.grid = karras_grid(num_train_timesteps, sigma_min, sigma_max, rho).flip(0).tolist()
        self.floor = sigma_min if boundary_scalings == "cm" else 0.0  # the noise level of f
        if network == "vp":
            betas = (beta_start, beta_end, beta_schedule, trained_betas)
            stock = LCMScheduler(num_vp_timesteps, *betas, rescale_betas_zero_snr=rescale_betas_zero_snr)
            signal = stock.alphas_cumprod[stock.alphas_cumprod > 0].double()
            self.log_sigmas = -torch.logit(signal).numpy() / 2

    @classmethod
    def of(cls, scheduler: SchedulerMixin, **changes: Any) -> "StudentScheduler":
        """Samples by the config of a scheduler."""
        fields = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        return cls.from_config(fields, **changes)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the noise levels: some of the grid, its places counted from the end, these, or the recommended ones."""
        points = len(self.grid)
        if num_inference_steps is None and timesteps is None and sigmas is None:
            sigmas = self.config.recommended_sigmas
        if sum(way is not None for way in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("Give exactly one of num_inference_steps, timesteps and sigmas.")
        if num_inference_steps is not None:
            if not isinstance(num_inference_steps, Integral) or not 1 <= num_inference_steps <= points:
                raise ValueError(
                    f"num_inference_steps must be a whole number from 1 to {points}, got {num_inference_steps!r}."
                )
            sigmas = self.grid[:: points // num_inference_steps][:num_inference_steps]
        elif timesteps is not None:
            if not all(isinstance(place, Integral) and 0 <= place < points for place in timesteps):
                raise ValueError(f"timesteps must be whole numbers from {points - 1} down to 0, got {timesteps}.")
            sigmas = [self.grid[place] for place in reversed(timesteps)]
        levels, low, high = [float(sigma) for sigma in sigmas], self.config.sigma_min, self.config.sigma_max
        known = bool(levels) and all(low <= level <= high for level in levels)
        if not known or any(a <= b for a, b in pairwise(levels)):
            raise ValueError(f"Noise levels must descend, from at most {high} to at least {low}; got {levels}.")
        self.sigmas = torch.tensor([*levels, self.floor], dtype=torch.float64)
        times = self._told(self.sigmas[:-1])
        self.timesteps = times.to(device, torch.float32) if str(device).startswith("mps") else times.to(device)
        self.init_noise_sigma, self.num_inference_steps, self.done = levels[0], len(levels), 0

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """What the network is shown `(B, ...)`."""
        std = 1.0 if self.config.network == "vp" else self.config.sigma_data
        return sample * float(input_scaling(self.sigmas[self.done], std))

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, Tensor]:
        """The next step of the schedule; all tensors `(B, ...)`: f = c_skip x + c_out F, and noise to the level after it."""
        sigma, following = self.sigmas[self.done], self.sigmas[self.done + 1]
        x = sample.to(torch.float32 if sample.device.type == "mps" else torch.float64)
        denoised = result = self._consistency(model_output.to(x.dtype), sigma, x)
        self.done += 1
        if self.done < self.num_inference_steps:
            gamma = self.config.gamma
            above, level = ((float(one) ** 2 - self.floor**2) ** 0.5 for one in (sigma, following))
            if gamma < 1:
                result = result + level * (1 - gamma) / above * (x - denoised)
            if gamma > 0:
                noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
                result = result + level * (1 - (1 - gamma) ** 2) ** 0.5 * self.config.s_noise * noise.to(x.dtype)
        output = LCMSchedulerOutput(result.to(sample.dtype), denoised.to(sample.dtype))
        return output if return_dict else output.to_tuple()

    def _told(self, sigmas: Tensor) -> Tensor:
        """What the network is told of noise levels `(N,)`: its own time, or a logarithm."""
        if self.config.network == "vp":
            times = np.interp(sigmas.log().numpy(), self.log_sigmas, np.arange(len(self.log_sigmas)))
            return torch.as_tensor(times)
        return NOISE_CONDITIONINGS[self.config.noise_conditioning](sigmas)

    def _consistency(self, output: Tensor, sigma: Tensor, x: Tensor) -> Tensor:
        """f(x, sigma), exactly x at sigma = floor."""
        on_x, on_output = 0.0, 1.0  # F = on_x x + on_output output
        if self.config.network == "vp":
            on_x, on_output = map(float, vp_scalings(sigma, self.config.sigma_data, self.config.prediction_type))
        scalings = BOUNDARY_SCALINGS[self.config.boundary_scalings]
        c_skip, c_out = map(float, scalings(sigma, self.config.sigma_min, self.config.sigma_data))
        f = (c_skip + c_out * on_x) * x + c_out * on_output * output
        return f.clamp(-1, 1) if self.config.clip_denoised else f


PAPER = {"recommended_num_inference_steps": 4, "recommended_guidance_scale": 8.0}  # 2310.04378


class StochasticLCMScheduler(LCMScheduler):
    """LCMScheduler with a share gamma of fresh noise: 1 is LCM, 0 deterministic, between them as TCD (2402.19159)."""

    gamma = 1.0

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step; all tensors `(B, ...)`: along the implied noise to s = floor((1 - gamma) t'), then by fresh noise to t'."""
        if self.step_index is None:
            self._init_step_index(timestep)
        t, following = int(timestep), self.step_index + 1
        alpha, sigma = self._rates(t)
        c_skip, c_out = self.get_scalings_for_boundary_condition_discrete(t)
        denoised = c_skip * sample + c_out * self._x0(model_output, sample, alpha, sigma)
        last = following == len(self.timesteps)
        if self.gamma == 1 or (last and self.config.set_alpha_to_one):
            alpha_s, sigma_s = 1.0, 0.0
        else:
            alpha_s, sigma_s = self._rates(
                0 if last else math.floor((1 - self.gamma) * int(self.timesteps[following]))
            )
        prev_sample = alpha_s * denoised + sigma_s * (sample - alpha * denoised) / sigma
        if not last and self.gamma > 0:
            ratio = self._rates(int(self.timesteps[following]))[0] / alpha_s
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            prev_sample = ratio * prev_sample + math.sqrt(1 - ratio**2) * noise
        self._step_index += 1
        return LCMSchedulerOutput(prev_sample, denoised) if return_dict else (prev_sample, denoised)

    def _x0(self, output: Tensor, sample: Tensor, alpha: float, sigma: float) -> Tensor:
        if self.config.prediction_type == "sample":
            return output
        if self.config.prediction_type == "v_prediction":
            return alpha * sample - sigma * output
        return (sample - sigma * output) / alpha

    def _rates(self, t: int) -> tuple[float, float]:
        alpha_cumprod = float(self.alphas_cumprod[t])
        return math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)


class PortableConsistencyPipeline(StableDiffusionPipeline):
    """`StableDiffusionPipeline` that reads how its student was made."""

    @property
    def record(self) -> dict[str, Any]:
        """`cm_diffusers.json` of the checkpoint; {} where there is none."""
        if not hasattr(self, "_record"):
            self._record = read_record(self.config.get("_name_or_path") or "")
        return self._record

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        gamma: float | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Images from prompts.

        Args:
            num_inference_steps, guidance_scale: By default what the student's record recommends; likewise height and width.
            gamma: Share of fresh noise in each step; by default 1, or what the scheduler says.
            timesteps, sigmas: Instead of a number of steps, descending; sigmas are noise levels, for students of CD and ECT.
            kwargs: The other arguments of `StableDiffusionPipeline.__call__`.

        Raises:
            ValueError: A negative prompt for a student that has no unconditional branch, or gamma or the number of steps is
                out of range.
        """
        if gamma is not None and not 0 <= gamma <= 1:
            raise ValueError(f"gamma must be from 0 (deterministic) to 1 (fresh noise in every step), got {gamma}.")
        embedded = self.unet.config.time_cond_proj_dim is not None
        if embedded and kwargs.get("negative_prompt") is not None:
            raise ValueError(
                "This student has no unconditional branch, so a negative prompt cannot act; leave it out."
            )
        defaults = PAPER | ({} if embedded else {"recommended_guidance_scale": 1.0}) | self.record
        if sum(way is not None for way in (num_inference_steps, timesteps, sigmas)) > 1:
            raise ValueError("Give num_inference_steps, timesteps or sigmas, not more than one of them.")
        steps = defaults["recommended_num_inference_steps"] if num_inference_steps is None else num_inference_steps
        if not isinstance(steps, Integral) or steps < 1:
            raise ValueError(f"num_inference_steps must be a whole number of at least 1, got {steps!r}.")
        if num_inference_steps is None and timesteps is None and sigmas is None:
            sigmas = self.scheduler.config.get("recommended_sigmas")
        if (side := self.record.get("resolution")) is not None:
            kwargs = {"height": side, "width": side} | {name: x for name, x in kwargs.items() if x is not None}
        stock, self.scheduler = self.scheduler, _sampler(self.scheduler, gamma)
        try:
            return super().__call__(
                prompt,
                num_inference_steps=steps,
                timesteps=timesteps,
                sigmas=sigmas,
                guidance_scale=defaults["recommended_guidance_scale"] if guidance_scale is None else guidance_scale,
                **kwargs,
            )
        finally:
            self.scheduler = stock


def _sampler(scheduler: SchedulerMixin, gamma: float | None) -> StudentScheduler | StochasticLCMScheduler:
    """For students of CD and ECT, whose scheduler says how the network is told of noise, or for LCMs."""
    if "network" in scheduler.config:
        return StudentScheduler.of(scheduler, **({} if gamma is None else {"gamma": gamma}))
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    sampler = StochasticLCMScheduler.from_config(config)
    sampler.gamma = 1.0 if gamma is None else gamma
    return sampler
