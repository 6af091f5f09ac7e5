"""One random network of each kind that `check_jvp` knows, of some ten thousand parameters."""

from collections.abc import Callable

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    ModelMixin,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DModel,
    UNetMotionModel,
)
from peft import LoraConfig
from tiny import tiny_unet


HEADS = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}


def unet2d(**config: object) -> UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}
    return UNet2DModel(**{**blocks, **sizes, **config})


def with_lora() -> ModelMixin:
    unet = tiny_unet(time_cond_proj_dim=8)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return unet


def motion() -> UNetMotionModel:
    return UNetMotionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"),
    )


def dit() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(**HEADS, in_channels=4, out_channels=8, sample_size=8, num_embeds_ada_norm=10)


def sd3() -> SD3Transformer2DModel:
    sizes = {"sample_size": 8, "in_channels": 4, "joint_attention_dim": 16, "caption_projection_dim": 16}
    return SD3Transformer2DModel(**HEADS, **sizes, out_channels=4, pooled_projection_dim=16, pos_embed_max_size=8)


def flux(**config: object) -> FluxTransformer2DModel:
    sizes = {"in_channels": 8, "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4)}
    return FluxTransformer2DModel(**{**HEADS, **sizes, "num_single_layers": 1, "guidance_embeds": True, **config})


def sana(**config: object) -> SanaTransformer2DModel:
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    sizes = {"in_channels": 4, "out_channels": 4, "caption_channels": 16, "sample_size": 8, "patch_size": 1}
    return SanaTransformer2DModel(**{**HEADS, **cross, **sizes, **config})


ZOO: dict[str, Callable[[], ModelMixin]] = {
    "unet2d": unet2d,
    "unet2d of classes": lambda: unet2d(num_class_embeds=10),
    "unet": lambda: tiny_unet(time_cond_proj_dim=8),
    "unet with LoRA": with_lora,
    "unet of SDXL": lambda: tiny_unet(**XL),
    "motion": motion,
    "dit": dit,
    "sd3": sd3,
    "flux": flux,
    "sana": sana,
    "sana with guidance": lambda: sana(guidance_embeds=True),
}


def of_zoo(name: str) -> ModelMixin:
    """With random weights everywhere: some projections start at zero."""
    torch.manual_seed(0)
    network = ZOO[name]().eval()
    for value in network.parameters():
        if not value.any():
            torch.nn.init.normal_(value, std=0.02)
    return network
