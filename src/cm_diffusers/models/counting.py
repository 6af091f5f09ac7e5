"""What a pass of a network takes, counted on "meta": operations, and what autograd keeps for the backward pass."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode


Ask = Callable[..., Tensor]  # (network) calls a network on inputs of its own making, on the default device
# What autocast computes in half precision and in float32, of what networks of diffusers call ("CUDA Ops that can autocast"
# in torch's documentation of torch.amp).
HALVED = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, F.scaled_dot_product_attention),
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.baddbmm, torch.einsum),
}
WHOLE = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, torch.pow, Tensor.pow, torch.rsqrt}


class Flops(NamedTuple):
    """Floating-point operations: of a pass, and of one with its backward pass."""

    forward: int
    training: int


class Kept(NamedTuple):
    """Bytes that one pass keeps for its backward pass.

    Attributes:
        activations: Results of layers; of blocks that are computed again their inputs, and all of the largest one.
        casts: Half-precision copies of weights that autocast makes.
    """

    activations: int
    casts: int


def count_flops(network: nn.Module, ask: Ask, trains: bool) -> Flops:
    """By torch's own counter: products of matrices, convolutions and attention, a multiplication and an addition each.

    Args:
        network: On "meta", without gradient checkpointing.
        trains: Whether to count the backward pass to what requires gradients, too.
    """
    counter, whole = FlopCounterMode(display=False), sdpa_kernel(SDPBackend.MATH)  # whose products are counted
    with torch.device("meta"), torch.set_grad_enabled(trains), whole, counter, _Autocast(torch.bfloat16):
        output = ask(network)
        forward = counter.get_total_flops()
        if trains:
            output.sum().backward()
    network.zero_grad(set_to_none=True)
    return Flops(forward, counter.get_total_flops())


def count_kept(
    network: nn.Module, ask: Ask, dtype: torch.dtype | None = None, others: Iterable[nn.Module] = ()
) -> Kept:
    """By the hooks through which autograd keeps tensors, each storage once; attention is a fused kernel's.

    Args:
        network: On "meta", with what trains requiring gradients; gradient checkpointing acts as it is set.
        dtype: Of autocast; None without.
        others: Networks that it calls and does not own.
    """
    tensors = [tensor for one in (network, *others) for tensor in (*one.parameters(), *one.buffers())]
    own = {_storage(tensor) for tensor in tensors}
    whole, autocast = _Keeper(own), _Autocast(dtype)
    blocks = _Blocks(own, whole)
    with blocks.instead_of_checkpoints(network), torch.device("meta"), torch.enable_grad(), whole.hooks():
        with _FusedAttention(), autocast:
            ask(network)
    held = whole.bytes()
    casts = sum(size for place, size in held.items() if place in autocast.copies)
    return Kept(sum(held.values()) - casts + blocks.largest, casts)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass
class _Keeper:
    """Notes what autograd keeps.

    Attributes:
        own: Storages of the network's own tensors, which are there anyway.
        kept: The rest; held, so that no storage takes the place of another.
    """

    own: set[int]
    kept: list[Tensor] = field(default_factory=list)

    def keep(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self.own:
            self.kept.append(tensor)
        return tensor

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.keep, lambda tensor: tensor)

    def bytes(self) -> dict[int, int]:
        """Of each storage."""
        return {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in self.kept}


class _Blocks:
    """Runs the blocks that would be computed again once, and notes what the largest would keep."""

    def __init__(self, own: set[int], outside: _Keeper) -> None:
        self.own, self.outside, self.largest = own, outside, 0

    @contextmanager
    def instead_of_checkpoints(self, network: nn.Module) -> Iterator[None]:
        blocks = [module for module in network.modules() if getattr(module, "gradient_checkpointing", False)]
        usual = [getattr(block, "_gradient_checkpointing_func", None) for block in blocks]
        for block in blocks:
            block._gradient_checkpointing_func = self.run
        try:
            yield
        finally:
            for block, function in zip(blocks, usual, strict=True):
                block._gradient_checkpointing_func = function

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.outside.keep(tensor)
        inside = _Keeper(self.own)
        with inside.hooks():
            output = function(*args, **kwargs)
        self.largest = max(self.largest, sum(inside.bytes().values()))
        return output


class _Autocast(TorchFunctionMode):
    """Autocast where torch has none, on "meta": the same operations cast what they are given.

    Args:
        dtype: None casts nothing.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype, self.copies = dtype, {}

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.dtype and (
            dtype := self.dtype if function in HALVED else torch.float32 if function in WHOLE else None
        ):
            args, kwargs = tree_map(lambda value: self.cast(value, dtype), (args, kwargs or {}))
        return function(*args, **kwargs or {})

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        made = value.to(dtype)
        if isinstance(value, nn.Parameter):
            self.copies[_storage(made)] = made
        return made


class _FusedAttention(TorchFunctionMode):
    """Scaled dot-product attention keeps what a fused kernel keeps, whatever the device has."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return _Attention.apply(given["query"], given["key"], given["value"])
        return function(*args, **kwargs or {})


class _Attention(Function):
    """Keeps queries, keys, values, the result and a number for each query (2205.14135, Algorithm 1)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)  # as kernels lay it out
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output
