"""A device that is not there: tensors on it are computed on the CPU, and whatever would make the host wait for them is counted.

Of a GPU the host waits to read a value (`item`, `bool`, `tolist`, `cpu`), to count elements (`nonzero`), and to copy what is not
told `non_blocking`. Nothing else of it is pretended.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import chain

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from cm_diffusers.engine.trainer import Trainer


aten, DEVICE = torch.ops.aten, torch.device("meta")
COUNT = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
COPIES = {aten._to_copy.default, aten.copy_.default}


class There(Tensor):
    """A tensor on the device; what it holds is on the CPU."""

    held: Tensor
    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} is called outside of the pretended device")


def here(value):
    return value.held if isinstance(value, There) else value


class Pretended(TorchDispatchMode):
    """Runs every operation, and remembers those for which the host waits.

    Attributes:
        waits: Names of them, since the last `taken`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def taken(self) -> list[str]:
        waits, self.waits = self.waits, []
        return waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = [
            value for value in chain(*(tree_flatten(part)[0] for part in (args, kwargs))) if isinstance(value, Tensor)
        ]
        from_there = any(isinstance(value, There) for value in given)
        to_there = kwargs.get("device") == DEVICE
        if to_there or (from_there and kwargs.get("device") is not None):
            kwargs["device"] = torch.device("cpu")
        if not (from_there or to_there):
            return func(*args, **kwargs)
        leaves = func is aten._to_copy.default and from_there and "device" in kwargs and not to_there
        self._note(func, args, kwargs, given, leaves)
        if func is aten._fused_sdp_choice.default:
            return 0  # the composite kernel, of which each part comes by here
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        found = func(*tree_map(here, args), **tree_map(here, kwargs))
        if leaves:
            return found
        written = [
            argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments
        ]
        if written and written[0] and isinstance(found, Tensor):
            return args[0]
        if "out" in kwargs:
            return kwargs["out"]
        return tree_map(lambda value: There(value) if isinstance(value, Tensor) else value, found)

    def _note(self, func, args, kwargs, given, leaves) -> None:
        arrives = func in COPIES and any(not isinstance(value, There) for value in given)
        masked = func in (aten.index.Tensor, aten.index_put_.default) and any(
            index is not None and (index.dtype == torch.bool or not isinstance(index, There)) for index in args[1]
        )
        told = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
        if func in COUNT or leaves or masked or (arrives and not told):
            self.waits.append(str(func))
        elif func not in COPIES and any(not isinstance(value, There) and value.ndim for value in given):
            raise AssertionError(
                f"{func} takes tensors of two devices: {[(type(v).__name__, v.shape) for v in given]}"
            )


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    """Trainers made inside the block are on the device."""
    optimizers = import_module("torch.optim.optimizer")
    supported = optimizers._get_fused_kernels_supported_devices()
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: [*supported, "meta"])
    monkeypatch.setattr(torch, "meta", torch, raising=False)  # whose generator is that of the CPU
    for owner in (Accelerator, Trainer):
        monkeypatch.setattr(owner, "device", property(lambda _: DEVICE))
    with Pretended() as device:
        yield device
