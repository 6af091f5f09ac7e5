"""What a training takes on several GPUs, by how it is spread over them: memory of each part, and images a second.

The formulas are explained in docs/guides/plan.md. Bytes are those of this package's trainer: what trains is in float32, with
its gradients, its optimizer's moments and each average.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import ModelMixin
from torch import nn
from transformers.hf_argparser import HfArg

from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.sharding import unit_classes
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.models.adapters import WithoutAdapters, adapter_layers, adapters_off
from cm_diffusers.models.counting import Ask, Flops, Kept, count_flops, count_kept
from cm_diffusers.models.quantization import BITS
from cm_diffusers.models.recomputation import recompute_activations
from cm_diffusers.models.students import DTYPES, StudentConfig
from cm_diffusers.ranges import check_ranges
from cm_diffusers.tasks.memory import MOMENTS
from cm_diffusers.tasks.passes import Pass
from cm_diffusers.tasks.plan_networks import Training
from cm_diffusers.tasks.plan_starts import Given
from cm_diffusers.types import Networks


TERA, GIGA = 1e12, 1e9


@dataclass
class PlanConfig:
    """The machines."""

    is_run: ClassVar[bool] = False

    gpus: int = HfArg(default=8, help="GPUs in all.")
    gpu_memory: float = HfArg(default=80.0, help="GiB of each.")
    peak_tflops: float = HfArg(
        default=989.0, help="Of each, as its maker says: 989 of an H100 SXM, 312 of an A100, in bf16."
    )
    share_of_peak: float = HfArg(
        default=0.4, help="Of it that training reaches: an assumption, benchmarks/gpu_smoke.py measures."
    )
    gpus_per_node: int = HfArg(default=8, help="GPUs of a machine, over which HSDP shards.")
    node_bandwidth: float = HfArg(default=300.0, help="GB/s of a GPU to others of its machine.")
    network_bandwidth: float = HfArg(default=50.0, help="GB/s of a GPU to other machines.")
    script: str | None = HfArg(
        default=None, help="Training script of the recipe, such as distill_lcm; by its name if not given."
    )
    shape: str | None = HfArg(
        default=None,
        help="JSON of a teacher's sizes, by its path or its name in the folder recipes; as it is found if not given.",
    )

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Strategy:
    """How a training is spread.

    Attributes:
        shards: Parts in which each network is kept; 1 is DDP.
        replicas: How often all parts are there.
    """

    name: str
    shards: int
    replicas: int


def strategies(config: PlanConfig) -> list[Strategy]:
    """The plainest first; HSDP, which shards over a machine, where there are several."""
    gpus, node = config.gpus, config.gpus_per_node
    found = [Strategy("DDP" if gpus > 1 else "one GPU", 1, gpus)]
    if gpus > node and gpus % node == 0:
        found.append(Strategy("HSDP", node, gpus // node))
    return found + ([Strategy("FSDP2", gpus, 1)] if gpus > 1 else [])


@dataclass(frozen=True)
class Counted:
    """A step of one process with one micro-batch.

    Attributes:
        parts: Bytes of what is kept between steps, by part, of a process alone.
        trained: Parameters.
        unit: Parameters of the largest unit of sharding.
        width: Bytes of each of these where it is gathered.
        activations, casts: Bytes, see `Kept`; of the micro-batch.
        flops: Operations for an image.
        gathers: Bytes that a process gathers for a micro-batch if all is sharded.
        batch_size: Of a micro-batch.
        micro_batches: Of a step.
    """

    parts: Mapping[str, float]
    trained: int
    unit: int
    width: int
    activations: float
    casts: float
    flops: float
    gathers: float
    batch_size: int
    micro_batches: int

    def memory(self, how: Strategy) -> dict[str, float]:
        """Bytes of a GPU: DDP has buckets of the gradients; shards gather two units, and one's gradient is reduced in a buffer."""
        found = {name: size / how.shards for name, size in self.parts.items()}
        if how.shards > 1:
            found["gathered units"] = (2.0 * self.width + 8) * self.unit
        elif how.replicas > 1:
            found["buckets"] = 4.0 * self.trained
        return (
            found | {"activations": self.activations} | ({"casts of weights": self.casts} if how.shards == 1 else {})
        )

    def seconds(self, how: Strategy, config: PlanConfig) -> tuple[float, float]:
        """Of a step: its computation, and its traffic, which may hide behind that."""
        reached = config.peak_tflops * TERA * config.share_of_peak
        gradients, shared, others = 4.0 * self.trained, how.shards, how.replicas
        across = 2 * gradients / shared * (others - 1) / others
        inside = (self.gathers + gradients) * self.micro_batches * (shared - 1) / shared
        fast = config.node_bandwidth * GIGA
        slow = config.network_bandwidth * GIGA if config.gpus > config.gpus_per_node else fast
        within = fast if shared <= config.gpus_per_node else slow
        return self.batch_size * self.micro_batches * self.flops / reached, across / slow + inside / within

    def images_per_second(self, how: Strategy, config: PlanConfig) -> float:
        return config.gpus * self.batch_size * self.micro_batches / max(self.seconds(how, config))


def count(training: Training, given: Given) -> Counted:
    """By passes of the networks on "meta"; the student has gradient checkpointing afterwards, where that is asked for."""
    nets, train = training.nets, given[TrainConfig]
    costs, again = flops_of(training), 0.0
    if train.gradient_checkpointing:
        recompute_activations(nets.student)
        again = costs["student"].forward * learning(training, "student")
    kept = kept_of(training, DTYPES[train.mixed_precision] if train.mixed_precision != "no" else None)
    student, optim = given.get(StudentConfig), next(one for one in given.values() if isinstance(one, OptimConfig))
    width = 4 if train.mixed_precision == "no" else 2  # bytes of a parameter that is gathered
    return Counted(
        parts=parts_of(nets, optim, train, student.quantize_teacher if student else "no"),
        trained=sum(p.numel() for p in _trained(nets)),
        unit=largest_unit(nets.student),
        width=width,
        activations=training.batch_size * kept.activations,
        casts=kept.casts,
        flops=again + sum(one.samples * _cost(costs[one.network], one.gradient) for one in training.passes),
        gathers=sum(width * _size(nets, one.network) * _calls(one) for one in training.passes),
        batch_size=training.batch_size,
        micro_batches=train.gradient_accumulation_steps,
    )


def flops_of(training: Training) -> dict[str, Flops]:
    """Of a sample, by the networks' names; target and teacher are as large as the student."""
    nets = training.nets
    student = count_flops(nets.student, training.ask, trains=True)
    found = {"student": student, "target": student, "teacher": student}
    if isinstance(nets.teacher, WithoutAdapters):
        with adapters_off(adapter_layers(nets.student)):
            found["teacher"] = count_flops(nets.student, training.ask, trains=False)
    return found | ({"critic": count_flops(nets.critic, _asking_critic(training), trains=True)} if nets.critic else {})


def kept_of(training: Training, dtype: torch.dtype | None) -> Kept:
    """By all passes of a sample that learn, or through which a gradient goes, as one after the other keep theirs."""
    nets, found = training.nets, []
    for name, ask in {"student": training.ask, "critic": _asking_critic(training)}.items():
        if (network := getattr(nets, name)) is not None:
            one = count_kept(network, ask, dtype, [module for _, module in nets.items()])
            times = learning(training, "student", "target") if name == "student" else 1
            found.append(Kept(round(times * one.activations), math.ceil(times) * one.casts))
    return Kept(*map(sum, zip(*found, strict=True)))


def learning(training: Training, *names: str) -> float:
    """Passes of a sample through these networks that keep activations."""
    return sum(one.samples for one in training.passes if one.network in names and one.gradient != "none")


def parts_of(nets: Networks, optim: OptimConfig, train: TrainConfig, quantization: str = "no") -> dict[str, float]:
    """Bytes between the steps of a process alone, by part."""
    student = sum(p.numel() for p in nets.student.parameters() if p.requires_grad)
    trained = sum(p.numel() for p in _trained(nets))
    averages = (train.export_ema_decay > 0) + len(train.ema_sigma_rels)
    found = {
        "student": float(sum(p.nbytes for p in nets.student.parameters() if p.requires_grad)),
        "frozen layers": frozen_bytes(nets.student, quantization),
        **{name: float(_bytes(getattr(nets, name))) for name in ("target", "teacher", "critic")},
        "averages": 4.0 * averages * student,
        "gradients": 4.0 * trained,
        "optimizer": float(MOMENTS[optim.optimizer] * trained),
    }
    return {name: size for name, size in found.items() if size}


def frozen_bytes(network: nn.Module, quantization: str) -> float:
    """Of what does not train in a network, whose linear layers may be kept in fewer bits."""
    linear = {id(module.weight) for module in network.modules() if isinstance(module, nn.Linear)}
    frozen = [p for p in network.parameters() if not p.requires_grad]
    bits = [BITS.get(quantization, 8 * p.itemsize) if id(p) in linear else 8 * p.itemsize for p in frozen]
    return sum(p.numel() * size / 8 for p, size in zip(frozen, bits, strict=True))


def largest_unit(network: nn.Module) -> int:
    """Parameters; each belongs to the innermost unit around it, or to the network as the last."""
    names, sizes = unit_classes(network), {"": 0}
    paths = {path for path, module in network.named_modules() if type(module).__name__ in names}
    for name, parameter in network.named_parameters():
        ends = [at for at, letter in enumerate(name) if letter == "."]
        path = next((name[:end] for end in reversed(ends) if name[:end] in paths), "")
        sizes[path] = sizes.get(path, 0) + parameter.numel()
    return max(sizes.values())


def _asking_critic(training: Training) -> Ask:
    """A fake score is called as the student; others are told what the teacher is."""
    nets = training.nets
    if isinstance(nets.critic, ModelMixin):
        return training.ask
    judged = nets.student if isinstance(nets.teacher, WithoutAdapters) else nets.teacher
    return lambda critic: training.ask(critic, judged)


def _cost(flops: Flops, gradient: str) -> float:
    """Of a pass; a gradient of what the network is given costs as much again."""
    return {"none": flops.forward, "weights": flops.training, "input": 2 * flops.forward}[gradient]


def _calls(one: Pass) -> int:
    """How often a pass gathers the network: two branches of guidance are one call, a backward pass is another."""
    calls = math.ceil(one.samples / 2 if one.network in ("teacher", "critic") else one.samples)
    return calls * (1 if one.gradient == "none" else 2)


def _trained(nets: Networks) -> list[nn.Parameter]:
    networks = [network for network in (nets.student, nets.critic) if network is not None]
    return [p for network in networks for p in network.parameters() if p.requires_grad]


def _size(nets: Networks, name: str) -> int:
    """Parameters of a network; a LoRA is its own teacher and target."""
    parameters = [*getattr(nets, name).parameters()] if getattr(nets, name) is not None else []
    return sum(p.numel() for p in parameters or nets.student.parameters())


def _bytes(network: nn.Module | None) -> int:
    return 0 if network is None else sum(p.nbytes for p in network.parameters())
