"""Networks in parts, one part on each process: FSDP2, or HSDP, where accelerate's launcher or config file asks for it."""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils import swap_tensors
from transformers import PreTrainedModel

from cm_diffusers.engine.launcher import PATIENCE, is_sharded, processes
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.errors import UserError
from cm_diffusers.models.execution import compile_network
from cm_diffusers.types import Networks


logger = logging.getLogger(__name__)

BLOCKS = {"BasicTransformerBlock", "ResnetBlock2D"}  # of which diffusers' UNets list no more than some
WHOLE = ("adamw_8bit", "adamp")  # optimizers that look at a weight as a whole
NETWORKS = (ModelMixin, PreTrainedModel)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Sharding:
    """How networks are parted.

    Attributes:
        mesh: Of the processes: parts, or copies by parts.
        dtype: In which networks of diffusers and transformers are gathered; None for that of their weights. Gradients are
            summed in float32, and what a network is told is not rounded.
        units: Classes of the blocks that are gathered one after the other; those that each network knows if empty.
        offloads: Whether parts lie in the CPU's memory between passes.
    """

    mesh: DeviceMesh
    dtype: torch.dtype | None
    units: frozenset[str]
    offloads: bool

    def check(self, nets: Networks, optims: Iterable[OptimConfig], channels_last: bool) -> None:
        """
        Raises:
            ValueError: A network or an optimizer that cannot be parted, or blocks that no network has.
        """
        if whole := [optim.optimizer for optim in optims if optim.optimizer in WHOLE]:
            raise UserError(
                f"--optimizer {whole[0]} looks at whole weights, but they are sharded: take adamw or radam."
            )
        if channels_last:
            raise UserError("--channels_last is for whole weights, but they are sharded: leave it out.")
        modules = [module for _, network in nets.items() for module in network.modules()]
        if self.units and not any(type(module).__name__ in self.units for module in modules):
            raise UserError(
                f"fsdp_transformer_layer_cls_to_wrap names {', '.join(sorted(self.units))}, but no network of this run has such "
                "blocks: name others, or leave it out."
            )
        for name, network in nets.items():
            if any(not p.is_floating_point() or type(p) is not nn.Parameter for p in network.parameters()):
                raise UserError(f"The {name} is quantized, which cannot be sharded: leave out --quantize_teacher.")

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """What is gathered by itself, from the inside out: blocks, and the networks in a wrapper."""
        inner, names = _networks_in(network), self.units or unit_classes(network)
        found = [module for module in network.modules() if type(module).__name__ in names or module in inner]
        return [module for module in reversed(found) if module is not network]

    def shard(self, network: nn.Module, device: torch.device) -> None:
        """Part a network in place: its weights are those of the first process; on others it may be on "meta"."""
        if next(network.parameters(), None) is None:  # the student without its adapters, say
            return
        for unit in (*self.blocks(network), network):
            _agree(unit, device)
            inside = unit is not network or isinstance(network, NETWORKS)
            policy = MixedPrecisionPolicy(
                param_dtype=self.dtype if inside else None, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
            offload = CPUOffloadPolicy() if self.offloads else OffloadPolicy()
            kind = type(unit)
            # else the outermost unit stays gathered after a pass, and averages of its weights do nothing
            fully_shard(unit, mesh=self.mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=True)
            # what looks a network up, or saves it, does so by the name of its class
            type(unit).__name__, type(unit).__qualname__, type(unit).__module__ = (
                kind.__name__, kind.__qualname__, kind.__module__,
            )  # fmt: skip
        network.forward = lambda: None
        network()  # settles the dtypes while all that trains is known to train: a first pass may find it frozen
        del network.forward


def unit_classes(network: nn.Module) -> set[str]:
    """Names of the classes whose modules are gathered one at a time, where a launcher's config names none."""
    inner = _networks_in(network)
    known = [names for one in inner for names in (one._no_split_modules, getattr(one, "_repeated_blocks", None))]
    return BLOCKS.union(*(names or () for names in known))


def _networks_in(module: nn.Module) -> list[nn.Module]:
    """Of diffusers and transformers, itself among them; no VAE, whose methods other than `forward` would gather nothing."""
    return [one for one in module.modules() if isinstance(one, NETWORKS) and not hasattr(one, "encode")]


def sharding_of(accelerator: Accelerator, in_float32: bool) -> Sharding | None:
    """What accelerate's launcher asks for; None for whole networks. `take_launched` has refused what there is not.

    Args:
        in_float32: Whether passes of this run leave autocast.
    """
    if not is_sharded() or not dist.is_initialized():
        return None
    if torch.__version__ < (2, 13):
        raise UserError(f"Sharded training is tested from torch 2.13 on, but this is {torch.__version__}: update it.")
    copies, ranks = int(os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1")), accelerator.num_processes
    if ranks % copies:
        raise UserError(f"dp_replicate_size {copies} does not divide {ranks} processes: give one that does.")
    names, shape = ("dp_replicate", "dp_shard"), (copies, ranks // copies)
    mesh = init_device_mesh(accelerator.device.type, shape[copies == 1 :], mesh_dim_names=names[copies == 1 :])
    for group in mesh.get_all_groups():  # new ones do not take over that of the group of all
        _set_pg_timeout(PATIENCE, group)
    asked = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    units = frozenset(name.strip() for name in asked.split(",") if name.strip())
    dtype = None if in_float32 else DTYPES.get(accelerator.mixed_precision)
    if accelerator.is_main_process:
        logger.info("Networks and checkpoints are in %d parts, on %d processes", shape[1], ranks)
    return Sharding(mesh, dtype, units, os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true")


def comes_from_the_first() -> bool:
    """Whether this process need not load networks that will be sharded, for its parts come from the first one."""
    return is_sharded() and processes().process_index > 0


def _agree(unit: nn.Module, device: torch.device) -> None:
    """Move what is not sharded yet, and take the first process's values: FSDP2 itself would mix those of all.

    What is on "meta" takes memory here alone, and loses it again with all but a part as soon as the unit is sharded.
    """
    for tensor in (*unit.parameters(), *unit.buffers()):
        if isinstance(tensor, DTensor):
            continue
        if tensor.is_meta:
            held = torch.empty_like(tensor, device=device)
            swap_tensors(
                tensor, nn.Parameter(held, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else held
            )
        else:
            tensor.data = tensor.data.to(device)
        tensor.data = tensor.data.contiguous()
        dist.broadcast(tensor.data, 0)


def place(nets: Networks, sharding: Sharding | None, device: torch.device, compiles: bool) -> None:
    """Networks on the device, whole or in parts.

    Args:
        compiles: Whether by torch.compile, as `compile_network`; of a sharded one each block.
    """
    for _, network in nets.items():
        if sharding is None:
            network.to(device)
            if compiles:
                compile_network(network)
            continue
        for block in sharding.blocks(network) if compiles else ():
            if not isinstance(block, NETWORKS):
                block.compile()
        sharding.shard(network, device)
