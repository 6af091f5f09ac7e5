"""What a diffusion model must be to start from, and how its network is seen."""

from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel

from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.diffusion.views import EDMView, FlowView, VPView
from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import family_of, network_of
from cm_diffusers.publishing.images import view_of


def check_start(path: str, pipe: DiffusionPipeline, ours: bool) -> None:
    unet, kind = getattr(pipe, "unet", None), type(pipe).__name__
    if not isinstance(unet, UNet2DModel) or unet.config.in_channels != unet.config.out_channels:
        raise UserError(
            f"{path} is a {kind} with {type(unet).__name__}; give a model with a UNet2DModel that predicts as many channels "
            "as it sees, or a Stable Diffusion pipeline."
        )
    if (kind := unet.config.time_embedding_type) != "positional":
        raise UserError(
            f"The network of {path} has a {kind} embedding of its time, which takes no logarithms or fractions; give one with "
            "a positional embedding."
        )
    if not isinstance(unet.config.sample_size, int):
        raise UserError(f"The network of {path} has no square sample_size in its config; write it there.")
    if not ours and set(pipe.components) != {"unet", "scheduler"}:
        found = ", ".join(sorted(set(pipe.components) - {"unet", "scheduler"}))
        raise UserError(f"{path} is a {kind}, which also has {found}; give a model of pixels, or one of train_edm.py.")
    if getattr(pipe, "vae", None) is None and unet.config.in_channels != 3:
        raise UserError(f"The network of {path} sees {unet.config.in_channels} channels, but images have 3 here.")


def check_diffusion(path: str, settings: Mapping[str, Any], sigma_data: float | None = None) -> None:
    if (settings.get("boundary_scalings"), settings["gamma"]) != ("edm", 0):
        raise UserError(f"{path} is a consistency model already; give the diffusion model that it came from.")
    if sigma_data not in (None, settings["sigma_data"]):
        raise UserError(
            f"--sigma_data is {sigma_data}, but {path} was trained with {settings['sigma_data']}: leave it out."
        )


def text_view(path: str, pipe: DiffusionPipeline, sigma_data: float | None) -> EDMView | VPView | FlowView:
    """Of Stable Diffusion, also as `tune_time.py` leaves it, or of a flow."""
    network, settings = network_of(pipe), pipe.scheduler.config
    if "network" in settings:
        check_diffusion(path, settings, sigma_data)
        return view_of(settings)
    family = family_of(network)
    if isinstance(network, UNet2DConditionModel):
        return vp_view(pipe.scheduler, sigma_data, 1.0)
    if family.clips:
        raise UserError(f"{path} is a {type(pipe).__name__}, which makes clips; give a text-to-image pipeline.")
    return FlowView(1.0 if sigma_data is None else sigma_data, family.call)


def vp_view(scheduler: object, sigma_data: float | None, default: float) -> VPView:
    process = DiscreteVP.from_scheduler(scheduler)
    return VPView(process, scheduler.config.prediction_type, default if sigma_data is None else sigma_data)
