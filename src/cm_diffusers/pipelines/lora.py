"""Reading LoRAs, and putting them on the networks of a pipeline."""

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, _fetch_state_dict
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from cm_diffusers.errors import UserError
from cm_diffusers.models.teachers import network_name
from cm_diffusers.pipelines.lora_keys import Layers, lora_layers
from cm_diffusers.record import read_record


Source = str | os.PathLike
PARTS = ("unet", "text_encoder", "text_encoder_2")  # of Stable Diffusion
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")  # PEFT's own names
PEFT_WEIGHTS, PEFT_CONFIG = (f"peft/{name}" for name in PEFT_FILES)
PEFT_PREFIX = "base_model.model."  # of PEFT's names of layers
HUB = ("token", "revision", "cache_dir", "local_files_only")
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
        raise UserError(
            f"{file!r} is no safetensors file, and others can hold code that loading would run; get it in that format, or "
            "say use_safetensors=False if you trust it."
        )
    if not path.exists():
        if _is_local(path):
            raise UserError(f"There is no LoRA {str(source)!r}: neither such a folder nor such a file is here.")
        return
    folder, suffixes = path / (kwargs.get("subfolder") or ""), SAFE if safe else (*SAFE, *OTHERS)
    found = (folder / name).is_file() if name else any(file.suffix in suffixes for file in folder.glob("*"))
    if path.is_dir() and not found:
        raise UserError(
            f"There is no {name or 'safetensors file'} in {str(folder)!r}; say where it is with subfolder and weight_name."
        )


class LoraFile(NamedTuple):
    """Tensors by the names of the file, and fields of `LoraConfig` with the part's name before each, where it has them."""

    state_dict: dict[str, Tensor]
    metadata: dict[str, Any] | None


def read_lora(source: Source | dict[str, Tensor], network: str = "unet", **kwargs: Any) -> LoraFile:
    """A LoRA as it is stored; of one of this package the exact form, unless a `weight_name` says otherwise.

    Args:
        source: Folder, file, Hub id, or the tensors.
        network: What the pipeline calls its network.
        kwargs: Of `load_lora_weights`.
    """
    hub = {name: kwargs[name] for name in HUB if kwargs.get(name) is not None}
    subfolder, name = kwargs.get("subfolder"), kwargs.get("weight_name")
    if not isinstance(source, dict) and name is None:
        if exact := read_exact(source, subfolder, network, **hub):
            return exact
        if not Path(source).exists() and read_record(source, **hub):
            name = LORA_WEIGHT_NAME_SAFE  # which diffusers must be told where it may not ask the Hub
    safe = kwargs.get("use_safetensors")
    fetched = _fetch_state_dict(
        source,
        weight_name=name,
        use_safetensors=True if safe is None else safe,
        allow_pickle=safe is None,
        force_download=kwargs.get("force_download", False),
        proxies=kwargs.get("proxies"),
        user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
        subfolder=subfolder,
        **{key: kwargs.get(key) for key in HUB},
    )
    return LoraFile(*fetched)


def read_exact(source: Source, subfolder: str | None = None, network: str = "unet", **hub: Any) -> LoraFile | None:
    """PEFT's exact form: beside a LoRA of this package, or what PEFT's own `save_pretrained` made; None where there is none.

    Args:
        source: Folder or Hub id.
        subfolder: Of it.
        network: What the pipeline calls its network.
        hub: As for `hf_hub_download`.
    """
    root = Path(source, subfolder or "")
    if Path(source).is_file():
        return None
    alone = (root / PEFT_FILES[0]).is_file() and not (root / LORA_WEIGHT_NAME_SAFE).is_file()
    try:
        weights, config = (_file(source, name if alone else f"peft/{name}", subfolder, hub) for name in PEFT_FILES)
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError):
        return None
    if not (weights.is_file() and config.is_file()):
        return None
    fields = json.loads(config.read_text("utf-8"))
    left_out = ("peft_type", "inference_mode")
    return LoraFile(
        {f"{network}.{name}": value for name, value in load_file(weights).items()},
        {f"{network}.{name}": value for name, value in fields.items() if name not in left_out},
    )


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
    network = network_name(pipe)
    if network != "unet" and not read_exact(source, network=network, **hub):
        pipe.load_lora_weights(source, use_safetensors=True, **hub)
        return
    put_on(pipe, layers_of(pipe, read_lora(source, network, use_safetensors=True, **hub)), free_name(pipe))


def layers_of(pipe: DiffusionPipeline, file: LoraFile) -> dict[str, Layers]:
    """What a LoRA has for each network of a pipeline; see `lora_layers`."""
    return lora_layers(*file, {part: getattr(pipe, part, None) for part in (*PARTS, "transformer")})


def put_on(
    pipe: DiffusionPipeline,
    layers: dict[str, Layers],
    adapter_name: str,
    low_cpu_mem_usage: bool = True,
    hotswap: bool = False,
) -> None:
    """Puts a LoRA on the networks of a pipeline.

    Raises:
        ValueError: A layer of it is not where it should be, or is scaled otherwise.
    """
    options = {"adapter_name": adapter_name, "_pipeline": pipe, "low_cpu_mem_usage": low_cpu_mem_usage}
    for part, (tensors, config, scales) in layers.items():
        named = {f"{part}.{name}": value for name, value in tensors.items()}
        options["metadata"] = {f"{part}.{name}": value for name, value in config.items()}
        if part == "unet":
            pipe.load_lora_into_unet(named, None, pipe.unet, hotswap=hotswap, **options)
        elif part == "transformer":
            pipe.transformer.load_lora_adapter(named, prefix=part, use_safetensors=True, hotswap=hotswap, **options)
        else:
            for half, other in (
                ("A", "down"),
                ("B", "up"),
            ):  # of all names, the ones that are converted for every layer
                named = {k.replace(f".lora_{half}.", f".lora_linear_layer.{other}."): v for k, v in named.items()}
            encoder, scale = getattr(pipe, part), pipe.lora_scale
            pipe.load_lora_into_text_encoder(named, None, encoder, prefix=part, lora_scale=scale, **options)
        _check_put_on(getattr(pipe, part), scales, adapter_name, hotswap)


def _check_put_on(network: nn.Module, scales: dict[str, float | None], adapter_name: str, hotswap: bool) -> None:
    modules = dict(network.named_modules())
    for path, scale in scales.items():
        layer = modules[path]
        on = isinstance(layer, BaseTunerLayer) and adapter_name in layer.lora_A
        if not on or (scale is not None and not hotswap and not math.isclose(layer.scaling[adapter_name], scale)):
            raise UserError(
                f"The installed libraries did not load the LoRA's layer {path!r} as its file says; update peft."
            )


def free_name(pipe: DiffusionPipeline) -> str:
    """A name that no network has a LoRA of, nor had one of that was fused."""
    taken = {name for names in pipe.get_list_adapters().values() for name in names} | set(pipe.fused_loras)
    return next(name for name in (f"default_{i}" for i in itertools.count()) if name not in taken)


def folder_of(source: Source, subfolder: str | None) -> Source:
    """Where the record of a LoRA is: beside the weights."""
    path = Path(source)
    if not path.exists():
        return source
    return path.parent if path.is_file() else path / (subfolder or "")


def _is_local(path: Path) -> bool:
    """Whether it can be no Hub id."""
    return path.is_absolute() or len(path.parts) > 2 or path.parts[0] in ("..", "~") or path.suffix in (*SAFE, *OTHERS)
