"""Stable Diffusion under the names of its original layout, which ComfyUI, A1111 and their kin read.

Facts of that layout: `model.diffusion_model.` is the network, whose blocks are counted through; `first_stage_model.` the
VAE, whose attention is convolutions and whose decoder counts its levels from the other end; `cond_stage_model.` the text
tower, of Stable Diffusion 2 as open_clip names it; `conditioner.embedders.0.` and `.1.` the two of XL.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cm_diffusers.errors import UserError


UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
VAE_MIDDLE = {"resnets.0": "mid.block_1", "attentions.0": "mid.attn_1", "resnets.1": "mid.block_2"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_NAMES = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_name(name: str, config: Mapping[str, Any]) -> str:
    """The name of a network's weight, below `UNET`.

    Args:
        config: Of the network.

    Raises:
        ValueError: The layout has no such weight.
    """
    layer, _, kind = name.rpartition(".")
    if layer in ENDS:
        return f"{ENDS[layer]}.{kind}"
    block, *rest = name.split(".")
    if block == "mid_block":
        return f"middle_block.{MIDDLE['.'.join(rest[:2])]}.{_inside(rest)}"
    if block not in ("down_blocks", "up_blocks"):
        raise UserError(f"The original layout of Stable Diffusion has no weight {name}.")
    number, part, place, *_ = rest
    number, place, layers = int(number), int(place), config["layers_per_block"] + 1
    if part == "downsamplers":
        return f"input_blocks.{(number + 1) * layers}.0.op.{kind}"
    if part == "upsamplers":
        beside = 1 + ("Attn" in config["up_block_types"][number])
        return f"output_blocks.{(number + 1) * layers - 1}.{beside}.conv.{kind}"
    count = (
        f"input_blocks.{number * layers + place + 1}"
        if block == "down_blocks"
        else f"output_blocks.{number * layers + place}"
    )
    return f"{count}.{int(part == 'attentions')}.{_inside(rest[1:])}"


def _inside(words: list[str]) -> str:
    """`words` from "resnets" or "attentions" on; inside of attentions the names are the same."""
    part, _, *rest = words
    return ".".join([RESNET[rest[0]], *rest[1:]] if part == "resnets" else rest)


def vae_name(name: str, levels: int) -> str:
    """The name of a VAE's weight, below `VAE`.

    Args:
        levels: Of its encoder and decoder.
    """
    half, *rest = name.split(".")
    if half not in ("encoder", "decoder"):
        return name
    if rest[0] == "mid_block":
        place, inside = VAE_MIDDLE[".".join(rest[1:3])], ".".join(rest[3:])
        for ours, theirs in VAE_ATTENTION.items() if "attn" in place else ():
            inside = inside.replace(f"{ours}.", f"{theirs}.")
        return f"{half}.{place}.{inside}".replace("conv_shortcut", "nin_shortcut")
    if rest[0] not in ("down_blocks", "up_blocks"):
        return name.replace("conv_norm_out", "norm_out")
    _, number, part, place, *inside = rest
    way, level = ("down", int(number)) if half == "encoder" else ("up", levels - 1 - int(number))
    if part != "resnets":
        return f"{half}.{way}.{level}.{way}sample.{'.'.join(inside)}"
    return f"{half}.{way}.{level}.block.{place}.{'.'.join(inside)}".replace("conv_shortcut", "nin_shortcut")


def open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text tower of transformers, without `text_model.` in its names, as open_clip has it: query, key and value in one."""
    found = {}
    for name, value in weights.items():
        if name == "text_projection.weight":
            found["text_projection"] = value.T.contiguous()
        elif ".q_proj." in name:
            parts = [weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            found[_renamed(name.replace("self_attn.q_proj.", "attn.in_proj_"))] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            found[_renamed(name)] = value
    return found


def _renamed(name: str) -> str:
    for ours, theirs in OPEN_CLIP_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def as_convolution(name: str, value: Tensor) -> Tensor:
    """The VAE's attention, whose linear layers are convolutions of one pixel there."""
    linear = ".attentions." in name and name.endswith("weight") and value.ndim == 2
    return value[:, :, None, None] if linear else value


def without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text tower's weights as transformers from 5.6 on names them."""
    return {name.removeprefix("text_model."): value for name, value in weights.items()}


def prefixed(prefix: str, weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in dict(weights).items()}
