"""The names of a LoRA's layers, against what the programs that friends use make of them: tables of their rules, by facts.

ComfyUI and A1111 hold Stable Diffusion in Stability's layout, `input_blocks.4.1...`. Both take a layer whose name is its
place there; of diffusers' names ComfyUI computes the place from the layout, A1111 by fixed rules.
"""

import re
from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel

from cm_diffusers.models.families.unet import LCM_LORA_TARGETS, kohya_name


SD = {"cross_attention_dim": 768, "sample_size": 64}
SD2 = {"cross_attention_dim": 1024, "sample_size": 64, "use_linear_projection": True}
XL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SIZES = {"sd": SD, "sd2": SD2, "sdxl": XL}
LAYERS = {"sd": 278, "sd2": 278, "sdxl": 788}
IN_RESNET = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1"}
IN_RESNET |= {"conv_shortcut": "skip_connection"}


@cache
def full_size(kind: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**SIZES[kind])


def layers(unet: UNet2DConditionModel) -> list[str]:
    """What LCM-LoRA adapts."""
    return [path for path, _ in unet.named_modules() if any(f".{path}".endswith(f".{t}") for t in LCM_LORA_TARGETS)]


def comfyui(unet: UNet2DConditionModel) -> dict[str, str]:
    """Names that ComfyUI takes -> places in Stability's layout, by `lora_unet_` and each of both paths."""
    places, count = {}, unet.config.layers_per_block
    for path in layers(unet):
        side, *rest = path.split(".")
        if side == "mid_block":
            kind, number, *inner = rest
            block = f"middle_block_{1 if kind == 'attentions' else (0, 2)[int(number)]}"
        else:
            block, kind, number, *inner = rest
            index = int(block) * (count + 1) + (count if "sampler" in kind else int(number))
            reads = "CrossAttn" in getattr(unet.config, f"{side[:-1]}_types")[int(block)]
            place = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1 + reads}[kind]
            block = f"input_blocks_{index + 1}_{place}" if side == "down_blocks" else f"output_blocks_{index}_{place}"
        name = "_".join(inner)
        name = {"resnets": IN_RESNET, "downsamplers": {"conv": "op"}}.get(kind, {}).get(name, name)
        places[f"lora_unet_{path.replace('.', '_')}"] = places[f"lora_unet_{block}_{name}"] = f"{block}_{name}"
    return places


A1111 = [  # of names that begin with lora_unet_: pattern -> place
    (r"(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", lambda *found: _a1111_block(*found)),
    (r"mid_block_attentions_(\d+)_(.+)", lambda i, rest: f"middle_block_1_{rest}"),
    (r"mid_block_resnets_(\d+)_(.+)", lambda i, rest: f"middle_block_{2 * int(i)}_{IN_RESNET.get(rest, rest)}"),
    (r"down_blocks_(\d+)_downsamplers_0_conv", lambda i: f"input_blocks_{3 + 3 * int(i)}_0_op"),
    (r"up_blocks_(\d+)_upsamplers_0_conv", lambda i: f"output_blocks_{2 + 3 * int(i)}_{2 if int(i) else 1}_conv"),
]


def _a1111_block(side: str, block: str, kind: str, number: str, rest: str) -> str:
    index, place = 3 * int(block) + int(number), int(kind == "attentions")
    rest = IN_RESNET.get(rest, rest) if kind == "resnets" else rest
    return f"input_blocks_{1 + index}_{place}_{rest}" if side == "down" else f"output_blocks_{index}_{place}_{rest}"


def a1111(name: str, places: set[str]) -> str | None:
    """Where A1111 puts a layer of a LoRA: by the rules for diffusers' names, else at the place that it names."""
    name = name.removeprefix("lora_unet_")
    for pattern, place in A1111:
        if (found := re.fullmatch(pattern, name)) and place(*found.groups()) in places:
            return place(*found.groups())
    return name if name in places else None


@pytest.mark.parametrize("kind", SIZES)
def test_comfyui_and_a1111_take_every_layer(kind: str) -> None:
    unet = full_size(kind)
    assert len(layers(unet)) == LAYERS[kind]
    table = comfyui(unet)
    for path in layers(unet):
        name = kohya_name(path, unet)
        place = table[f"lora_unet_{path.replace('.', '_')}"]
        assert (table.get(name), a1111(name, set(table.values()))) == (place, place), path


def test_a1111_misses_a_layer_of_xl_under_diffusers_names() -> None:
    """Why XL's have Stability's."""
    unet = full_size("sdxl")
    places = set(comfyui(unet).values())
    missed = [path for path in layers(unet) if a1111(f"lora_unet_{path.replace('.', '_')}", places) is None]
    assert missed == ["up_blocks.0.upsamplers.0.conv"]


def test_names_are_those_of_sd_scripts() -> None:
    """As its LoRAs have them: diffusers' for Stable Diffusion 1 and 2, Stability's for XL."""
    deep = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert kohya_name(deep, full_size("sd")) == f"lora_unet_{deep.replace('.', '_')}"
    assert kohya_name(deep, full_size("sdxl")) == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    assert kohya_name("mid_block.resnets.1.conv2", full_size("sdxl")) == "lora_unet_middle_block_2_out_layers_3"
    assert kohya_name("add_embedding.linear_2", full_size("sdxl")) == "lora_unet_label_emb_0_2"


def test_names_that_diffusers_would_not_find_back_are_its_own() -> None:
    """Of XL's kin: more blocks than it counts, or one upwards without attention that has to grow."""
    for changes in (
        {"layers_per_block": 3},
        {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")},
    ):
        small = {"block_out_channels": (32, 32, 32), "transformer_layers_per_block": 1, "attention_head_dim": 4}
        with torch.device("meta"):
            unet = UNet2DConditionModel(**XL | small | changes)
        assert kohya_name("mid_block.resnets.0.conv1", unet) == "lora_unet_mid_block_resnets_0_conv1"
