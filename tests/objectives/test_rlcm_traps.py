"""What published code of policy gradients got wrong, and checks that would have told: ratios, order, seeds, controls."""

import copy
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from rollout_worker import GOALS, PROMPTS, STEPS, Network, conditions, run
from tiny import tiny_pipeline, tiny_unet
from torch import nn
from toys import assert_same, forget_accelerate, toy_trainer

from cm_diffusers.data.rollouts import RolloutConfig, Rollouts, Task
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.models.adapters import WithoutAdapters, add_lora
from cm_diffusers.objectives.rlcm import RLCMConfig, RLCMObjective
from cm_diffusers.policy.policy import Moves, Policy
from cm_diffusers.policy.transitions import log_prob
from cm_diffusers.types import Networks, Progress


START, LATENT = Progress(0, 1), (4, 8, 8)


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


def moves(policy: Policy, network: nn.Module, cond: dict, shape: tuple[int, ...], **values) -> list[Moves]:
    """All transitions of a few samples, with the probabilities they were drawn with."""
    count = len(next(iter(cond.values())))
    noise, found = torch.randn(policy.num_steps + 1, count, *shape), []
    given = {name: torch.randn(count) for name in ("advantage", "reward")} | {"scale": torch.rand(count) + 0.5}
    given |= {"prompt": torch.arange(count) % PROMPTS} | values
    with torch.no_grad():
        for index, sample, taken, action in policy.walk(network, noise, cond, cond):
            then = {"log_prob": log_prob(taken, action, "mean") if taken.std > 0 else None}
            found.append(Moves(None, cond, cond, index=index, sample=sample, action=action, **then | given))
    return found


def part(step: Moves, rows: torch.Tensor) -> Moves:
    own = {f.name: getattr(step, f.name) for f in fields(step)}
    cut = {name: value[rows] for name, value in own.items() if isinstance(value, torch.Tensor)}
    return replace(step, cond={n: v[rows] for n, v in step.cond.items()}, uncond={}, **cut)


def learnt(objective: RLCMObjective, nets: Networks, steps: list[Moves]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss of micro-batches, and its gradient."""
    nets.student.zero_grad()
    values = [objective(nets, step, START).value / len(steps) for step in steps]
    sum(values).backward()
    trained = [p for p in nets.student.parameters() if p.requires_grad]
    return sum(values).detach(), torch.cat([p.grad.flatten() for p in trained])


def toy_policy(final_std: float = 0.0) -> Policy:
    return Policy(LCMScheduler(prediction_type="sample"), STEPS, final_std=final_std)


def worth(latents, numbers):
    """With a gradient, and of no sample but its own."""
    return -(latents - GOALS[numbers]).square().sum(1)


# Ratios


def test_the_ratio_is_one_before_anything_is_learnt():
    """To the last bit for the batch that was drawn; for parts of it, as far as float32 goes: a hundredth of RLCM's range."""
    policy, network = Policy(LCMScheduler(), 4, guidance_scale=2.0), tiny_unet()
    objective, nets = RLCMObjective(RLCMConfig(), policy), Networks(network)
    cond = {"encoder_hidden_states": torch.randn(8, 3, 32)}
    for step in moves(policy, network, cond, LATENT)[: objective.num_transitions]:
        network.train()
        assert objective(nets, step, START).logs["log_ratio"] == 0
        for rows in torch.randperm(8).split(2):
            small = replace(part(step, rows), uncond={name: value[rows] for name, value in cond.items()})
            assert objective(nets, small, START).logs["log_ratio"] < 1e-6


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_only_learning_moves_the_ratio(tmp_path, precision):
    """Probabilities stay those of the drawing for all steps of a roll-out, and rounding is not taken for learning."""
    seen = []
    run(
        tmp_path, {"inner_epochs": 2}, {"loss": "reinforce"}, mixed_precision=precision,
        callbacks=[lambda trainer, loss: seen.append(loss.logs["log_ratio"].item())], max_train_steps=8,
    )  # fmt: skip
    first, later = seen[::4], [value for i, value in enumerate(seen) if i % 4]  # 8 samples in twos of 4, twice
    assert max(first) < 1e-6
    assert min(later) > 1e-5


def test_one_step_for_a_roll_out_needs_no_old_probabilities(tmp_path):
    _, source = run(tmp_path, {"train_batch_size": 8}, max_train_steps=1)
    assert source.is_on_policy
    assert source.rollout.log_probs.isnan().all()
    assert next(source(0)).log_prob is None


# Order


def test_neither_the_order_of_samples_nor_that_of_steps_matters(tmp_path):
    """Micro-batches of a roll-out in any order, samples in any order, against all samples at once from its states."""
    _, source = run(tmp_path, {"inner_epochs": 2, "train_batch_size": 2}, max_train_steps=2)
    source.number = -1  # draw again
    stream, rollout = source(0), None
    given = [next(stream) for _ in range(4 * 2)]
    rollout, objective, nets = source.rollout, source.trainer.objective, source.trainer.nets
    shuffled = [part(given[i], torch.randperm(2)) for i in torch.randperm(len(given))]
    one, other = (learnt(objective, nets, steps) for steps in (given, shuffled))
    cond = conditions(rollout.prompts)[0]
    whole = [
        replace(
            given[0], cond=cond, index=i, sample=rollout.states[:, i], action=rollout.states[:, i + 1],
            advantage=rollout.advantages, scale=rollout.scales, reward=rollout.rewards, prompt=rollout.prompts,
            log_prob=rollout.log_probs[:, i],
        )
        for i in range(2)
    ]  # fmt: skip
    for found in (other, learnt(objective, nets, whole)):
        for actual, expected in zip(found, one, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)
    assert one[1].abs().max() > 1e-4
    mixed = [replace(step, index=1 - step.index) for step in given]
    assert (learnt(objective, nets, mixed)[1] - one[1]).abs().max() > 0.1 * one[1].abs().max()


@pytest.mark.parametrize(
    "config",
    [
        {"loss": "ppo", "clip_range": 0.05},
        {"loss": "reinforce"},
        {"loss": "ppo", "kl_coef": 0.3, "logprob_reduction": "sum"},
        {"final_step": "pathwise"},
        {"final_step": "stochastic", "kl_coef": 0.3},
    ],
)
def test_the_loss_of_two_is_the_mean_of_two_of_one(config):
    """At every step; after learning, so that ratios and divergences differ between samples."""
    policy = toy_policy(0.1 if config.get("final_step") == "stochastic" else 0.0)
    objective, before = RLCMObjective(RLCMConfig(**config), policy, worth), Network()
    nets = Networks(Network(1), teacher=before.requires_grad_(False))
    numbers = torch.tensor([0, 2])
    steps = moves(policy, before, conditions(numbers)[0], (4,), prompt=numbers)
    for step in steps[: objective.num_transitions]:
        together = learnt(objective, nets, [step])
        alone = learnt(objective, nets, [part(step, torch.tensor([i])) for i in range(2)])
        for actual, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
        assert together[1].abs().max() > 1e-5


# Seeds


def test_a_run_is_a_function_of_its_seed(tmp_path):
    """Whatever the global random state was."""
    found = []
    for name, global_seed, seed in (("one", 1, 0), ("same", 2, 0), ("other", 1, 5)):
        torch.manual_seed(global_seed)
        trainer, source = run(tmp_path / name, {"inner_epochs": 2}, seed=seed)
        found.append(trainer.student.state_dict() | source.rollout._asdict())
    assert_same(found[1], found[0])
    assert not any(torch.equal(found[2][name], found[0][name]) for name in ("rewards", "states", "layers.0.weight"))


def test_drawing_leaves_the_global_random_states_alone(tmp_path):
    _, source = run(tmp_path, {"inner_epochs": 2}, max_train_steps=1)
    source.number, before = -1, (torch.get_rng_state(), np.random.get_state()[1].copy())
    states = source.rollout.states
    next(source(0))
    assert torch.equal(source.rollout.states[:, 0], states[:, 0])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


# Samplers


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_ddim_walks_as_the_stock_pipeline(guidance_scale, monkeypatch):
    """With eta, and with both branches of guidance; its scheduler keeps the checkpoint's settings."""
    pipe, noise = tiny_pipeline(prediction_type="v_prediction"), torch.randn(5, 1, *LATENT)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, timestep_spacing="trailing")
    texts = [pipe.encode_prompt(text, "cpu", 1, False)[0] for text in ("a bag", "")]
    cond, uncond = ({"encoder_hidden_states": text} for text in texts)
    policy = Policy(copy.deepcopy(pipe.scheduler), 4, guidance_scale, eta=0.7)
    with torch.no_grad():
        states = [end for *_, end in policy.walk(pipe.unet, noise, cond, uncond)]
    seen, left = [], iter(noise[1:])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddim.randn_tensor", lambda *_, **__: next(left))
    pipe(
        "a bag", num_inference_steps=4, guidance_scale=guidance_scale, eta=0.7, latents=noise[0], output_type="latent",
        callback_on_step_end=lambda pipe, step, t, tensors: seen.append(tensors["latents"]) or tensors,
    )  # fmt: skip
    for own, stock in zip(states, seen, strict=True):
        torch.testing.assert_close(own, stock, atol=1e-5, rtol=1e-5)


def test_a_policy_keeps_the_settings_of_its_scheduler():
    settings = {"original_inference_steps": 20, "timestep_scaling": 3.0, "beta_schedule": "scaled_linear"}
    policy, stock, network = Policy(LCMScheduler(**settings), 4), LCMScheduler(**settings), tiny_unet()
    cond = {"encoder_hidden_states": torch.randn(1, 3, 32)}
    x = torch.randn(1, *LATENT, generator=(generator := torch.Generator().manual_seed(0)))
    noise = torch.stack([x, *(torch.randn(1, *LATENT, generator=generator) for _ in range(4))])
    stock.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    torch.randn(1, *LATENT, generator=generator)
    with torch.no_grad():
        for index, _, taken, action in policy.walk(network, noise, cond):
            assert torch.equal(policy.scheduler.timesteps, stock.timesteps)
            output = network(x, stock.timesteps[index], **cond, return_dict=False)[0]
            x, denoised = stock.step(output, stock.timesteps[index], x, generator=generator, return_dict=False)
            torch.testing.assert_close(action, x, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(taken.denoised, denoised, atol=1e-5, rtol=1e-5)


def test_sampling_with_the_same_scheduler_does_not_move_the_policy():
    """A grid of samples while training asks the pipeline for other numbers of steps."""
    scheduler, network = LCMScheduler(prediction_type="sample"), Network()
    policy = Policy(scheduler, STEPS)
    where = torch.randn(2, 4), conditions(torch.tensor([0, 1]))[0]
    before = policy.transition(network, 1, *where)
    scheduler.set_timesteps(8)
    assert all(
        torch.equal(one, other) for one, other in zip(policy.transition(network, 1, *where), before, strict=True)
    )


# Networks


def text_task(score) -> Task:
    texts = torch.randn(PROMPTS + 1, 3, 32)

    def asked(numbers):
        return ({"encoder_hidden_states": texts[rows]} for rows in (numbers, torch.full_like(numbers, -1)))

    return Task(LATENT, PROMPTS, asked, score)


def test_adapters_learn_and_the_model_below_stays(tmp_path):
    unet = tiny_unet()
    base = {name: value.clone() for name, value in unet.state_dict().items()}
    x, cond = torch.randn(2, *LATENT), {"encoder_hidden_states": torch.randn(2, 3, 32)}
    with torch.no_grad():
        original = unet(x, torch.tensor([7, 900]), **cond).sample
    student, divergence = add_lora(unet, 4, 8.0, 0.0, ["to_q", "to_v"]), []
    policy = Policy(LCMScheduler(), 3, guidance_scale=2.0)
    objective = RLCMObjective(RLCMConfig(kl_coef=0.1), policy)
    trainer = toy_trainer(
        tmp_path, Networks(student, teacher=WithoutAdapters(student)), objective, OptimConfig(learning_rate=1e-2),
        gradient_accumulation_steps=2, max_train_steps=3,
        callbacks=[lambda trainer, loss: divergence.append(loss.logs["kl"].item())],
    )  # fmt: skip
    drawn = RolloutConfig(samples_per_rollout=4, baseline="batch")
    trainer.fit(Rollouts(drawn, trainer, text_task(lambda latents, numbers: latents.mean((1, 2, 3)))))
    after = {name.replace(".base_layer", ""): value for name, value in student.state_dict().items()}
    assert_same({name: after[name] for name in base}, base)
    with torch.no_grad():
        assert torch.equal(trainer.nets.teacher(x, torch.tensor([7, 900]), **cond).sample, original)
        assert not torch.equal(student(x, torch.tensor([7, 900]), **cond).sample, original)
    assert divergence[0] == 0
    assert divergence[2] > 0


def test_gradients_are_those_of_finite_differences_with_and_without_checkpointing():
    """Of all steps together, the last by the reward itself; the divergence is from a model inside the same network."""
    torch.manual_seed(0)
    student = add_lora(tiny_unet(), 2, 4.0, 0.0, ["to_q", "to_k", "to_v"])
    policy = Policy(LCMScheduler(), 3)
    steps = moves(policy, student, {"encoder_hidden_states": torch.randn(3, 3, 32)}, LATENT)
    adapters = [p for p in student.parameters() if p.requires_grad]
    for p in adapters:
        nn.init.normal_(p, std=0.3)
    weight = torch.randn(LATENT)
    objective = RLCMObjective(
        RLCMConfig("pathwise", loss="reinforce", kl_coef=0.5), policy, lambda x, _: (x.sin() * weight).sum((1, 2, 3))
    )
    nets = Networks(student, teacher=WithoutAdapters(student))
    plain = learnt(objective, nets, steps)[1]
    student.enable_gradient_checkpointing()
    assert student.is_gradient_checkpointing
    torch.testing.assert_close(learnt(objective, nets, steps)[1], plain, rtol=1e-5, atol=1e-8)
    direction, size, values = plain / plain.norm(), 0.003, []
    for sign in (1, -1):
        moved, probe = (
            nn.utils.parameters_to_vector(adapters).detach() + sign * size * direction,
            copy.deepcopy(student),
        )
        nn.utils.vector_to_parameters(moved, [p for p in probe.parameters() if p.requires_grad])
        with torch.no_grad():
            changed = Networks(probe, teacher=WithoutAdapters(probe))
            values.append(sum(objective(changed, step, START).value.double() for step in steps) / len(steps))
    assert (values[0] - values[1]).item() / (2 * size) == pytest.approx(plain.norm().item(), rel=0.01)


@pytest.mark.parametrize(("reduction", "share"), [("sum", 1), ("mean", 4)])
def test_both_parts_of_the_gradient_have_one_unit(reduction, share):
    """Whatever the unit of rewards; with the mean over four numbers of a latent, a fourth of it."""
    policy, nets, numbers = toy_policy(), Networks(Network(1)), torch.tensor([0, 2, 1])
    steps = moves(policy, nets.student, conditions(numbers)[0], (4,), prompt=numbers, log_prob=None)
    config = {"final_step": "pathwise", "loss": "reinforce"}
    expected = learnt(RLCMObjective(RLCMConfig(**config, logprob_reduction="sum"), policy, worth), nets, steps)[1]
    larger = [replace(step, scale=10 * step.scale) for step in steps]
    objective = RLCMObjective(
        RLCMConfig(**config, logprob_reduction=reduction), policy, lambda x, n: 10 * worth(x, n) + 3
    )
    torch.testing.assert_close(share * learnt(objective, nets, larger)[1], expected, rtol=1e-4, atol=1e-6)
    last = learnt(objective, nets, [steps[-1]])[1]
    assert last.abs().max() > 0.1 * expected.abs().max()


# Advantages


def test_divergences_are_not_remembered_as_rewards(tmp_path):
    _, source = run(tmp_path, {"kl_in_advantage": 0.7, "buffer_size": 8}, max_train_steps=2)
    reward, kl = (source.statistics[name] for name in ("reward", "kl"))
    assert reward.seen.sum() == kl.seen.sum() == 8
    assert sorted(reward.rewards[reward.rewards != 0].tolist()) == sorted(source.rollout.rewards.tolist())


def test_divergence_lowers_the_advantage(tmp_path):
    """By its own deviations from the mean, of a roll-out that was drawn after learning."""
    _, source = run(tmp_path, {"kl_in_advantage": 0.7, "baseline": "batch"}, max_train_steps=20)
    source.number = -1  # draw again
    next(source(0))
    nets, policy, (states, prompts, rewards, advantages, *_) = source.trainer.nets, source.policy, source.rollout
    kl = torch.zeros(len(prompts), dtype=torch.float64)
    with torch.no_grad():
        for index in range(2):
            now, before = (
                policy.transition(net, index, states[:, index], conditions(prompts)[0])
                for net in (nets.student, nets.teacher)
            )
            kl += ((now.mean - before.mean).square() / (2 * now.std**2)).mean(1).double()
    expected = deviations(rewards.double()) - 0.7 * deviations(kl)
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-4, atol=1e-4)
    assert kl.std() > 1e-4


def deviations(values):
    return (values - values.mean()) / (values.std(correction=0) + 1e-6)


# Learning


class Painter(nn.Module):
    """Predicts small images from noisy ones: a part of what it sees, and what a convolution makes of it and of the time."""

    def __init__(self, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x, t, return_dict=False):
        time = (t / 1000).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return (0.3 * x + self.layers(torch.cat([x, time], dim=1)),)


def redness(images, numbers=None):
    return (images[:, 0] - images[:, 2]).mean((1, 2))


def reached(folder, seed: int, reward) -> float:
    """Redness of held-out samples, after learning from a reward; before it, if there is none."""
    policy, network, shape = Policy(LCMScheduler(prediction_type="sample"), 4), Painter(seed), (3, 8, 8)
    if reward is not None:
        objective = RLCMObjective(RLCMConfig(), policy)
        trainer = toy_trainer(
            folder, Networks(network), objective, OptimConfig(learning_rate=3e-3), seed=seed,
            gradient_accumulation_steps=objective.num_transitions, max_train_steps=25,
        )  # fmt: skip
        drawn = RolloutConfig(samples_per_rollout=64, sample_batch_size=64, train_batch_size=64, baseline="batch")
        trainer.fit(Rollouts(drawn, trainer, Task(shape, 1, lambda numbers: ({}, {}), reward)))
    noise = torch.randn(5, 256, *shape, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        *_, (_, _, _, end) = policy.walk(network, noise, {})
    return redness(end).mean().item()


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_rewarded_becomes_more_in_both_directions(tmp_path, seed):
    """Random steps move a fresh network, too, so no reward is believed alone: up against down, and against no information."""
    order = torch.Generator().manual_seed(seed)

    def shuffled(images, numbers):
        return redness(images)[torch.randperm(len(images), generator=order)]

    up = reached(tmp_path / "up", seed, redness)
    down = reached(tmp_path / "down", seed, lambda images, numbers: -redness(images))
    drift = reached(tmp_path / "shuffled", seed, shuffled) - reached(None, seed, None)
    assert up - down > 5
    assert abs(drift) < 0.1 * (up - down)
