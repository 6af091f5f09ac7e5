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

import math
from numbers import Integral
from typing import Any

import torch
from diffusers import LCMScheduler, SchedulerMixin, StableDiffusionPipeline
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from .shared.record import read_record
from .shared.student_scheduler import StudentScheduler


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
