"""Rewards followed back: their gradients against finite differences, and what is added to them."""

import pytest
import torch
from differentiable_rewards import Red
from diffusers import LCMScheduler
from latent_objectives import lcm_of
from tiny import tiny_pipeline, tiny_unet
from torch import Tensor

from cm_diffusers.data.prompt_batches import prompt_batches
from cm_diffusers.data.sampler import Position
from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.models import decoding
from cm_diffusers.models.adapters import WithoutAdapters, add_lora
from cm_diffusers.objectives.direct_reward import DirectRewardConfig, DirectRewardObjective
from cm_diffusers.objectives.lcm import LCMConfig, LCMObjective
from cm_diffusers.policy.policy import Policy
from cm_diffusers.rewards import CheckedReward
from cm_diffusers.tasks.reward_runs import ImageScore, Tuned
from cm_diffusers.types import Batch, Loss, Networks, Progress


SHAPE, STEPS, START = (4, 8, 8), 3, Progress(0, 1)


@pytest.fixture
def pipe():
    pipe = tiny_pipeline()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.vae.requires_grad_(False)
    return pipe


def test_large_images_are_decoded_one_at_a_time(pipe, monkeypatch):
    """Eight of 768 pixels at once need tens of gigabytes; the rewards and their gradient do not change."""
    latents, decoded = torch.randn(5, *SHAPE), []
    pipe.vae.decoder.register_forward_pre_hook(lambda _, args: decoded.append(len(args[0])))
    score = ImageScore(pipe, [], CheckedReward(Red(), "red"))
    found = []
    for chunk in (10_000, 2 * 64, 10):
        monkeypatch.setattr(decoding, "CHUNK", chunk)
        x = latents.clone().requires_grad_()
        images = score.images(x)
        found.append((images.detach(), *torch.autograd.grad(images.square().sum(), x)))
        with torch.no_grad():
            score.images(latents)
    assert decoded == [5, 5, *[2, 2, 1], *[1, 2, 2], *[2, 2, 1], *[1] * 15]
    torch.testing.assert_close(found[1:], [found[0]] * 2, rtol=1e-4, atol=1e-5)


def test_a_model_that_is_not_square_is_drawn_so(pipe):
    pipe.unet.register_to_config(sample_size=(8, 12))
    tuned = Tuned(pipe, None, Policy(pipe.scheduler, STEPS))
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    assert tuned.shape(None) == (4, 8, 12)
    assert tuned.shape(16 * factor) == (4, 16, 16)
    with pytest.raises(ValueError, match=f"--resolution 17 must be a multiple of {factor}"):
        tuned.shape(17)


def batch_of(size: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(7)
    x0, states = (torch.randn(size, *shape, generator=generator) for shape in (SHAPE, (7, 32)))
    states = {"encoder_hidden_states": states}
    return Batch(x0, states, {name: torch.zeros_like(value) for name, value in states.items()}, ["a bag"] * size)


def objective_of(pipe, through: str, distillation: LCMObjective | None = None, **config) -> DirectRewardObjective:
    policy = Policy(LCMScheduler.from_config(pipe.scheduler.config), STEPS)
    score = ImageScore(pipe, [], CheckedReward(Red(), "red")).of_texts
    return DirectRewardObjective(DirectRewardConfig(through, **config), policy, score, SHAPE, distillation)


def distillation_of(pipe) -> LCMObjective:
    return lcm_of(LCMConfig(), DiscreteVP.from_scheduler(pipe.scheduler), "epsilon", None)


def networks(pipe) -> Networks:
    student = add_lora(pipe.unet, 4, 4.0, 0.0, ["to_q", "to_v"])
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return Networks(student, teacher=WithoutAdapters(student))


def loss_of(objective: DirectRewardObjective, nets: Networks, batch: Batch) -> Loss:
    torch.manual_seed(3)
    return objective(nets, batch, START)


def gradient(objective: DirectRewardObjective, nets: Networks, batch: Batch) -> Tensor:
    trained = [parameter for parameter in nets.student.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss_of(objective, nets, batch).value, trained)
    return torch.cat([part.flatten() for part in found])


@pytest.mark.parametrize("kl_coef", [0.0, 2.0])
def test_gradient_of_a_trajectory_is_that_of_finite_differences(pipe, kl_coef):
    """Through all steps of the scheduler, the VAE and the reward; in float64 but for the law of a step and the decoding."""
    objective, nets, batch = objective_of(pipe, "trajectory", kl_coef=kl_coef), networks(pipe), batch_of()
    found = gradient(objective, nets, batch)
    trained = [parameter for parameter in nets.student.parameters() if parameter.requires_grad]
    way = found / found.norm()
    pieces = [p.view_as(q) for p, q in zip(way.split([q.numel() for q in trained]), trained, strict=True)]

    def moved(size: float) -> float:
        with torch.no_grad():
            for parameter, piece in zip(trained, pieces, strict=True):
                parameter += size * piece
            value = loss_of(objective, nets, batch).value.double().item()
            for parameter, piece in zip(trained, pieces, strict=True):
                parameter -= size * piece
        return value

    size = 0.02
    assert (moved(size) - moved(-size)) / (2 * size) == pytest.approx(found.norm().item(), rel=0.02)
    assert found.norm() > 1e-3


def test_the_last_step_alone_is_another_gradient(pipe):
    nets, batch = networks(pipe), batch_of()
    whole, last = (gradient(objective_of(pipe, through), nets, batch) for through in ("trajectory", "last_step"))
    assert (whole - last).norm() > 0.01 * whole.norm()
    values = [loss_of(objective_of(pipe, through), nets, batch).value for through in ("trajectory", "last_step")]
    assert values[0] == values[1]


@pytest.mark.parametrize(("through", "kl_coef"), [("last_step", 0.0), ("trajectory", 0.0), ("trajectory", 50.0)])
def test_recomputing_activations_changes_nothing(pipe, through, kl_coef):
    """Nor in the model before training, which is the student with its adapters off."""
    objective, nets, batch = objective_of(pipe, through, kl_coef=kl_coef), networks(pipe), batch_of()
    kept = gradient(objective, nets, batch)
    nets.student.enable_gradient_checkpointing()
    pipe.vae.enable_gradient_checkpointing()
    assert torch.allclose(gradient(objective, nets, batch), kept, atol=1e-6, rtol=1e-5)


def test_activations_are_recomputed(pipe):
    """Or the test above would compare a thing with itself."""
    objective, nets, batch, calls = objective_of(pipe, "trajectory"), networks(pipe), batch_of(), []
    nets.student.up_blocks[-1].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradient(objective, nets, batch)
    once = len(calls)
    nets.student.enable_gradient_checkpointing()
    gradient(objective, nets, batch)
    assert (once, len(calls) - once) == (STEPS, 2 * STEPS)


def test_divergence_of_a_trajectory(pipe):
    nets, batch = networks(pipe), batch_of()
    plain, held = (loss_of(objective_of(pipe, "trajectory", kl_coef=weight), nets, batch) for weight in (0.0, 2.0))
    assert held.logs["kl"] > 0 == plain.logs["kl"]
    assert held.value.item() == pytest.approx((plain.value + 2 * held.logs["kl"]).item(), rel=1e-5)
    policy, by_hand = objective_of(pipe, "trajectory").policy, 0.0
    torch.manual_seed(3)
    with torch.no_grad():
        for index, sample, taken, _ in policy.walk(nets.student, torch.randn(STEPS + 1, 2, *SHAPE), batch.cond):
            if taken.std > 0:  # |mean - mean'|^2 / (2 std^2), the mean over elements, summed over steps
                mean = policy.transition(nets.teacher, index, sample, batch.cond).mean
                by_hand += ((taken.mean - mean).square() / (2 * taken.std**2)).mean().item()
    assert held.logs["kl"].item() == pytest.approx(by_hand, rel=1e-4)
    still = Networks(nets.teacher, teacher=nets.teacher)
    assert loss_of(objective_of(pipe, "trajectory", kl_coef=2.0), still, batch).logs["kl"] == 0


def test_a_single_step_is_the_distillation_loss_minus_the_reward_of_its_jump(pipe):
    nets, batch, distillation = networks(pipe), batch_of(), distillation_of(pipe)
    nets.teacher = tiny_unet()
    objective = objective_of(pipe, "single_step", distillation, reward_weight=3.0)
    found = loss_of(objective, nets, batch)
    torch.manual_seed(3)
    alone = distillation(nets, batch, START)
    torch.manual_seed(3)
    jump, _, _ = distillation.pair(nets, batch)
    image = (pipe.vae.decode(jump / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    reward = (image[:, 0] - image[:, 2]).mean()
    assert found.logs["distillation"].item() == pytest.approx(alone.value.item(), rel=1e-6)
    assert found.value.item() == pytest.approx((alone.value - 3 * reward).item(), rel=1e-5)
    assert found.value.requires_grad


@pytest.mark.parametrize(
    ("through", "guidance", "kl_coef", "passes"),
    [
        ("last_step", 1.0, 0.0, 2 + 3),
        ("last_step", 2.0, 0.0, 2 * (2 + 3)),
        ("trajectory", 1.0, 0.0, 9),
        ("trajectory", 1.0, 1.0, 12),
    ],
)
def test_passes_are_counted(pipe, through, guidance, kl_coef, passes):
    objective = objective_of(pipe, through, kl_coef=kl_coef)
    objective.policy.guidance_scale = guidance
    assert objective.passes == passes


def test_settings_that_do_not_fit(pipe):
    with pytest.raises(ValueError, match="--through single_step belong together"):
        objective_of(pipe, "single_step")
    with pytest.raises(ValueError, match="--reward_weight must be positive"):
        objective_of(pipe, "single_step", distillation_of(pipe), reward_weight=0.0)


def test_prompts_are_drawn_equally_often_and_by_all_processes():
    prompts = [(f"prompt {i}", {"number": i}) for i in range(6)]
    sources = [prompt_batches(prompts, lambda n: ({"n": n}, {"n": -n}), 2, Position(0, rank, 2)) for rank in (0, 1)]
    batches = [source(0) for source in sources]
    seen = [next(source) for _ in range(3) for source in batches]
    assert sorted(text for batch in seen for text in batch.texts) == sorted(2 * [text for text, _ in prompts])
    assert all([m["number"] for m in batch.metadata] == batch.cond["n"].tolist() for batch in seen)
    again = next(sources[1](2))
    assert again.texts == seen[-1].texts
