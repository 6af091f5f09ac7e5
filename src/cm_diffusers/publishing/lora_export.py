"""A LoRA in the two forms it is shared in: kohya's, which all programs read, and PEFT's, exactly as it was trained."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from cm_diffusers.models.adapters import adapter_layers
from cm_diffusers.models.families.unet import is_xl
from cm_diffusers.pipelines.lora import PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS
from cm_diffusers.publishing.student_kinds import LORA_WEIGHTS


Network = UNet2DConditionModel | UNetMotionModel
FAMILIES = {  # cross_attention_dim -> kohya's ss_base_model_version, architecture of the model spec
    768: ("sd_v1", "stable-diffusion-v1"),
    1024: ("sd_v2", "stable-diffusion-v2-512"),
    2048: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}
ALWAYS = ("r", "lora_alpha")
ENDS = {  # outside the blocks: diffusers' name -> Stability's
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
INSIDE = {  # the blocks
    ("resnets", "conv1"): "in_layers_2",
    ("resnets", "conv2"): "out_layers_3",
    ("resnets", "time_emb_proj"): "emb_layers_1",
    ("resnets", "conv_shortcut"): "skip_connection",
    ("downsamplers", "conv"): "op",
}
BLOCK = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
MOST_BLOCKS = 9  # on a side of Stability's UNet: diffusers takes input_blocks_10 for input_blocks_1


class Lora(NamedTuple):
    """A LoRA as it is saved.

    Attributes:
        tensors: Raw PEFT state dict.
        config: The fields of its `LoraConfig` that say how it is put on.
        alphas: For each adapted layer the alpha that is true for it: a reader scales by alpha / rank, so it is the
            layer's scale times its rank, whatever ranks and alphas the config holds.
        names: kohya's, for each adapted layer.
        header: What kohya's tools and A1111 show and sort by.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    alphas: dict[str, float]
    names: dict[str, str]
    header: dict[str, str]

    @classmethod
    def of(cls, network: Network) -> "Lora":
        """The only one that is on a network."""
        (adapter,) = network.peft_config
        tensors = {k: _plain(v) for k, v in get_peft_model_state_dict(network, adapter_name=adapter).items()}
        layers = {path: one for path, one in network.named_modules() if isinstance(one, BaseTunerLayer)}
        alphas = {path: float(one.scaling[adapter] * one.r[adapter]) for path, one in layers.items()}
        names = {path: kohya_name(path, network) for path in layers}
        return cls(tensors, lora_config(network), alphas, names, _header(network, adapter))

    def writer(self, title: str, prediction_type: str, fp16: bool = False) -> Callable[[Path], None]:
        """Writes both forms into a folder: `pytorch_lora_weights.safetensors` for everybody, and `peft/`.

        A folder below, so that no loader takes the second for the first.

        Args:
            title: That programs show.
            prediction_type: Of the base model, as schedulers name it.
            fp16: Store the first in half precision; the second is exact.
        """

        def write(folder: Path) -> None:
            told = {"title": title, "prediction_type": "v" if prediction_type == "v_prediction" else prediction_type}
            header = self.header | {f"modelspec.{name}": value for name, value in told.items()}
            save_file(self.kohya(torch.float16 if fp16 else torch.float32), folder / LORA_WEIGHTS, header)
            (folder / PEFT_WEIGHTS).parent.mkdir()
            exact = {f"{PEFT_PREFIX}{name}": value for name, value in self.tensors.items()}
            save_file(exact, folder / PEFT_WEIGHTS, {"format": "pt"})
            config = {"peft_type": "LORA", "inference_mode": True, **self.config}
            (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")

        return write

    def kohya(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """`<name>.lora_down.weight`, `.lora_up.weight` and `.alpha` of each layer; convolutions keep 4 dimensions."""
        state = {}
        for path, name in self.names.items():
            state[f"{name}.lora_down.weight"] = self.tensors[f"{path}.lora_A.weight"].to(dtype)
            state[f"{name}.lora_up.weight"] = self.tensors[f"{path}.lora_B.weight"].to(dtype)
            state[f"{name}.alpha"] = torch.tensor(self.alphas[path])
        return state


def kohya_name(path: str, unet: Network) -> str:
    """A layer's name in kohya's form: for Stable Diffusion XL after Stability's UNet, otherwise after diffusers'.

    So sd-scripts trains them. ComfyUI and diffusers read both; A1111 reads diffusers' names as if only the first block
    upwards had no attention, as it is in Stable Diffusion 1 and 2, and misses a layer of XL's.
    """
    return f"lora_unet_{_stability_name(path, unet) or path.replace('.', '_')}"


def _stability_name(path: str, unet: Network) -> str | None:
    """None where there is no such name, or diffusers would not find the way back."""
    if not (is_xl(unet) and _is_regular(unet)):
        return None
    if path in ENDS:
        return ENDS[path]
    if (found := BLOCK.fullmatch(path)) is None:
        return None
    side, block, kind, number, rest = found.groups()
    rest = INSIDE.get((kind, rest), rest.replace(".", "_"))
    if side == "mid":
        return f"middle_block_{1 if kind == 'attentions' else 2 * int(number)}_{rest}"
    layers = unet.config.layers_per_block
    index = int(block) * (layers + 1) + (layers if kind.endswith("samplers") else int(number))
    place = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}[kind]
    return f"{'input' if side == 'down' else 'output'}_blocks_{index + (side == 'down')}_{place}_{rest}"


def _is_regular(unet: Network) -> bool:
    """Whether its blocks can be counted through as diffusers does: alike, few, and none without attention grows."""
    layers, grows = unet.config.layers_per_block, unet.config.up_block_types[:-1]
    if not isinstance(layers, int) or len(unet.config.block_out_channels) * (layers + 1) > MOST_BLOCKS:
        return False
    return all("CrossAttn" in block for block in grows)


def lora_config(network: Network) -> dict[str, Any]:
    """How the only LoRA on a network is put on: the fields that differ from their defaults.

    An older peft refuses a file with a field it does not know. The layers go by their paths: the patterns that chose
    them would also choose layers between them where the network is made part of a video model. Without the dropout of
    training, which a loader would leave on when sampling.
    """
    (config,) = network.peft_config.values()
    defaults = type(config)().to_dict()
    fields = {name: value for name, value in config.to_dict().items() if name in ALWAYS or value != defaults[name]}
    layers = sorted(path for path, layer in network.named_modules() if isinstance(layer, BaseTunerLayer))
    return fields | {"lora_dropout": 0.0, "target_modules": layers}


def _header(network: Network, adapter: str) -> dict[str, str]:
    """Strings only, as safetensors wants."""
    config = network.peft_config[adapter]
    version, architecture = FAMILIES.get(network.config.cross_attention_dim, ("unknown", "unknown"))
    ranks = {layer.r[adapter] for layer in adapter_layers(network)}
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
    }


def _plain(weight: Tensor) -> Tensor:
    return weight.detach().cpu().contiguous()
