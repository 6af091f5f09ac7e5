"""Teachers: loaded whole, checked, frozen."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers.hf_argparser import HfArg


LOADING = {"dtype": torch.float32, "use_safetensors": True}  # never a pickle


@dataclass
class TeacherConfig:
    """The diffusion model to distil."""

    pretrained_teacher_model: str = HfArg(help="Folder or Hub id of a Stable Diffusion pipeline (1.x, 2.x or XL).")
    teacher_revision: str | None = HfArg(default=None, help="Branch, tag or commit on the Hub.")
    teacher_variant: str | None = HfArg(default=None, help='Variant of the weight files, e.g. "fp16".')
    pretrained_vae_model_name_or_path: str | None = HfArg(
        default=None, help="Folder or Hub id of another VAE than the teacher's, such as one that is stable in float16."
    )


def load_teacher(config: TeacherConfig) -> DiffusionPipeline:
    """The teacher's pipeline in float32 whatever its files hold, frozen.

    Raises:
        ValueError: Not a Stable Diffusion (XL) pipeline, out of reach, or with non-finite weights.
    """
    path = config.pretrained_teacher_model
    if Path(path).exists() and not (Path(path) / "model_index.json").exists():
        raise ValueError(f"{path} is not a diffusers pipeline folder: there is no model_index.json in it.")
    options = {"revision": config.teacher_revision, "variant": config.teacher_variant, **LOADING}
    if config.pretrained_vae_model_name_or_path:
        options["vae"] = _load_vae(config.pretrained_vae_model_name_or_path)
    try:
        pipe = DiffusionPipeline.from_pretrained(path, **options)
    except (OSError, ValueError) as error:  # diffusers raises ValueError for what cannot be a Hub id
        trouble = (
            "does not load" if Path(path).exists() else "is neither a pipeline folder here nor a Hub id within reach"
        )
        raise ValueError(f"{path} {trouble}: {str(error).splitlines()[0]}") from error
    _check_teacher(path, pipe)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def _load_vae(path: str) -> AutoencoderKL:
    try:
        return AutoencoderKL.from_pretrained(path, **LOADING)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--pretrained_vae_model_name_or_path {path} does not load: {reason}") from error


def is_xl(unet: UNet2DConditionModel) -> bool:
    """Whether the network is told pooled text, sizes and crop, as Stable Diffusion XL's is."""
    return unet.config.addition_embed_type == "text_time"


def _check_teacher(path: str, pipe: DiffusionPipeline) -> None:
    unet, kind = getattr(pipe, "unet", None), type(pipe).__name__
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"{path} is a {kind} without a UNet2DConditionModel; give a Stable Diffusion pipeline.")
    wanted = ["vae", "text_encoder", *(["text_encoder_2"] if is_xl(unet) else [])]
    if missing := [name for name in wanted if getattr(pipe, name, None) is None]:
        raise ValueError(f"{path} is a {kind} without {' and '.join(missing)}; give a text-to-image pipeline.")
    if unet.config.in_channels != pipe.vae.config.latent_channels:
        raise ValueError(
            f"The UNet of {path} takes {unet.config.in_channels} channels and its VAE makes "
            f"{pipe.vae.config.latent_channels}; give a text-to-image pipeline, not one for inpainting or editing."
        )
    check_vae(path, pipe.vae)
    if unet.config.time_cond_proj_dim:
        raise ValueError(f"{path} is a guidance-distilled student already; give the diffusion model it came from.")
    broken = [name for name, p in pipe.unet.named_parameters() if not p.isfinite().all()]
    if broken:
        raise ValueError(
            f"The teacher {path} holds {len(broken)} tensors that are not finite, such as {broken[0]}; get it anew."
        )


def check_vae(path: str, vae: AutoencoderKL) -> None:
    if vae.config.get("latents_mean") or vae.config.get("latents_std"):
        raise ValueError(
            f"The VAE of {path} normalises every channel (latents_mean, latents_std in its config), which training does "
            "not; give a model with another VAE."
        )
