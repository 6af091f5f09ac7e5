"""The pipelines and records of students in coordinates of noise levels: without prompts, or with them."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ConsistencyModelPipeline,
    DiffusionPipeline,
    LCMScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.diffusion.views import EDMView, VPView
from cm_diffusers.errors import UserError
from cm_diffusers.pipelines import ConsistencyImagesPipeline, ConsistencyPipeline
from cm_diffusers.pipelines.pipeline_consistency_images import is_stock
from cm_diffusers.pipelines.stock import stock_scheduler
from cm_diffusers.publishing.card import EDM_METHODS
from cm_diffusers.publishing.pipelines import lcm_pipeline, scheduler_entry
from cm_diffusers.record import Record
from cm_diffusers.schedulers.scheduling_flow_consistency import FlowConsistencyScheduler
from cm_diffusers.schedulers.stepping import ToldScheduler


SCHEDULES = (  # of nearly all diffusion models; any other is told beta by beta
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2"},
)


class Statistics(Protocol):
    """Mean and standard deviation of each channel of the latents."""

    mean: list[float]
    std: list[float]


def network_of(view: EDMView | VPView) -> dict[str, object]:
    """Settings of a `ToldScheduler` that say how training called the network."""
    if isinstance(view, EDMView):
        told = {"noise_conditioning": view.noise_conditioning, "sigma_data": view.sigma_data}
        return {"network": "edm", "prediction_type": "epsilon", **told}
    alphas_cumprod = view.with_signal.alphas_cumprod
    told = {} if view.noise_conditioning == "own" else {"noise_conditioning": view.noise_conditioning}
    known = (schedule for schedule in SCHEDULES if _makes(schedule, alphas_cumprod))
    return {
        "network": "vp",
        "sigma_data": view.sigma_data,
        "prediction_type": view.prediction_type,
        "num_vp_timesteps": len(alphas_cumprod),
        **told,
        **next(known, {"trained_betas": _betas(alphas_cumprod)}),
    }


def view_of(settings: Mapping[str, Any]) -> EDMView | VPView:
    """The inverse of `network_of`, from the scheduler's config."""
    if settings["network"] == "edm":
        return EDMView(settings["sigma_data"], settings["noise_conditioning"])
    betas = (settings[name] for name in ("beta_start", "beta_end", "beta_schedule", "trained_betas"))
    stock = LCMScheduler(
        settings["num_vp_timesteps"], *betas, rescale_betas_zero_snr=settings["rescale_betas_zero_snr"]
    )
    told = "trigflow" if settings["noise_conditioning"] == "trigflow" else "own"
    return VPView(DiscreteVP.from_scheduler(stock), settings["prediction_type"], settings["sigma_data"], told)


def _makes(schedule: dict[str, object], alphas_cumprod: Tensor) -> bool:
    return torch.equal(LCMScheduler(len(alphas_cumprod), **schedule).alphas_cumprod.double(), alphas_cumprod)


def _betas(alphas_cumprod: Tensor) -> list[float]:
    """Betas in float32 that a stock scheduler multiplies up to these `alphas_cumprod` `(T,)`, to the last bit.

    Each makes good what rounding those before it lost; with plain ratios the losses would add up.
    """
    product, betas = 1.0, []
    for wanted in alphas_cumprod.tolist():
        beta = 1 - np.float32(wanted / product)
        betas.append(float(beta))
        product *= float(1 - beta)
    return betas


def images_pipeline(
    unet: UNet2DModel | UNet2DConditionModel,
    scheduler: ToldScheduler,
    vae: AutoencoderKL | None = None,
    statistics: Statistics | None = None,
) -> DiffusionPipeline:
    """The pipeline a student without prompts samples in: the stock one where that samples it right.

    Both are saved with the stock scheduler. Our fields ride in its config, from which our pipelines have them again.

    Args:
        vae: For a student of latents.
        statistics: Of the latents, where training standardised them to the scheduler's sigma_data.
    """
    if vae is None and statistics is None and is_stock(unet, scheduler):
        pipe = ConsistencyModelPipeline(unet, stock_scheduler(scheduler))
    else:
        pipe = ConsistencyImagesPipeline(
            unet,
            scheduler,
            vae,
            latents_mean=statistics and list(statistics.mean),
            latents_std=statistics and list(statistics.std),
            sigma_data=scheduler.config.sigma_data,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_pipeline(teacher: DiffusionPipeline, network: nn.Module, scheduler: ToldScheduler) -> DiffusionPipeline:
    """A student of text in EDM's coordinates, for a flow the stock one; all but network and scheduler is the teacher's."""
    if isinstance(scheduler, FlowConsistencyScheduler):
        return lcm_pipeline(teacher, network, scheduler)
    pipe = ConsistencyPipeline.from_pipe(teacher, unet=network, scheduler=scheduler, record=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images_record(
    method: str,
    base_model: str,
    guidance: str,
    w: float,
    scheduler: SchedulerMixin,
    num_inference_steps: int,
) -> Record:
    """
    Args:
        method: "cd", "ct", "ict", "slct", "ect", "sct", "scd", or "edm" for a diffusion model.
        base_model: Folder or Hub id of what it was made from; "" for a network trained from data alone.
        guidance: "none" for a student without prompts, "distilled" for one with.
        w: The guidance in its weights.
        scheduler: The pipeline's: by its class, which is what samples right, the model card tells who can sample it.
        num_inference_steps: What it is best sampled with.

    Raises:
        ValueError: Another method.
    """
    if method not in EDM_METHODS:
        raise UserError(f"Unknown method {method!r}; give one of {', '.join(EDM_METHODS)}.")
    return Record(method, base_model, guidance, w, w, 1.0, num_inference_steps, scheduler_entry(scheduler))
