"""The input by which a UNet is told where its jump ends: of a full student part of its config, of a LoRA student a layer more.

The layer is `time_embedding.cond_proj`, diffusers' own. Below a LoRA its weight is 0, and what is learnt is the adapter on it.
"""

from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cm_diffusers.errors import UserError


TARGET_DIM = 256  # size of the embedding
TARGET_INPUT = "time_embedding.cond_proj"


def check_takes_target(network: nn.Module) -> None:
    """
    Raises:
        ValueError: A network of its class has no such input.
    """
    if not isinstance(network, UNet2DConditionModel):
        raise UserError(
            f"--target_time embedded is for a UNet, but the teacher's network is a {type(network).__name__}: leave it out."
        )


def knows_target(unet: nn.Module) -> bool:
    return getattr(getattr(unet, "time_embedding", None), "cond_proj", None) is not None


def add_target_input(unet: UNet2DConditionModel, dim: int) -> None:
    """Gives a UNet the input, with weight 0, for a LoRA to act on; its config stays, so who does not know of it samples on."""
    linear = unet.time_embedding.linear_1
    dtype = linear.weight.dtype if linear.weight.is_floating_point() else unet.dtype  # of a quantized layer
    layer = nn.Linear(dim, linear.in_features, bias=False, device=linear.weight.device, dtype=dtype)
    unet.time_embedding.cond_proj = layer.requires_grad_(False)
    layer.weight.zero_()


def add_target_input_of(lora: Mapping[str, Tensor], unet: nn.Module) -> None:
    """Gives a UNet the input that a LoRA has a layer for.

    Args:
        lora: Tensors by the names of the file, of any layout.
    """
    spelled = TARGET_INPUT.replace(".", "_")
    halves = {name.replace(".", "_"): value for name, value in lora.items() if "cond_proj" in name}
    found = [half for name, half in halves.items() if f"{spelled}_lora_A" in name or f"{spelled}_lora_down" in name]
    if found and isinstance(unet, UNet2DConditionModel) and not knows_target(unet):
        add_target_input(unet, found[0].shape[1])


def settle_target_input(unet: nn.Module) -> None:
    """Takes off what `add_target_input` gave once no LoRA is on it; one whose weight a fused LoRA has filled becomes part of the config."""
    layer = unet.time_embedding.cond_proj if knows_target(unet) else None
    if layer is None or isinstance(layer, BaseTunerLayer) or unet.config.time_cond_proj_dim:
        return
    if torch.any(layer.weight):
        unet.register_to_config(time_cond_proj_dim=layer.in_features)
    else:
        unet.time_embedding.cond_proj = None
