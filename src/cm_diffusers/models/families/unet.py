"""Stable Diffusion 1.x, 2.x and XL: UNets of the variance-preserving process, guided by a second pass."""

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from cm_diffusers.diffusion.denoisers import call_unet
from cm_diffusers.diffusion.guidance import Conditions
from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.diffusion.teaching import Told, embedded_in_time
from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import Family
from cm_diffusers.models.families.latents import kl_latents


# Every convolution and linear layer but the ends, as LCM-LoRA (2311.05556) adapts.
LCM_LORA_TARGETS = tuple(
    (
        "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
        "downsamplers.0.conv upsamplers.0.conv time_emb_proj"
    ).split()
)


def is_xl(unet: UNet2DConditionModel) -> bool:
    """Whether the network is told pooled text, sizes and crop, as Stable Diffusion XL's is."""
    return unet.config.addition_embed_type == "text_time"


def _pipeline(unet: UNet2DConditionModel) -> str:
    if is_xl(unet):
        return "StableDiffusionXLPipeline"
    return "LatentConsistencyModelPipeline" if unet.config.time_cond_proj_dim else "StableDiffusionPipeline"


def _guidance(unet: UNet2DConditionModel) -> str:
    return "embedded" if unet.config.time_cond_proj_dim else "cfg"


def _told(unet: UNet2DConditionModel) -> Told:
    return embedded_in_time(unet.config.time_cond_proj_dim)


def _encode(pipe: DiffusionPipeline, prompts: list[str]) -> Conditions:
    if is_xl(pipe.unet):
        return _encode_xl(pipe, prompts)
    return {"encoder_hidden_states": pipe.encode_prompt(prompts, pipe.text_encoder.device, 1, False)[0]}


def _encode_xl(pipe: DiffusionPipeline, prompts: list[str]) -> Conditions:
    device = pipe.text_encoder_2.device
    states, _, pooled, _ = pipe.encode_prompt(
        prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    if pipe.config.force_zeros_for_empty_prompt:  # the unconditional branch it was trained and is sampled with
        empty = torch.tensor([prompt == "" for prompt in prompts], device=states.device)
        states, pooled = states.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
    return {"encoder_hidden_states": states, "text_embeds": pooled}


def _student(teacher: UNet2DConditionModel, guidance_embedding_dim: int | None) -> UNet2DConditionModel:
    # `_use_default_values` among the private entries would reset time_cond_proj_dim to its default
    config = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    config["time_cond_proj_dim"] = guidance_embedding_dim
    student = UNet2DConditionModel.from_config(config).to(teacher.device)
    weights: dict[str, Tensor] = teacher.state_dict()
    if guidance_embedding_dim:
        weights["time_embedding.cond_proj.weight"] = torch.zeros_like(student.time_embedding.cond_proj.weight)
    student.load_state_dict(weights)
    return student


def _check(path: str, pipe: DiffusionPipeline) -> None:
    unet, kind = pipe.unet, type(pipe).__name__
    if unet.config.class_embed_type or unet.config.encoder_hid_dim_type:
        raise UserError(f"The UNet of {path} is told more than text by a {kind}; give a text-to-image pipeline.")
    if is_xl(unet) and getattr(pipe, "text_encoder_2", None) is None:
        raise UserError(f"{path} is a {kind} without text_encoder_2; give a text-to-image pipeline.")
    check_vae(path, pipe.vae)
    if unet.config.in_channels != pipe.vae.config.latent_channels:
        raise UserError(
            f"The UNet of {path} takes {unet.config.in_channels} channels and its VAE makes "
            f"{pipe.vae.config.latent_channels}; give a text-to-image pipeline, not one for inpainting or editing."
        )
    if unet.config.time_cond_proj_dim:
        raise UserError(f"{path} is a guidance-distilled student already; give the diffusion model it came from.")


def check_vae(path: str, vae: nn.Module) -> None:
    """
    Raises:
        ValueError: It is none whose latents training draws and scales.
    """
    if not isinstance(vae, AutoencoderKL):
        raise UserError(
            f"The VAE of {path} is {type(vae).__name__}, whose latents training cannot draw; give a model with an "
            "AutoencoderKL (of a teacher by --pretrained_vae_model_name_or_path, too)."
        )
    if vae.config.get("latents_mean") or vae.config.get("latents_std"):
        raise UserError(
            f"The VAE of {path} normalises every channel (latents_mean, latents_std in its config), which training does "
            "not; give a model with another VAE."
        )


FAMILY = Family(
    pipeline=_pipeline,
    network="unet",
    prediction_type=lambda pipe: pipe.scheduler.config.prediction_type,
    lora_targets=LCM_LORA_TARGETS,
    guidance=_guidance,
    process=lambda pipe: DiscreteVP.from_scheduler(pipe.scheduler),
    call=call_unet,
    encode=_encode,
    latents=kl_latents,
    told=_told,
    student=_student,
    check=_check,
)
