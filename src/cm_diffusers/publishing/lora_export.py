"""A LoRA in the two forms it is shared in: one that other programs read, and PEFT's, exactly as it was trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from cm_diffusers.models.adapters import adapter_layers
from cm_diffusers.models.casting import HALVES
from cm_diffusers.models.families.base import family_of
from cm_diffusers.models.target_input import TARGET_INPUT
from cm_diffusers.pipelines.lora import PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS
from cm_diffusers.publishing.student_kinds import LORA_WEIGHTS


FAMILIES = {  # cross_attention_dim -> kohya's ss_base_model_version, architecture of the model spec
    768: ("sd_v1", "stable-diffusion-v1"),
    1024: ("sd_v2", "stable-diffusion-v2-512"),
    2048: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}
ALWAYS = ("r", "lora_alpha")


class Lora(NamedTuple):
    """A LoRA as it is saved.

    Attributes:
        tensors: Raw PEFT state dict.
        config: The fields of its `LoraConfig` that say how it is put on.
        alphas: For each adapted layer the alpha that is true for it: a reader scales by alpha / rank, so it is the
            layer's scale times its rank, whatever ranks and alphas the config holds.
        names: Of each adapted layer for other programs, which have no input of the target; empty where these would lose the
            alphas, see `Family.lora_name`.
        header: What other programs show and sort by.
        half: What half precision is for its network.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    alphas: dict[str, float]
    names: dict[str, str]
    header: dict[str, str]
    half: torch.dtype

    @classmethod
    def of(cls, network: nn.Module) -> "Lora":
        """The only one that is on a network."""
        (adapter,) = network.peft_config
        tensors = {k: _plain(v) for k, v in get_peft_model_state_dict(network, adapter_name=adapter).items()}
        layers = {path: one for path, one in network.named_modules() if isinstance(one, BaseTunerLayer)}
        alphas = {path: float(one.scaling[adapter] * one.r[adapter]) for path, one in layers.items()}
        family = family_of(network)
        others = [path for path in layers if path != TARGET_INPUT]
        names = {path: family.lora_name(path, network) for path in others} if family.lora_name else {}
        names, half = {} if None in names.values() else names, HALVES[family.network]
        return cls(tensors, lora_config(network), alphas, names, _header(network, adapter), half)

    def writer(self, title: str, prediction_type: str | None, fp16: bool = False) -> Callable[[Path], None]:
        """Writes both forms into a folder: `pytorch_lora_weights.safetensors` for everybody, and `peft/`.

        A folder below, so that no loader takes the second for the first.

        Args:
            title: That programs show.
            prediction_type: Of the base model, as schedulers name it; None where the model spec has no name for it.
            fp16: Store the first in half precision, see `HALVES`; the second is exact.
        """

        def write(folder: Path) -> None:
            told = {"title": title}
            if prediction_type is not None:
                told["prediction_type"] = "v" if prediction_type == "v_prediction" else prediction_type
            header = self.header | {f"modelspec.{name}": value for name, value in told.items()}
            shared = self.kohya if self.names else self.folded
            save_file(shared(self.half if fp16 else torch.float32), folder / LORA_WEIGHTS, header)
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

    def folded(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """`transformer.<path>.lora_A.weight` and `.lora_B.weight` of each layer, the second with its scale in it."""
        state = {}
        for path, alpha in self.alphas.items():
            down, up = (self.tensors[f"{path}.lora_{half}.weight"] for half in "AB")
            state[f"transformer.{path}.lora_A.weight"] = down.to(dtype)
            state[f"transformer.{path}.lora_B.weight"] = (up * (alpha / len(down))).to(dtype)
        return state


def lora_config(network: nn.Module) -> dict[str, Any]:
    """How the only LoRA on a network is put on: the fields that differ from their defaults.

    An older peft refuses a file with a field it does not know. The layers go by their paths: the patterns that chose
    them would also choose layers between them where the network is made part of a video model. Without the dropout of
    training, which a loader would leave on when sampling.
    """
    (config,) = network.peft_config.values()
    defaults = type(config)().to_dict()
    differing = {name: value for name, value in config.to_dict().items() if name in ALWAYS or value != defaults[name]}
    fields = {name: value for name, value in differing.items() if name != "exclude_modules"}
    layers = sorted(path for path, layer in network.named_modules() if isinstance(layer, BaseTunerLayer))
    return fields | {"lora_dropout": 0.0, "target_modules": layers}


def _header(network: nn.Module, adapter: str) -> dict[str, str]:
    """Strings only, as safetensors wants; kohya's tools know networks of UNets alone."""
    spec = {"modelspec.sai_model_spec": "1.0.0", "modelspec.implementation": "diffusers"}
    if family_of(network).network != "unet":
        return {"format": "pt", **spec}
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
        "modelspec.architecture": f"{architecture}/lora",
        **spec,
    }


def _plain(weight: Tensor) -> Tensor:
    return weight.detach().cpu().contiguous()
