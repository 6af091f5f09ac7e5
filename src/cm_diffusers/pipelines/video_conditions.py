"""Images and frames that steer a clip: by a ControlNet, or by an image-to-video adapter."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, MultiControlNetModel
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from torch import Tensor

from cm_diffusers.models.image_to_video import skip_channels
from cm_diffusers.pipelines.checks import image_size
from cm_diffusers.pipelines.latents import dtype_of
from cm_diffusers.pipelines.pictures import check_values, readable
from cm_diffusers.pipelines.starts import repeated


Frames = Sequence[PipelineImageInput] | Tensor
Residuals = tuple[Tensor, ...]  # of the skip connections, and last of the middle


def check_conditions(
    pipe: DiffusionPipeline, image: PipelineImageInput | None, conditioning_frames: Frames | list[Frames] | None
) -> None:
    """Each part has its condition, and each condition its part.

    Raises:
        ValueError: One is missing, or the adapter was made for another UNet.
    """
    if image is not None and pipe.image_adapter is None:
        raise ValueError("An image needs an image_adapter: load the pipeline with image_adapter=..., or leave it out.")
    if image is not None and skip_channels(pipe.image_adapter.config) != skip_channels(pipe.unet.config):
        raise ValueError("The image_adapter was made for another UNet; make one with ImageToVideoAdapter.from_unet.")
    if conditioning_frames is None and pipe.controlnet is not None:
        raise ValueError("There is a ControlNet: give conditioning_frames, or set pipe.controlnet to None.")
    if conditioning_frames is not None and pipe.controlnet is None:
        raise ValueError(
            "conditioning_frames need a ControlNet: load the pipeline with controlnet=..., or leave them out."
        )


def image_residuals(
    pipe: DiffusionPipeline,
    image: PipelineImageInput,
    shape: Sequence[int],
    motion_scale: float,
    device: torch.device,
) -> Residuals:
    """The adapter's residuals (B * F, ...) for an image, or one for each clip or prompt.

    Args:
        pipe: A pipeline of clips.
        image: Anything that an image processor reads, values in [0, 1].
        shape: Of the latents (B, C, F, h, w).
        motion_scale: As for `ImageToVideoAdapter`.
        device: Where the networks run.
    """
    _check_size("image", image, pipe, shape)
    seen = readable(image)
    check_values(seen, 0)
    pixels = VaeImageProcessor(do_resize=False).preprocess(seen).to(device, dtype_of(pipe.vae))
    posterior = pipe.vae.encode(pixels)
    latents = posterior.latent_dist.mode() if "latent_dist" in posterior else posterior.latents
    shift = pipe.vae.config.get("shift_factor") or 0.0
    latents = repeated((latents - shift) * pipe.vae.config.scaling_factor, shape[0])
    down, middle = pipe.image_adapter(latents.to(dtype_of(pipe.image_adapter)), shape[2], motion_scale)
    return (*down, middle)


def control_frames(
    pipe: DiffusionPipeline, frames: Frames | list[Frames], shape: Sequence[int], device: torch.device
) -> list[Tensor]:
    """For each ControlNet its frames (B * F, 3, H, W) in [0, 1].

    Args:
        pipe: A pipeline of clips.
        frames: For each ControlNet, or for the only one: a list of F images, or a tensor (F, 3, H, W) or (N, F, 3, H, W)
            with N clips or prompts.
        shape: Of the latents (B, C, F, h, w).
        device: Where the networks run.
    """
    several = isinstance(pipe.controlnet, MultiControlNetModel)
    given, nets = (frames, pipe.controlnet.nets) if several else ([frames], [pipe.controlnet])
    if len(given) != len(nets):
        raise ValueError(
            f"conditioning_frames must hold frames for each of {len(nets)} ControlNets, got {len(given)}."
        )
    return [_clips(pipe, one, shape).to(device, dtype_of(net)) for one, net in zip(given, nets, strict=True)]


def control_residuals(
    pipe: DiffusionPipeline, frames: list[Tensor], scale: float | list[float], x: Tensor, text: Tensor, t: Tensor
) -> Residuals:
    """What the ControlNets add to the UNet's evaluation of x (B, C, F, h, w) with text (B * F, S, D)."""
    several = isinstance(pipe.controlnet, MultiControlNetModel)
    scales = scale if isinstance(scale, list) else [scale] * len(frames)
    if len(scales) != len(frames):
        raise ValueError(
            f"Found {len(scales)} controlnet_conditioning_scales for {len(frames)} ControlNets; give one each."
        )
    branches = len(text) // len(frames[0])
    hints = [torch.cat([one] * branches) for one in frames]
    down, middle = pipe.controlnet(
        x.transpose(1, 2).flatten(0, 1),
        t,
        encoder_hidden_states=text,
        controlnet_cond=hints if several else hints[0],
        conditioning_scale=scales if several else scales[0],
        return_dict=False,
    )
    return (*down, middle)


def as_arguments(parts: list[Residuals]) -> dict[str, Any]:
    """The sum of residuals as the UNet takes them."""
    if not parts:
        return {}
    *down, middle = (sum(ones) for ones in zip(*parts, strict=True))
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}


def _clips(pipe: DiffusionPipeline, frames: Frames, shape: Sequence[int]) -> Tensor:
    """(B * F, 3, H, W)."""
    batch, _, count, *_ = shape
    if not isinstance(frames, list | tuple) and not (isinstance(frames, Tensor) and frames.ndim in (4, 5)):
        raise ValueError("conditioning_frames must be a list of images, or a tensor (F, 3, H, W) or (N, F, 3, H, W).")
    found = frames.shape[-4] if isinstance(frames, Tensor) else len(frames)
    if found != count:
        raise ValueError(f"There are {found} conditioning_frames for {count} frames; give one for each.")
    _check_size("conditioning_frames", frames, pipe, shape)
    clips = frames.flatten(0, -4) if isinstance(frames, Tensor) else list(frames)
    seen = readable(clips)
    check_values(seen, 0)
    pixels = VaeImageProcessor(do_resize=False, do_normalize=False).preprocess(seen)
    return repeated(pixels.unflatten(0, (-1, count)), batch).flatten(0, 1)


def _check_size(name: str, images: object, pipe: DiffusionPipeline, shape: Sequence[int]) -> None:
    found = image_size(images, pipe.vae_scale_factor, pipe.vae.config.latent_channels)
    wanted = tuple(side * pipe.vae_scale_factor for side in shape[-2:])
    if tuple(found) != wanted:
        raise ValueError(
            f"{name} has the size {tuple(found)} (height, width), the clip {wanted}; resize it, or give its height and width."
        )
