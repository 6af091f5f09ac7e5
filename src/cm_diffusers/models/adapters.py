"""Adapters (LoRA) on a network, and the network without them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import family_of


def add_lora(
    network: nn.Module, rank: int, alpha: float, dropout: float, target_modules: list[str] | None = None
) -> nn.Module:
    """Add float32 adapters to a frozen network, in place. Adapter B is zero, so the output does not change.

    Args:
        target_modules: Ends of layers' names; those of its family if not given.
    """
    network.requires_grad_(False)
    names = target_names(network, target_modules)
    silent = [path for path in family_of(network).silent(network) if path.endswith(tuple(names))]
    layers = {"target_modules": names, "exclude_modules": silent or None}
    network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, **layers))
    cast_training_params(network, torch.float32)
    return network.train()


def target_names(network: nn.Module, names: list[str] | None) -> list[str]:
    """The names, each of which ends that of some layer; of those of the family the ones that do: small networks lack some.

    Raises:
        ValueError: One ends no layer's name, or that of a module that is none.
    """
    modules = dict(network.named_modules())
    layers = {path for path, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)}
    family, own = list(family_of(network).lora_targets), names is None
    names = family if own else names
    fits = {name: {path for path in modules if f".{path}".endswith(f".{name}")} for name in names}
    if own or set(names) == set(family):  # a record names them all
        return [name for name in names if fits[name]]
    if misfits := [name for name in names if not name or not fits[name] or not fits[name] <= layers]:
        ends = sorted({path.rpartition(".")[2] for path in layers if not path[-1].isdigit()})
        raise UserError(
            f"--lora_target_modules names no layer of the {type(network).__name__} with {', '.join(misfits)}; its linear "
            f"layers and convolutions end on {', '.join(ends)}."
        )
    if not names:
        raise UserError("--lora_target_modules names no layer; leave it out for those of the teacher's family.")
    return names


@contextmanager
def adapters_off(layers: list[BaseTunerLayer]) -> Iterator[None]:
    """The adapted layers compute without their adapters inside the block."""
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters(False) would also flip requires_grad
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapter_layers(module: nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


@contextmanager
def recomputed_with(blocks: list[nn.Module], context: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Those of the blocks that checkpoint gradients run in this context in the recomputation, too."""
    recompute = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), context()))
    blocks = [block for block in blocks if block.gradient_checkpointing]
    usual = [block._gradient_checkpointing_func for block in blocks]
    for block in blocks:
        block._gradient_checkpointing_func = recompute
    try:
        yield
    finally:
        for block, function in zip(blocks, usual, strict=True):
            block._gradient_checkpointing_func = function


class WithoutAdapters(nn.Module):
    """The teacher inside a LoRA student: the same weights, adapters and dropout off. Holds no memory of its own."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self._student = [student]  # a list, so that this is not a second registration of the same parameters
        self._layers = adapter_layers(student)  # found once: a large network has thousands of modules
        self._in_training = [module for module in student.modules() if isinstance(module, _DropoutNd | _NormBase)]
        self._blocks = [module for module in student.modules() if hasattr(module, "gradient_checkpointing")]

    @property
    def config(self) -> FrozenDict:
        """A family's call may ask the network what it is told."""
        return self._student[0].config

    def forward(self, *args: object, **kwargs: object) -> object:
        with self._bare(), recomputed_with(self._blocks, self._bare):
            return self._student[0](*args, **kwargs)

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """Adapters are off, and layers that act otherwise in training do as in evaluation."""
        training = [layer for layer in self._in_training if layer.training]
        for layer in training:
            layer.training = False
        try:
            with adapters_off(self._layers):
                yield
        finally:
            for layer in training:
                layer.training = True
