"""Weights in another precision than their files': cast while they are read, never beside the whole file."""

import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor

from cm_diffusers.models.stored import TORCH_DTYPES, header, weight_files


def dtype_of(name: str, dtype: torch.dtype | dict[str, torch.dtype]) -> torch.dtype:
    """Of a network of a pipeline.

    Args:
        dtype: Of all, or by name of the network, with one for the "default".
    """
    return dtype.get(name, dtype["default"]) if isinstance(dtype, dict) else dtype


def read_cast(path: Path, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor of a safetensors file, which is mapped for it alone: pages that were read stay resident until then."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(name).to(dtype, copy=True)


def load_cast_unet(folder: Path, variant: str | None, dtype: torch.dtype) -> dict[str, UNet2DConditionModel]:
    """The network of a pipeline whose files hold another precision, by its name as a part.

    Weights that the files lack stay on "meta", and unknown ones are left out: `check_stored` tells.

    Args:
        folder: Of the pipeline; the network's files are in one piece or in shards.
        variant: Of the files, where there are such.

    Returns:
        Nothing where diffusers' own way casts nothing, or where there is another kind of network.

    Raises:
        ValueError: The shapes are not the config's.
    """
    files = reversed(weight_files(folder / "unet", variant))  # so that shards, which diffusers prefers, come last
    places = {name: (path, entry["dtype"]) for path in files for name, entry in header(path)[0].items()}
    alike = all(TORCH_DTYPES.get(stored) == dtype for _, stored in places.values())
    if alike or not _is_unet(folder / "unet"):
        return {}
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    for name in places.keys() & unet.state_dict().keys():
        set_module_tensor_to_device(unet, name, "cpu", read_cast(places[name][0], name, dtype), dtype)
    return {"unet": unet.eval()}


def _is_unet(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text("utf-8")).get("_class_name") == "UNet2DConditionModel"
