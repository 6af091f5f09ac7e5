"""What processes do with networks in parts, and with whole ones to compare them with: see `distributed_worker.py`."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from unittest import mock

import pytest
import rollout_worker
import tiny
import torch
import video_worker
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from scripts import data_flags, run_script
from tasks.test_watching import watched
from tiny import tiny_pipeline, tiny_unet
from torch import Tensor, nn
from toys import ToyConfig, ToyObjective, source, toy_networks, toy_trainer

from cm_diffusers.diffusion.tangent import derivative
from cm_diffusers.engine import checkpoints
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.parts import local, whole
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.models.adapters import WithoutAdapters, add_lora
from cm_diffusers.models.critics import LoRADecoderCritic, TeacherFeatureCritic
from cm_diffusers.tasks.callbacks import ValidationConfig, sample_grid
from cm_diffusers.types import Batch, Loss, Networks


SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
HYBRID = SHARDED | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}
LARGE = {"FSDP_TRANSFORMER_CLS_TO_WRAP": "CrossAttnDownBlock2D, CrossAttnUpBlock2D"}
OPTIM = {
    "student": OptimConfig(learning_rate=1e-3, adam_epsilon=1e-3),
    "critic": OptimConfig(learning_rate=3e-2, adam_epsilon=1e-3),
}
OF_MOTION = {"FSDP_TRANSFORMER_CLS_TO_WRAP": "CrossAttnDownBlockMotion, CrossAttnUpBlockMotion"}
SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4}
TIMES = torch.tensor([437.0, 0.002])  # of which bfloat16 would make 436 and 0.001999


@contextmanager
def launched(settings: dict[str, str]) -> Iterator[None]:
    with mock.patch.dict(os.environ, settings):
        yield


@contextmanager
def as_on_gpus() -> Iterator[None]:
    """Accelerate takes the way it takes with FSDP on GPUs, where on CPUs it does not know of it."""

    def forced(*arguments, **options):
        made = original(*arguments, **options)
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()
        return made

    from cm_diffusers.engine import trainer

    original = trainer.make_accelerator
    with mock.patch.object(trainer, "make_accelerator", forced):
        yield


def unet(seed: int, **config) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return tiny_unet(**SMALL | {"cross_attention_dim": 8} | config)


def noise(rank: int) -> Iterator[Batch]:
    for k in count():
        generator = torch.Generator().manual_seed(100 * k + rank)
        yield Batch(torch.randn(2, 4, 8, 8, generator=generator), {"text": torch.randn(2, 3, 8, generator=generator)})


class Distilling:
    """Towards what teacher and target say, and what a critic likes; it sees what the student is told as time."""

    config = ToyConfig()

    def __init__(self, judged: bool) -> None:
        self.players = {"student": self.student} | ({"critic": self.critic} if judged else {})

    def student(self, nets: Networks, batch: Batch, progress) -> Loss:
        cond = {"encoder_hidden_states": batch.cond["text"]}
        with torch.no_grad():
            goal = 0.5 * nets.teacher(batch.x0, TIMES, **cond).sample
            if nets.target is not None:
                goal = goal + nets.target(batch.x0, TIMES / 2, **cond).sample
        found = nets.student(batch.x0, TIMES, **cond).sample
        value = (found - goal).square().mean()
        if nets.critic is not None:
            value = value - 0.1 * nets.critic(found, TIMES, cond).mean()
        return Loss(value, {})

    def critic(self, nets: Networks, batch: Batch, progress) -> Loss:
        cond = {"encoder_hidden_states": batch.cond["text"]}
        with torch.no_grad():
            made = nets.student(batch.x0, TIMES, **cond).sample
        real, fake = nets.critic(batch.x0, TIMES, cond), nets.critic(made, TIMES, cond)
        return Loss((1 - real).relu().mean() + (1 + fake).relu().mean(), {"fake/loss": fake.mean()})


class DoubleCritic(TeacherFeatureCritic):
    """Which else rounds to float32."""

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        with mock.patch.object(Tensor, "float", Tensor.double):
            return super().forward(x, t, cond)


def networks(kind: str, seed: int) -> Networks:
    teacher = unet(1).requires_grad_(False)
    if kind == "lora":
        student = add_lora(unet(1), 2, 2.0, 0.0)
        for name, p in student.named_parameters():
            if "lora_A" in name:
                torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(seed))
        return Networks(student, teacher=WithoutAdapters(student))
    nets = Networks(unet(seed), target=unet(seed).requires_grad_(False), teacher=teacher)
    if kind == "full":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nets.critic = DoubleCritic(teacher, teacher, 8)
    if kind == "bf16":
        nets.critic = LoRADecoderCritic(teacher, 2)
    return nets


def sizes(trainer: Trainer) -> dict[str, Tensor]:
    """Bytes that this process holds."""
    states = [p for player in trainer.players for s in player.optimizer.state.values() for p in s.values()]
    held = {name: list(module.parameters()) for name, module in trainer.nets.items() if name != "critic"}
    held["optimizer"] = [value for value in states if value.dim()]
    return {f"bytes/{name}": torch.tensor(sum(local(v).nbytes for v in values)) for name, values in held.items()}


def distilled(folder: Path, rank: int, kind: str, seed: int = 0, **config) -> dict[str, Tensor]:
    """20 steps, and what is exported. A whole network of which another process has the weights is on "meta" here.

    With a critic in float64: in float32 the rounding of sums grows from step to step of their game.
    """
    nets, losses, data = networks(kind, seed), [], noise(rank)
    if kind == "full":
        data = map(doubled, data)
        for _, module in nets.items():
            module.double()
    if seed and kind == "full":
        for _, module in nets.items():
            module.to("meta")
    settings = {"max_train_steps": 20, "checkpointing_steps": 20, "export_ema_decay": 0.5, "ema_sigma_rels": [0.1]}
    watch = [lambda _, loss: losses.append(torch.stack([loss.value, loss.logs.get("fake/loss", loss.value)]))]
    judged = nets.critic is not None
    trainer = toy_trainer(folder, nets, Distilling(judged), OPTIM, watch, **settings | {"snapshot_steps": 10} | config)
    begun = {
        f"begun/{name}/{key}": whole(value).clone()
        for name, module in trainer.nets.items()
        for key, value in [*module.named_parameters(), *module.named_buffers()]
    }
    trainer.fit(lambda start: data)
    found = {"losses": torch.stack(losses)} | sizes(trainer) | begun
    with trainer.exported() as network:
        assert (network is None) == (rank > 0)
        if rank == 0 and kind == "lora":
            network.save_lora_adapter(folder / "exported")
        elif rank == 0:
            network.save_pretrained(folder / "exported")
    return found


def rounded(folder: Path, rank: int) -> dict[str, Tensor]:
    """In bfloat16, with a critic whose first pass finds it frozen."""
    nets, seen = networks("bf16", 0), {}
    settings = {"mixed_precision": "bf16", "max_train_steps": 1}
    trainer = toy_trainer(folder, nets, Distilling(True), OPTIM, **settings)
    student, critic = (player.raw for player in trainer.players)
    student.register_forward_pre_hook(lambda _, given: seen.update(told=given[1]))
    student.conv_in.register_forward_pre_hook(lambda layer, _: seen.update(weight=layer.weight.detach().clone()))
    before = whole(critic.unet.conv_out.weight).clone()
    trainer.fit(lambda start: noise(rank))
    found = dict(seen)
    with trainer.export_weights() as network, torch.no_grad():  # as pipelines call it, in float32
        batch = next(noise(0))
        found["sample"] = network(batch.x0, TIMES, batch.cond["text"]).sample.float()
    moved = whole(critic.unet.conv_out.weight) - before
    return found | {"critic": moved, "master": whole(student.conv_in.weight)}


class Poisoned(ToyObjective):
    """A loss that is no number on the second process, at the third step."""

    def __call__(self, nets, batch, progress) -> Loss:
        loss = super().__call__(nets, batch, progress)
        bad = progress.step == 2 and PartialState().process_index == 1
        return Loss(loss.value * torch.nan, loss.logs) if bad else loss


def diverged(folder: Path, rank: int, ranks: int) -> dict[str, Tensor]:
    seen = []
    keep = [lambda t, _: seen.append(whole(t.student[0].weight).clone())]
    trainer = toy_trainer(folder, objective=Poisoned(), callbacks=keep, logging_steps=1)
    with pytest.raises(FloatingPointError, match="the student's loss is nan"):
        trainer.fit(source(4, rank, ranks))
    return {"before": seen[-1], "after": whole(trainer.student[0].weight)}


def without_room(folder: Path, rank: int, ranks: int) -> dict[str, Tensor]:
    """The disk of the second process is full when it writes its part of the second checkpoint."""
    original = checkpoints.save_file

    def full(*arguments) -> None:
        if rank == 1 and (folder / "checkpoint-2").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(*arguments)

    trainer = toy_trainer(folder, checkpointing_steps=2)
    with (
        mock.patch.object(checkpoints, "save_file", full),
        pytest.raises(ValueError, match="No space left on device"),
    ):
        trainer.fit(source(4, rank, ranks))
    return {"step": torch.tensor(trainer.step)}


@dataclass
class Sized(ToyConfig):
    train_batch_size: int = 12


def moved(folder: Path, rank: int, ranks: int, resume: Path | None, steps: int) -> dict[str, Tensor]:
    """A run of 12 samples a step, gone on from a checkpoint of other processes; what it holds after it was loaded."""
    size = 12 // ranks
    settings = {"max_train_steps": steps, "export_ema_decay": 0.9, "checkpointing_steps": 1}
    asked = None if resume is None else str(resume)
    trainer = toy_trainer(
        folder,
        toy_networks(rank),
        ToyObjective(Sized(train_batch_size=size)),
        resume_from_checkpoint=asked,
        **settings,
    )
    found = held(trainer)
    trainer.fit(source(size, rank, ranks))
    trainer.folder.end()  # and not `end`, which would take the group of processes away
    return found


def held(trainer: Trainer) -> dict[str, Tensor]:
    """All that a checkpoint holds of a trainer, whole, by its names there."""
    files = trainer.averages.state() | {"target": trainer.nets.target.state_dict()}
    for player in trainer.players:
        files |= player.state()[0]
    return {f"{stem}/{name}": whole(value).clone() for stem, named in files.items() for name, value in named.items()}


def tangents(folder: Path, rank: int) -> dict[str, Tensor]:
    nets = Networks(unet(0), teacher=unet(1).requires_grad_(False))
    trainer = toy_trainer(folder, nets, Distilling(False))
    network, batch = trainer.nets.teacher, next(noise(0))

    def function(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t, batch.cond["text"]).sample

    directions = torch.ones_like(batch.x0), torch.full((2,), 0.5)
    output, slope = derivative("jvp", network, function, batch.x0, TIMES, *directions, torch.ones(2))
    return {"output": output, "slope": slope}


def drawn(folder: Path) -> None:
    """A grid of a student and of its teacher, by the stock pipeline."""
    pipe = tiny_pipeline()
    nets = Networks(tiny_pipeline().unet, teacher=pipe.unet.requires_grad_(False))
    config = ValidationConfig(validation_prompts=["a coat"], validation_nfe=[2], validation_teacher_steps=2)
    grids = sample_grid(config, lambda network: tiny_pipeline(unet=network), pipe, 2.0)
    trainer = toy_trainer(folder, nets, Distilling(False))
    folder.mkdir(parents=True, exist_ok=True)
    grids.show(trainer)


def rewarded(folder: Path) -> dict[str, Tensor]:
    """20 updates on 5 roll-outs, held back towards the model before training."""
    losses, config = [], {"max_train_steps": 20, "checkpointing_steps": 20}
    watch = [lambda _, loss: losses.append(loss.value)]
    trainer, data = rollout_worker.run(folder, {"inner_epochs": 2}, {"kl_coef": 0.1}, callbacks=watch, **config)
    found = {name: whole(value) for name, value in trainer.student.state_dict().items()}
    return found | {"rewards": data.rollout.rewards, "losses": torch.stack(losses)}


def motion(folder: Path, rank: int) -> dict[str, Tensor]:
    """20 steps of AnimateLCM's motion modules, with its teacher and averaged target; in float64, for in float32 rounding grows."""
    with mock.patch.object(tiny, "tiny_unet", partial(tiny_unet, **SMALL)):
        made, losses = video_worker.stage("motion", folder.parent / f"lora-{rank}"), []
    for _, network in made.nets.items():
        network.double()
    config, watch = {"max_train_steps": 20, "checkpointing_steps": 20}, [lambda _, loss: losses.append(loss.value)]
    optim = OptimConfig(learning_rate=3e-4, adam_epsilon=1e-3)
    with launched(OF_MOTION):
        trainer = toy_trainer(folder, made.nets, made.objective, optim, watch, **config)
    before = [whole(p).clone() for p in trainer.players[0].trainable]
    trainer.fit(lambda start: map(doubled, video_worker.clips("motion", rank)(start)))
    moved = [(whole(p) - was).abs().max() for p, was in zip(trainer.players[0].trainable, before, strict=True)]
    return {"losses": torch.stack(losses), "moved": torch.stack(moved)} | sizes(trainer)


def doubled(batch: Batch) -> Batch:
    cond, uncond = ({name: value.double() for name, value in one.items()} for one in (batch.cond, batch.uncond))
    return Batch(batch.x0.double(), cond, uncond)


def best(folder: Path, rank: int, ranks: int) -> dict[str, Tensor]:
    """Of three looks the second is best; its weights, by the main process."""
    trainer, watch, _ = watched(folder, [9.0, 5.0, 3.0, 4.0], max_train_steps=6)
    trainer.fit(source(4, rank, ranks))
    with watch.best_weights(trainer) as student:
        assert (student is None) == (rank > 0)
        return {name: value.clone() for name, value in student.state_dict().items()} if rank == 0 else {}


def script(folder: Path, models: Path) -> None:
    """A student by the command line, with grids; notes how many bytes of networks this process has before they are parted."""
    from cm_diffusers.engine import trainer

    place, rank = trainer.place, os.environ["RANK"]

    def noting(nets: Networks, *how) -> None:
        held = {name: sum(p.nbytes for p in net.parameters() if not p.is_meta) for name, net in nets.items()}
        folder.with_name(f"held-{rank}.json").write_text(json.dumps(held))
        place(nets, *how)

    trainer.place = noting  # of this fork
    steps = {"max_train_steps": 2, "checkpointing_steps": 1, "lr_warmup_steps": 0, "validation_prompts": ["a coat"]}
    flags = data_flags(models / "data", models / "cache") | steps | {"validation_nfe": [1]}
    run_script("distill_lcm", pretrained_teacher_model=models / "teacher", output_dir=folder, **flags)
