"""A stand-in for an Apple GPU: the device "meta" with values, but without float64, and apart from the CPU's tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from cm_diffusers.diffusion.process import home_of_float64


APPLE = torch.device("meta")
CROSSING = {"aten::_to_copy", "aten::copy_", "aten::index"}  # between devices, or with indices from the CPU


class AppleTensor(Tensor):
    """Says that it is on the GPU; its values are in `inner`, on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "AppleTensor":
        if inner.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=APPLE
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with AppleMode():
            return function(*args, **(kwargs or {}))

    def __repr__(self) -> str:
        return f"AppleTensor({self.inner})"


class AppleMode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function._schema.name
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        mine = [x for x in given if isinstance(x, AppleTensor)]
        wanted = kwargs.get("device")
        here = bool(mine) if wanted is None else torch.device(wanted).type == "meta"
        if mine and name not in CROSSING:
            strangers = [x for x in given if not isinstance(x, AppleTensor) and x.ndim]
            if strangers:
                raise RuntimeError(
                    f"{name}: expected all tensors to be on the same device, but found the GPU and the CPU"
                )
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        bare_args, bare_kwargs = tree_map_only(AppleTensor, lambda x: x.inner, (args, kwargs))
        result = function(*bare_args, **bare_kwargs)
        if not here:
            return result
        if name.endswith("_") and mine:  # in place
            return args[0] if function._schema.returns else None
        return tree_map_only(Tensor, AppleTensor, result)


@contextmanager
def apple_gpu(monkeypatch) -> Iterator[torch.device]:
    """Inside the block there is such a device; random numbers on it are the CPU's."""
    module = SimpleNamespace(get_rng_state=torch.get_rng_state, set_rng_state=torch.set_rng_state)
    monkeypatch.setattr(torch, "meta", module, raising=False)
    home_of_float64.cache_clear()
    with AppleMode():
        yield APPLE
    home_of_float64.cache_clear()
