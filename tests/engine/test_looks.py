"""Between two looks at a run the host waits for nothing: counted on a device that is not there."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, UNet2DModel
from latent_objectives import lcm_of, scott_of
from pretended import pretended
from rollout_worker import GOALS, PROMPTS, SMALL, Network, conditions
from tasks.test_animatelcm import batch as clip_batch
from tasks.test_animatelcm import randomised_parts
from tasks.test_animatelcm import stage as animatelcm_stage
from tiny import tiny_scheduler, tiny_unet
from torch import Tensor
from toys import WIDTH, forget_accelerate, toy_trainer

from cm_diffusers.data.rollouts import RolloutConfig, Rollouts, Task
from cm_diffusers.diffusion.process import DiscreteVP, moved_to
from cm_diffusers.diffusion.views import EDMView
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.models.critics import CriticConfig, make_critic
from cm_diffusers.models.students import StudentConfig, make_networks
from cm_diffusers.objectives.cd import CDConfig, CDObjective
from cm_diffusers.objectives.ect import ECTConfig, ECTObjective
from cm_diffusers.objectives.lcm import LCMConfig
from cm_diffusers.objectives.rlcm import RLCMConfig, RLCMObjective
from cm_diffusers.objectives.scott import SCottConfig
from cm_diffusers.policy.policy import Policy
from cm_diffusers.types import Batch, Networks


Source = Callable[[int], Iterator[Batch]]
STEPS, EVERY = 4, 2
VP = DiscreteVP.from_scheduler(tiny_scheduler())


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


def latents(start: int) -> Iterator[Batch]:
    for _ in count(start):
        states = torch.randn(2, 2, 5, 32)
        yield Batch(
            torch.randn(2, 4, 8, 8), {"encoder_hidden_states": states[0]}, {"encoder_hidden_states": states[1]}
        )


def pixels(start: int) -> Iterator[Batch]:
    return (Batch(torch.randn(2, 1, 8, 8)) for _ in count(start))


def lcm(folder: Path, lora: bool = False, **config) -> tuple[Trainer, Source]:
    student = StudentConfig(lora=lora, lora_rank=2, unet_time_cond_proj_dim=16)
    nets = make_networks(tiny_unet().requires_grad_(False), student)
    objective = lcm_of(LCMConfig(), VP, "epsilon", None if lora else 16)
    return toy_trainer(folder, nets, objective, export_ema_decay=0.9, **config), latents


def lcm_lora(folder: Path, **config) -> tuple[Trainer, Source]:
    return lcm(folder, lora=True, **config)


def scott(folder: Path, **config) -> tuple[Trainer, Source]:
    nets = make_networks(tiny_unet().requires_grad_(False), StudentConfig(unet_time_cond_proj_dim=16))
    nets.critic = make_critic(nets, CriticConfig(critic_channels=16))
    method = SCottConfig(adversarial_start=0, adversarial_ramp=0, r1_weight=1.0)
    return toy_trainer(folder, nets, scott_of(method, VP, "epsilon", 16, critic=True), **config), latents


def image_network() -> UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(8, 1, 1, block_out_channels=(8, 8), norm_num_groups=4, add_attention=False, **blocks)


def cd(folder: Path, **config) -> tuple[Trainer, Source]:
    nets = Networks(image_network(), image_network().requires_grad_(False), image_network().requires_grad_(False))
    optim = OptimConfig(optimizer="radam")
    return toy_trainer(folder, nets, CDObjective(CDConfig(), EDMView(0.5, "adm")), optim, **config), pixels


def ect(folder: Path, **config) -> tuple[Trainer, Source]:
    objective = ECTObjective(ECTConfig(), EDMView(0.5, "adm"))
    return toy_trainer(folder, Networks(image_network()), objective, **config), pixels


def animatelcm(folder: Path, **config) -> tuple[Trainer, Source]:
    made = animatelcm_stage(randomised_parts(), "joint", lora_rank=4, lora_alpha=4.0)
    return toy_trainer(folder, made.nets, made.objective, **config), lambda start: (clip_batch() for _ in count(start))


def rlcm(folder: Path, **config) -> tuple[Trainer, Source]:
    """Four steps of each roll-out."""

    def score(samples: Tensor, numbers: Tensor) -> Tensor:
        return -(samples - moved_to(GOALS, samples)[numbers]).square().sum(1)

    objective = RLCMObjective(RLCMConfig(), Policy(LCMScheduler(prediction_type="sample"), 3), score)
    nets = Networks(Network(), teacher=Network().requires_grad_(False))
    trainer = toy_trainer(folder, nets, objective, gradient_accumulation_steps=objective.num_transitions, **config)
    rollouts = RolloutConfig(**SMALL | {"inner_epochs": 2})
    return trainer, Rollouts(rollouts, trainer, Task((WIDTH,), PROMPTS, conditions, score))


def waits_of(device, trainer: Trainer, batches: Source) -> list[list[str]]:
    found: list[list[str]] = []
    trainer.steering.append(lambda *_: found.append(device.taken()))
    trainer.callbacks.append(lambda *_: device.taken())
    device.taken()
    trainer.fit(batches)
    return found


@pytest.mark.parametrize("method", [lcm, lcm_lora, scott, cd, ect, animatelcm])
def test_between_looks_the_host_waits_for_nothing(tmp_path, monkeypatch, method) -> None:
    with pretended(monkeypatch) as device:
        trainer, batches = method(tmp_path, max_train_steps=STEPS, logging_steps=EVERY)
        found = waits_of(device, trainer, batches)
    looks = [step % EVERY == 0 for step in range(1, STEPS + 1)]
    assert found == [["aten._to_copy.default"] * look for look in looks]


def test_between_roll_outs_the_host_waits_for_nothing(tmp_path, monkeypatch) -> None:
    """What was drawn in a roll-out is compared on the host, so its step waits."""
    with pretended(monkeypatch) as device:
        trainer, batches = rlcm(tmp_path, max_train_steps=8, logging_steps=8)
        found = waits_of(device, trainer, batches)
    assert [len(waits) for waits in found[1:4] + found[5:]] == [0, 0, 0, 0, 0, 1]
    assert found[0]
    assert found[4]
