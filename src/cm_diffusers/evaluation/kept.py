"""What a long measurement has found, kept in files that are named after what it was found of: by content, not by path."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cm_diffusers.evaluation.report import replace_file
from cm_diffusers.models.adapters import adapter_layers


logger = logging.getLogger(__name__)
FORMAT = 1  # of what is kept: another number makes all anew
DIGEST = "digest"
Found = dict[str, Tensor]


class Kept:
    """A folder of tensors by name, a file for each thing they were found of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, what: Mapping[str, Any], make: Callable[[], Found]) -> Found:
        """What was found of `what` before, or is found now, and then kept; a damaged file is made anew.

        Args:
            what: All that it depends on, in JSON's types.
        """
        path = self.path(what)
        if path.is_file() and (found := _read(path)) is not None:
            return found
        found = {name: tensor.cpu().contiguous() for name, tensor in make().items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda aside: save_file(found, aside, {DIGEST: tensors_digest(found)}))
        return found

    def path(self, what: Mapping[str, Any]) -> Path:
        return self.folder / f"{json_digest({'format': FORMAT, **what})}.safetensors"


def _read(path: Path) -> Found | None:
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}
            whole = (file.metadata() or {}).get(DIGEST) == tensors_digest(found)
    except (SafetensorError, OSError):
        whole = False
    if not whole:
        logger.warning("%s is damaged: what it held is measured again.", path.name)
    return found if whole else None


def json_digest(value: object) -> str:
    """SHA-256 of a value in JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def network_digest(network: nn.Module) -> str:
    """SHA-256 of weights and buffers, and of the scales of the LoRAs on it."""
    scales = [sorted(layer.scaling.items()) for layer in adapter_layers(network)]
    return json_digest([tensors_digest(network.state_dict()), scales, _settings(network)])


def pipeline_digest(pipe: DiffusionPipeline) -> str:
    """SHA-256 of all that decides on its images: weights, settings and vocabularies, wherever they were loaded from."""
    parts = {"": type(pipe).__name__}
    for name, part in pipe.components.items():
        words = part.get_vocab() if hasattr(part, "get_vocab") else None
        found = network_digest(part) if isinstance(part, nn.Module) else _settings(part)
        parts[name] = [type(part).__name__, found, words]
    own = {name: str(value) for name, value in pipe.config.items() if name[0] != "_" and name not in pipe.components}
    return json_digest([parts, own])


def _settings(part: object) -> dict[str, str]:
    """The config of a part of a pipeline, without where it lay and by which version it was written."""
    config = getattr(part, "config", None) or {}
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {name: str(value) for name, value in config.items() if name[0] != "_" and name != "transformers_version"}
