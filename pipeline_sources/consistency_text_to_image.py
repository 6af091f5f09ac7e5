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
LatentConsistencyModelPipeline cannot sample with TCD's stochasticity, and none samples students of CD, ECT and sCM, whose
noise levels `sigmas` names.
"""

from numbers import Integral
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from cm_diffusers.pipelines.manners import IN_SIGMA, consistency_scheduler

from .shared.record import read_record


PAPER = {"recommended_num_inference_steps": 4, "recommended_guidance_scale": 8.0}  # 2310.04378


class PortableConsistencyPipeline(StableDiffusionPipeline):
    """`StableDiffusionPipeline` that reads how its student was made, and samples by its scheduler's own config."""

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = True,
    ) -> None:
        config = scheduler.config
        parts = (vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder)
        super().__init__(*parts, requires_safety_checker)
        scheduler._internal_dict = config  # in which the stock class switches clipping off

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
            timesteps, sigmas: Instead of a number of steps, descending; sigmas are noise levels, for students of CD, ECT and sCM.
            kwargs: The other arguments of `StableDiffusionPipeline.__call__`.

        Raises:
            ValueError: A negative prompt for a student that has no unconditional branch, several steps for one that knows one, or
                gamma or the number of steps is out of range.
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
        times = sigmas if timesteps is None else timesteps
        if self.record.get("one_step") and (steps if times is None else len(times)) != 1:
            raise ValueError("This student makes its images in one step: leave the number of steps out or give 1.")
        if num_inference_steps is None and times is None:
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


def _sampler(scheduler: SchedulerMixin, gamma: float | None) -> SchedulerMixin:
    """For students of CD, ECT and sCM, whose scheduler knows noise levels, or for LCMs."""
    name, changes = type(scheduler).__name__, {} if gamma is None else {"gamma": gamma}
    if name in IN_SIGMA:
        return IN_SIGMA[name].from_config(scheduler.config, **changes)
    return consistency_scheduler(name, {**scheduler.config, **changes})
