"""Weights in another precision than their files': cast while they are read, never beside the whole file."""

import json
from collections.abc import Collection
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import Tensor, nn

from cm_diffusers.models.families.base import FAMILIES
from cm_diffusers.models.stored import TORCH_DTYPES, header, weight_files


Dtypes = torch.dtype | dict[str, torch.dtype | None]
# What a part of a pipeline is stored in at half precision: several transformers overflow in float16.
HALVES = {"unet": torch.float16, "transformer": torch.bfloat16, "vae": torch.float16}
NETWORK_NAMES = ("unet", "transformer", "transformer_2")  # of a pipeline's networks
TEXT_TOWERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def part_dtypes(network: torch.dtype | None, text: torch.dtype = torch.float32) -> dict[str, torch.dtype | None]:
    """Of a pipeline's network, see `dtype_of`, and of its text towers; float32 of the rest."""
    return dict.fromkeys(NETWORK_NAMES, network) | dict.fromkeys(TEXT_TOWERS, text) | {"default": torch.float32}


def dtype_of(name: str, dtype: Dtypes) -> torch.dtype | None:
    """Of a network of a pipeline.

    Args:
        dtype: Of all, or by name of the network, with one for the "default"; None is for what stays on "meta".
    """
    return dtype.get(name, dtype["default"]) if isinstance(dtype, dict) else dtype


def cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network in another precision, in place: but for what is quantized, and what its class keeps in float32."""
    if getattr(network, "is_quantized", False):
        return network
    whole = kept_whole(type(network))
    if not whole:
        return network.to(dtype)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_floating_point() and whole.isdisjoint(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return network


def kept_whole(network_class: type[nn.Module]) -> set[str]:
    """Names of modules and weights that diffusers keeps in float32 when it casts, such as the embedding of times."""
    return set(getattr(network_class, "_keep_in_fp32_modules", None) or ())


def read_cast(path: Path, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor of a safetensors file, which is mapped for it alone: pages that were read stay resident until then."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(name).to(dtype, copy=True)


def load_cast_networks(
    folder: Path, variant: str | None, dtype: Dtypes, given: Collection[str] = ()
) -> dict[str, nn.Module]:
    """The networks of a pipeline whose files hold another precision, by their names as parts.

    Weights that the files lack stay on "meta", and unknown ones are left out: `check_stored` tells. A network of no dtype
    is on "meta" as a whole.

    Args:
        folder: Of the pipeline; a network's files are in one piece or in shards.
        variant: Of the files, where there are such.
        dtype: See `dtype_of`.
        given: Names of those that are there already.

    Returns:
        Nothing of those which diffusers' own way casts not, or that are of no known family.

    Raises:
        ValueError: The shapes are not the config's.
    """
    found = {place.parent.name: _kind(place) for place in folder.glob("*/config.json")}
    known = {name: kind for name, kind in found.items() if kind in FAMILIES and name not in given}
    loaded = {name: _load_cast(folder / name, kind, variant, dtype_of(name, dtype)) for name, kind in known.items()}
    return {name: network for name, network in loaded.items() if network is not None}


def _load_cast(folder: Path, kind: str, variant: str | None, dtype: torch.dtype | None) -> nn.Module | None:
    files = reversed(weight_files(folder, variant))  # so that shards, which diffusers prefers, come last
    places = {name: (path, entry["dtype"]) for path in files for name, entry in header(path)[0].items()}
    if all(TORCH_DTYPES.get(stored) == dtype for _, stored in places.values()):
        return None
    network_class = getattr(diffusers, kind)
    whole = kept_whole(network_class)
    with init_empty_weights():
        network = network_class.from_config(network_class.load_config(folder))
    for name in places.keys() & network.state_dict().keys() if dtype else ():
        to = dtype if whole.isdisjoint(name.split(".")) else torch.float32
        set_module_tensor_to_device(network, name, "cpu", read_cast(places[name][0], name, to), to)
    return network.eval()


def _kind(config: Path) -> str | None:
    return json.loads(config.read_text("utf-8")).get("_class_name")
