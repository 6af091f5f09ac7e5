"""Samples of a teacher as its network sees them, by the stock pipeline of any family."""

from math import isqrt, lcm

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.functional import pixel_shuffle

from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import answers_clips, guided, in_steps, latents_of
from cm_diffusers.models.families.shared import untokened


def check_side(teacher: DiffusionPipeline, resolution: int) -> None:
    """
    Raises:
        ValueError: Its pipeline would not make images of this size.
    """
    if resolution % (factor := lcm(8, latents_of(teacher).multiple)):
        raise UserError(f"--resolution {resolution} is not a multiple of {factor}, as the teacher's pipeline needs.")


def teacher_latents(
    teacher: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    side: int,
    steps: int,
    guidance_scale: float,
    num_frames: int | None = None,
) -> Tensor:
    """One sample of each prompt, square images of `side` pixels, by the pipeline's own scheduler.

    Args:
        num_frames: Of a teacher of videos; None for images.

    Returns:
        Images `(B, C, h, w)` or clips `(B, C, f, h, w)`.
    """
    last: dict[str, Tensor] = {}
    teacher(
        prompt=prompts,
        height=side,
        width=side,
        **in_steps(teacher, steps),
        **guided(teacher, guidance_scale),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        callback_on_step_end=lambda pipe, step, t, tensors: last.update(tensors) or {},
        callback_on_step_end_tensor_inputs=["latents"],
        **({"num_frames": num_frames or 1} if answers_clips(teacher) else {}),
    )
    latents = last["latents"]
    return latents if num_frames else _as_images(latents, side // latents_of(teacher).downscale)


def _as_images(latents: Tensor, side: int) -> Tensor:
    """Of those of a pipeline's loop: some are tokens of p x p latents, `(B, L, C p p)`, and some clips of one frame."""
    if latents.ndim == 5:
        return latents[:, :, 0]
    if latents.ndim == 3:
        tokens = isqrt(latents.shape[1])
        return pixel_shuffle(untokened(latents, tokens, tokens), side // tokens)
    return latents
