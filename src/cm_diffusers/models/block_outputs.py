"""What the blocks of a network answer on its way, without the rest of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class _EnoughSeen(Exception):
    """Ends a pass whose rest nobody needs."""


@torch.compiler.disable
def block_outputs(
    network: nn.Module, blocks: list[nn.Module], run: Callable[[], object]
) -> list[Tensor | tuple[Tensor, ...]]:
    """The output of each of a network's blocks, in the order in which they run. The pass stops after the last of them.

    Args:
        run: Calls the network.
    """
    found: list[Tensor | tuple[Tensor, ...]] = []

    def look(block: nn.Module, _: object, output: Tensor | tuple[Tensor, ...]) -> None:
        found.append(output)
        if block is blocks[-1]:
            raise _EnoughSeen

    hooks = [block.register_forward_hook(look) for block in blocks]
    try:  # a compiled network would not see the hooks
        with torch.compiler.set_stance("force_eager"), _activations_kept(network):
            run()
    except _EnoughSeen:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def _activations_kept(network: nn.Module) -> Iterator[None]:
    """No gradient checkpointing inside the block: recomputed later, the student's adapters would be on again."""
    modules = [module for module in network.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True
