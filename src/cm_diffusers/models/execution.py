"""How networks run: compiled, and in which order their weights lie in memory."""

import torch
from diffusers import ModelMixin
from torch import nn

from cm_diffusers.errors import UserError


def compile_network(network: nn.Module) -> None:
    """Each repeated block of a network of diffusers that names them, once for all that are alike; else the whole network.

    A view of another network, with no weights of its own, runs what is compiled there.
    """
    models = [module for module in network.modules() if isinstance(module, ModelMixin)]
    if repeating := [model for model in models if _repeats(model)]:
        for model in repeating:
            model.compile_repeated_blocks()
    elif next(network.parameters(), None) is not None:
        network.compile()


def _repeats(model: ModelMixin) -> bool:
    names = getattr(model, "_repeated_blocks", None) or []
    return any(type(module).__name__ in names for module in model.modules())


def to_channels_last(networks: list[nn.Module]) -> None:
    """The weights of convolutions with the channels as innermost dimension, which their fastest kernels take.

    Raises:
        ValueError: No network has a convolution but of patches.
    """
    found = [module for network in networks for module in network.modules() if isinstance(module, nn.Conv2d)]
    if not any(max(module.kernel_size) > max(module.stride) for module in found):
        names = ", ".join(dict.fromkeys(type(network).__name__ for network in networks))
        raise UserError(f"--channels_last is for networks of convolutions, which {names} is not: leave it out.")
    for network in networks:
        network.to(memory_format=torch.channels_last)
