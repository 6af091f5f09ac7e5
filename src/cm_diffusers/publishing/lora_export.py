"""A LoRA as ComfyUI, A1111 and kohya's tools read it: flat names, and the alpha that is true for each layer."""

import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from cm_diffusers.models.adapters import adapter_layers


FAMILIES = {  # cross_attention_dim -> kohya's ss_base_model_version, architecture of the model spec
    768: ("sd_v1", "stable-diffusion-v1"),
    1024: ("sd_v2", "stable-diffusion-v2-512"),
    2048: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}


def kohya_state_dict(unet: UNet2DConditionModel, adapter: str = "default") -> dict[str, Tensor]:
    """`lora_unet_<path>.lora_down.weight`, `.lora_up.weight` and `.alpha` for each adapted layer.

    Convolutions keep their 4 dimensions. A reader scales by alpha / rank, so alpha is the layer's scale times its
    rank, whatever ranks and alphas the config holds.
    """
    tensors = {}
    for name, layer in unet.named_modules():
        if adapter in getattr(layer, "lora_A", {}):
            stem = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{stem}.lora_down.weight"] = _plain(layer.lora_A[adapter].weight)
            tensors[f"{stem}.lora_up.weight"] = _plain(layer.lora_B[adapter].weight)
            tensors[f"{stem}.alpha"] = torch.tensor(float(layer.scaling[adapter] * layer.r[adapter]))
    return tensors


def kohya_metadata(unet: UNet2DConditionModel, title: str, prediction_type: str) -> dict[str, str]:
    """The header fields that kohya's tools and A1111 show and sort by. Strings only, as safetensors wants."""
    config = unet.peft_config["default"]
    version, architecture = FAMILIES.get(unet.config.cross_attention_dim, ("unknown", "unknown"))
    ranks = {layer.r["default"] for layer in adapter_layers(unet)}
    return {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r) if ranks == {config.r} else "Dynamic",
        "ss_network_alpha": str(config.lora_alpha) if not config.alpha_pattern else "Dynamic",
        "ss_network_args": json.dumps({"conv_dim": str(config.r), "conv_alpha": str(config.lora_alpha)}),
        "ss_base_model_version": version,
        "ss_v2": str(version == "sd_v2"),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else prediction_type,
    }


def save_kohya(unet: UNet2DConditionModel, path: Path, title: str, prediction_type: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(kohya_state_dict(unet), path, kohya_metadata(unet, title, prediction_type))


def _plain(weight: Tensor) -> Tensor:
    return weight.detach().cpu().contiguous()
