"""What is saved by new releases of transformers and peft, in the form that older ones read as well."""

from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import load_file, save_file


ALWAYS = ("r", "lora_alpha", "target_modules")


def nest_text_encoders(folder: Path) -> None:
    """Name the weights of a pipeline's CLIP text encoders as every release of transformers knows them.

    From 5.6 on transformers leaves `text_model.` out of the names; older ones then load random weights, with no more
    than a warning. All load names that have it.
    """
    for weights in folder.glob("text_encoder*/model.safetensors"):
        state = load_file(weights)
        if any(name.startswith("embeddings.") for name in state):
            save_file({f"text_model.{name}": value for name, value in state.items()}, weights, {"format": "pt"})


def lora_metadata(config: LoraConfig) -> dict[str, Any]:
    """The fields that differ from their defaults: an older peft refuses a file with a field it does not know."""
    defaults = type(config)().to_dict()
    fields = {name: value for name, value in config.to_dict().items() if name in ALWAYS or value != defaults[name]}
    return fields | {"lora_dropout": 0.0}
