"""Rewards that frozen networks compute."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from diffusers.models.model_loading_utils import load_state_dict
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from cm_diffusers.diffusion.feature_networks import in_float32
from cm_diffusers.rewards.base import Metadata


HEAD_LAYERS = (0, 2, 4, 6, 7)  # the others are dropout


class NetworkReward:
    """What a network makes of images and prompts, in float32 also under autocast; differentiable.

    Args:
        load: Makes the network, (images `(B, 3, H, W)`, B prompts) -> rewards `(B,)`; called when it is first needed. It
            follows the images from device to device.
    """

    differentiable = True

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        self.load = load

    @cached_property
    def network(self) -> nn.Module:
        """Frozen, in evaluation mode."""
        return self.load().float().requires_grad_(False).eval()

    def to(self, device: torch.device | str) -> "NetworkReward":
        self.network.to(device)
        return self

    def check(self, prompts: list[str]) -> None:
        """As `CheckedReward.check`."""
        if hasattr(self.network, "check"):
            self.network.check(prompts)

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata | None = None) -> Tensor:
        """Rewards `(B,)` of images `(B, 3, H, W)` in [0, 1]."""
        return in_float32(self.network, images, prompts)


def read_weights(source: str, file: str, revision: str | None) -> dict[str, Tensor]:
    """Tensors of `file` in the folder or Hub repository `source`, or of `source` itself where that is a file.

    Of files that are not safetensors only the tensors are read: torch's `weights_only`.
    """
    folder = Path(source)
    local = folder if folder.is_file() else folder / file
    path = str(local) if folder.exists() else hf_hub_download(source, file, revision=revision)
    found = load_state_dict(path)
    return found.get("state_dict", found)


def folded_head(tensors: dict[str, Tensor]) -> nn.Linear:
    """The head that the aesthetic predictor and ImageReward share, as one layer: nothing is between its five linear ones."""
    width = tensors["layers.0.weight"].shape[1]
    weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for i in HEAD_LAYERS:
        layer, offset = tensors[f"layers.{i}.weight"].double(), tensors[f"layers.{i}.bias"].double()
        weight, bias = layer @ weight, layer @ bias + offset
    head = nn.Linear(width, 1)
    head.load_state_dict({"weight": weight, "bias": bias})
    return head
