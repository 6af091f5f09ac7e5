"""What the libraries save, fit to be shared: readable by older releases of theirs, without places of this machine."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


ALWAYS = ("r", "lora_alpha")


def nest_text_encoders(folder: Path) -> None:
    """Name the weights of a pipeline's CLIP text encoders as every release of transformers knows them.

    From 5.6 on transformers leaves `text_model.` out of the names; older ones then load random weights, with no more
    than a warning. All load names that have it.
    """
    for weights in folder.glob("text_encoder*/model.safetensors"):
        state = load_file(weights)
        if any(name.startswith("embeddings.") for name in state):
            save_file({f"text_model.{name}": value for name, value in state.items()}, weights, {"format": "pt"})


def forget_origin(folder: Path) -> None:
    """Leave out of a pipeline's or model's configs where it was loaded from."""
    for path in (*folder.glob("model_index.json"), *folder.rglob("config.json")):
        content = json.loads(path.read_text("utf-8"))
        if content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def lora_metadata(network: nn.Module) -> dict[str, Any]:
    """How the only LoRA on a network is put on: the fields that differ from their defaults.

    An older peft refuses a file with a field it does not know. The layers go by their paths: the patterns that chose
    them would also choose layers between them where the network is made part of a video model.
    """
    (config,) = network.peft_config.values()
    defaults = type(config)().to_dict()
    fields = {name: value for name, value in config.to_dict().items() if name in ALWAYS or value != defaults[name]}
    layers = sorted(path for path, layer in network.named_modules() if isinstance(layer, BaseTunerLayer))
    return fields | {"lora_dropout": 0.0, "target_modules": layers}


class Lora(NamedTuple):
    """A LoRA as it is saved: raw PEFT tensors and the fields that say how they are put on."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]

    @classmethod
    def of(cls, network: nn.Module) -> "Lora":
        """The only one that is on a network."""
        (name,) = network.peft_config
        tensors = {key: value.cpu() for key, value in get_peft_model_state_dict(network, adapter_name=name).items()}
        return cls(tensors, lora_metadata(network))

    def write(self, folder: Path) -> None:
        """`pytorch_lora_weights.safetensors` for `load_lora_weights`: the raw PEFT state dict, with rank and alpha as metadata.

        diffusers' own conversion loses the attention layers on reload. Without the dropout of training: `load_lora_weights`
        would leave it on when sampling.
        """
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            folder, unet_lora_layers=self.tensors, unet_lora_adapter_metadata=self.metadata
        )
