"""Contexts in which derivatives of networks are taken: in full precision, and so that torch's forward-mode AD passes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from cm_diffusers.errors import UserError


SCORES = 2**23  # scores of attention that are computed at once: some temporaries of 32 MiB


@contextmanager
def full_precision(network: nn.Module) -> Iterator[None]:
    """Within it the network runs without autocast, not even with what accelerate has put around its `forward`."""
    wrapped = [module for module in network.modules() if "_original_forward" in vars(module)]
    forwards = [module.forward for module in wrapped]
    with ExitStack() as off:
        kinds = {"cpu", *(value.device.type for value in network.parameters())}
        for kind in filter(torch.amp.is_autocast_available, kinds):
            off.enter_context(torch.autocast(kind, enabled=False))
        for module, forward in zip(wrapped, forwards, strict=True):
            off.callback(setattr, module, "forward", forward)
            module.forward = module._original_forward
        yield


@contextmanager
def passable(network: nn.Module) -> Iterator[None]:
    """Within it forward-mode AD passes through the network of diffusers, in full precision, uncompiled.

    Attention runs by its mathematical kernel, in blocks of queries where it is large; GroupNorm sees contiguous inputs;
    nothing is checkpointed. Modules are as before at the end.
    """
    checkpointed = [module for module in network.modules() if getattr(module, "gradient_checkpointing", False)]
    try:
        for module in checkpointed:
            module.gradient_checkpointing = False
        with full_precision(network), torch.compiler.set_stance("force_eager"), _Passable():
            yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scores: int = SCORES,
    **options: Any,
) -> Tensor:
    """`scaled_dot_product_attention` by its mathematical kernel, for blocks of queries one after another.

    Each block sees all keys, so a derivative is exact; without a graph, memory grows as the keys and not as queries times
    keys.

    Args:
        query, key, value: `(..., N, D)`, `(..., M, D)`, `(..., M, E)`.
        attn_mask: To be broadcast to `(..., N, M)`.
        scores: Most elements of the scores of a block.
        options: `scale` and `enable_gqa`.

    Raises:
        ValueError: It drops weights out, for which the kernels draw different masks.
    """
    if dropout_p:
        raise UserError(
            f"Attention drops out {dropout_p} of its weights, not alike in all kernels: set this to 0, or give --tangent "
            "central."
        )
    n, m = query.shape[-2], key.shape[-2]
    rows = max(1, scores * n // (query[..., :1].numel() * m))
    if is_causal and rows < n:
        attn_mask, is_causal = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(), False
    if attn_mask is None or attn_mask.ndim < 2 or attn_mask.shape[-2] == 1:
        masks = [attn_mask] * -(-n // rows)
    else:
        masks = attn_mask.split(rows, -2)
    with sdpa_kernel(SDPBackend.MATH):
        blocks = [
            F.scaled_dot_product_attention(part, key, value, mask, is_causal=is_causal, **options)
            for part, mask in zip(query.split(rows, -2), masks, strict=True)
        ]
    return torch.cat(blocks, -2) if len(blocks) > 1 else blocks[0]


def group_norm(input: Tensor, *args: Any, **options: Any) -> Tensor:
    """`group_norm` of any layout, which the output has, too: dropout draws in the order of memory."""
    output = F.group_norm(input.contiguous(), *args, **options)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.ndim)
    return output.contiguous(memory_format=last) if last and input.is_contiguous(memory_format=last) else output


def linear_in_input(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Convolution, say, in two passes where torch takes three: one is for a derivative of the weights, which is zero."""

    def call(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **options: Any) -> Tensor:
        primal, tangent = forward_ad.unpack_dual(input)
        others = [other for other in (weight, bias) if other is not None]
        if tangent is None or any(forward_ad.unpack_dual(other).tangent is not None for other in others):
            return function(input, weight, bias, *args, **options)
        output = function(primal, weight, bias, *args, **options)
        return forward_ad.make_dual(output, function(tangent, weight, None, *args, **options))

    return call


class _Passable(TorchFunctionMode):
    """Calls of functions through which forward-mode AD does not pass, or slowly, go to those above."""

    linear = (F.linear, F.conv1d, F.conv2d, F.conv3d)
    replaced = {
        F.scaled_dot_product_attention: attention,
        F.group_norm: group_norm,
        **{function: linear_in_input(function) for function in linear},
    }

    def __torch_function__(
        self, function: Callable, types: tuple[type, ...], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.replaced.get(function, function)(*args, **(kwargs or {}))
