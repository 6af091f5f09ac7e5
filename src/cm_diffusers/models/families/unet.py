"""Stable Diffusion 1.x, 2.x and XL: UNets of the variance-preserving process, guided by a second pass."""

import re

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel, UNetMotionModel
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

LORA_ENDS = {  # outside the blocks: diffusers' name -> Stability's
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
LORA_INSIDE = {  # the blocks
    ("resnets", "conv1"): "in_layers_2",
    ("resnets", "conv2"): "out_layers_3",
    ("resnets", "time_emb_proj"): "emb_layers_1",
    ("resnets", "conv_shortcut"): "skip_connection",
    ("downsamplers", "conv"): "op",
}
LORA_BLOCK = re.compile(
    r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
MOST_LORA_BLOCKS = 9  # on a side of Stability's UNet: diffusers takes input_blocks_10 for input_blocks_1


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


def kohya_name(path: str, unet: UNet2DConditionModel | UNetMotionModel) -> str:
    """A layer's name in kohya's form: for Stable Diffusion XL after Stability's UNet, otherwise after diffusers'.

    So sd-scripts trains them. ComfyUI and diffusers read both; A1111 reads diffusers' names as if only the first block
    upwards had no attention, as it is in Stable Diffusion 1 and 2, and misses a layer of XL's.
    """
    return f"lora_unet_{_stability_name(path, unet) or path.replace('.', '_')}"


def _stability_name(path: str, unet: UNet2DConditionModel | UNetMotionModel) -> str | None:
    """None where there is no such name, or diffusers would not find the way back."""
    if not (is_xl(unet) and _is_regular(unet)):
        return None
    if path in LORA_ENDS:
        return LORA_ENDS[path]
    if (found := LORA_BLOCK.fullmatch(path)) is None:
        return None
    side, block, kind, number, rest = found.groups()
    rest = LORA_INSIDE.get((kind, rest), rest.replace(".", "_"))
    if side == "mid":
        return f"middle_block_{1 if kind == 'attentions' else 2 * int(number)}_{rest}"
    layers = unet.config.layers_per_block
    index = int(block) * (layers + 1) + (layers if kind.endswith("samplers") else int(number))
    place = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}[kind]
    return f"{'input' if side == 'down' else 'output'}_blocks_{index + (side == 'down')}_{place}_{rest}"


def _is_regular(unet: UNet2DConditionModel | UNetMotionModel) -> bool:
    """Whether its blocks can be counted through as diffusers does: alike, few, and none without attention grows."""
    layers, grows = unet.config.layers_per_block, unet.config.up_block_types[:-1]
    if not isinstance(layers, int) or len(unet.config.block_out_channels) * (layers + 1) > MOST_LORA_BLOCKS:
        return False
    return all("CrossAttn" in block for block in grows)


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
    lora_name=kohya_name,
    tag=lambda unet: "stable-diffusion-xl" if is_xl(unet) else "stable-diffusion",
)
