"""Tensors and networks of which a process may hold a part."""

import copy

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def local(value: Tensor) -> Tensor:
    """What this process holds of it, in the same memory."""
    return value.detach().to_local() if isinstance(value, DTensor) else value


def whole(value: Tensor) -> Tensor:
    """All of it; asked for by all processes."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors, on the CPU where they were sharded; asked for by all processes.

    Args:
        keep: Whether this process wants them; {} for one that does not.
    """
    found = ((name, whole(value).cpu() if isinstance(value, DTensor) else value) for name, value in tensors.items())
    return {name: value.detach() for name, value in found if keep}


def shards(network: nn.Module) -> list[Tensor]:
    """What this process holds of each parameter, in order; none stays gathered, as a pass that was broken off leaves it."""
    for unit in network.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
    return [local(p) for p in network.parameters()]


def skeleton(network: nn.Module) -> nn.Module:
    """A copy without weights, to fill with gathered ones; a sharded network itself can be neither copied nor saved."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, memo)


def filled(empty: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A whole network of a skeleton, which stays as it is, in evaluation mode."""
    network = copy.deepcopy(empty)
    network.load_state_dict(weights, assign=True)
    return network.eval()
