"""Whether a LoRA can be read, and fits; and PEFT's exact form of ours."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors.torch import load_file
from torch import Tensor, nn


Source = str | os.PathLike
PEFT_WEIGHTS, PEFT_CONFIG = "peft/adapter_model.safetensors", "peft/adapter_config.json"  # PEFT's own names
PEFT_PREFIX = "base_model.model."  # of PEFT's names of layers
SAFE = (".safetensors",)
OTHERS = (".bin", ".pt", ".ckpt")


def check_weights(source: Source, kwargs: dict[str, Any]) -> None:
    """A local LoRA is there, and none but safetensors are read unless the caller says otherwise.

    Raises:
        ValueError: It is not there, or could hold code.
    """
    path, name, safe = Path(source), kwargs.get("weight_name"), kwargs.get("use_safetensors")
    file = name or (path.name if path.is_file() else None)
    if safe and file and not str(file).endswith(SAFE):
        raise ValueError(
            f"{file!r} is no safetensors file, and others can hold code that loading would run; get it in that format, or "
            "say use_safetensors=False if you trust it."
        )
    if not path.exists():
        if _is_local(path):
            raise ValueError(f"There is no LoRA {str(source)!r}: neither such a folder nor such a file is here.")
        return
    folder, suffixes = path / (kwargs.get("subfolder") or ""), SAFE if safe else (*SAFE, *OTHERS)
    found = (folder / name).is_file() if name else any(file.suffix in suffixes for file in folder.glob("*"))
    if path.is_dir() and not found:
        raise ValueError(
            f"There is no {name or 'safetensors file'} in {str(folder)!r}; say where it is with subfolder and weight_name."
        )


class ExactLora(NamedTuple):
    """What `load_lora_into_unet` takes: PEFT tensors, and the fields of their `LoraConfig`."""

    state_dict: dict[str, Tensor]
    metadata: dict[str, Any]


def read_exact(source: Source, subfolder: str | None = None, **hub: Any) -> ExactLora | None:
    """The exact form that lies beside a LoRA of this package; None where there is none, as in older folders of ours.

    Args:
        source: Folder or Hub id.
        subfolder: Of it.
        hub: As for `hf_hub_download`.
    """
    try:
        weights, config = (_file(source, name, subfolder, hub) for name in (PEFT_WEIGHTS, PEFT_CONFIG))
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError):
        return None
    if not (weights.is_file() and config.is_file()):
        return None
    fields = json.loads(config.read_text("utf-8"))
    state = {f"unet.{name.removeprefix(PEFT_PREFIX)}": value for name, value in load_file(weights).items()}
    left_out = ("peft_type", "inference_mode")
    return ExactLora(state, {f"unet.{name}": value for name, value in fields.items() if name not in left_out})


def _file(source: Source, name: str, subfolder: str | None, hub: dict[str, Any]) -> Path:
    if Path(source).exists():
        return Path(source) / (subfolder or "") / name
    return Path(hf_hub_download(str(source), name, subfolder=subfolder, **hub))


def load_lora(pipe: DiffusionPipeline, source: Source, **hub: Any) -> None:
    """Puts a LoRA on a stock pipeline, by its exact form where it has one.

    Args:
        source: Folder or Hub id.
        hub: As for `hf_hub_download`.
    """
    exact = read_exact(source, **hub)
    if exact is None:
        pipe.load_lora_weights(source, use_safetensors=True, **hub)
    else:
        pipe.load_lora_into_unet(exact.state_dict, None, pipe.unet, metadata=exact.metadata, _pipeline=pipe)


def folder_of(source: Source, subfolder: str | None) -> Source:
    """Where the record of a LoRA is: beside the weights."""
    path = Path(source)
    if not path.exists():
        return source
    return path.parent if path.is_file() else path / (subfolder or "")


def check_fits_unet(state_dict: dict[str, Tensor], unet: nn.Module) -> None:
    """Every LoRA layer for the UNet has its place there, of the right width.

    Raises:
        ValueError: One has not, or nothing is for the UNet or a text encoder.
    """
    layers = _of(state_dict, "unet")
    if not layers and not any(key.startswith("text_encoder") for key in state_dict):
        raise ValueError(
            f"This LoRA has no layer for a UNet or a text encoder; its layers are like {next(iter(state_dict), None)!r}."
        )
    if not any(".lora_A." in key for key in layers):
        layers = convert_unet_state_dict_to_peft(layers)
    _check_layers(layers, unet, "UNet")


def check_fits_text_encoder(state_dict: dict[str, Tensor], text_encoder: nn.Module, prefix: str) -> None:
    """Every LoRA layer whose name begins with `prefix` has its place in the text encoder, of the right width.

    Raises:
        ValueError: One has not.
    """
    layers = convert_state_dict_to_peft(convert_state_dict_to_diffusers(_of(state_dict, prefix)))
    if not hasattr(text_encoder, "text_model"):  # transformers 5.6 made CLIPTextModel flat
        layers = {key.removeprefix("text_model."): value for key, value in layers.items()}
    _check_layers(layers, text_encoder, prefix)


def _of(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{prefix}."): value for k, value in state_dict.items() if k.startswith(f"{prefix}.")}


def _check_layers(layers: dict[str, Tensor], model: nn.Module, name: str) -> None:
    modules = dict(model.named_modules())
    for key, value in layers.items():
        path, _, part = key.rpartition(".lora_")
        if part in ("A.weight", "B.weight"):
            _check_layer(path, part[0], value, modules.get(path), name)


def _check_layer(path: str, part: str, weight: Tensor, module: nn.Module | None, name: str) -> None:
    if module is None:
        raise ValueError(f"This LoRA is for another architecture: the {name} has no layer {path!r}.")
    found, wanted = (weight.shape[1], module.weight.shape[1]) if part == "A" else (len(weight), len(module.weight))
    if found != wanted:
        side = "reads" if part == "A" else "gives"
        raise ValueError(
            f"This LoRA is for another architecture: its layer {path!r} {side} {found} features, the {name}'s {wanted}."
        )


def _is_local(path: Path) -> bool:
    """Whether it can be no Hub id."""
    return path.is_absolute() or len(path.parts) > 2 or path.parts[0] in ("..", "~") or path.suffix in (*SAFE, *OTHERS)
