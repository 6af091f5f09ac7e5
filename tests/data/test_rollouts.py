"""Roll-outs: what is given to learn from, what a checkpoint brings back, and that rewards rise."""

import pytest
import torch
from processes import run_worker
from rollout_worker import PROMPTS, STEPS, conditions, run, score
from safetensors.torch import load_file
from toys import assert_same, forget_accelerate, tensors

from cm_diffusers.data.reward_history import COLUMNS
from cm_diffusers.data.rollouts import Task
from cm_diffusers.policy.advantages import PromptStatistics, compared
from cm_diffusers.policy.transitions import log_prob


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


def given(source, count: int) -> list:
    batches = source(0)
    return [next(batches) for _ in range(count)]


def test_every_transition_is_given_once(tmp_path):
    trainer, source = run(tmp_path, max_train_steps=1)
    source.number = -1  # draw again
    moves = given(source, 2 * 2)
    assert [m.index for m in moves] == [0, 1, 0, 1]
    starts, prompts = source.rollout.states[:, 0], source.rollout.prompts
    seen = torch.cat([moves[0].sample, moves[2].sample])
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, starts.tolist()))
    assert all(torch.equal(m.cond["prompt"].argmax(1), m.prompt) for m in moves)
    assert torch.equal(moves[0].action, moves[1].sample)
    last = source.rollout.states[:, -1]
    assert torch.equal(source.rollout.rewards, score(last, prompts))
    assert last.shape[1:] == moves[0].sample.shape[1:]
    assert trainer.step == 1


def test_before_anything_is_learnt_all_ratios_are_one(tmp_path):
    _, source = run(tmp_path, {"inner_epochs": 2}, {"logprob_reduction": "sum"}, max_train_steps=1)
    trainer = source.trainer
    source.number = -1  # draw again
    for moves in given(source, 4):
        taken = source.policy.transition(trainer.nets.student, moves.index, moves.sample, moves.cond)
        now = log_prob(taken, moves.action, "sum")
        assert (now - moves.log_prob).abs().max() < 1e-5


def test_resumes_in_the_middle_of_a_roll_out(tmp_path):
    options = {"rollouts": {"inner_epochs": 3, "kl_in_advantage": 0.2}, "method": {"kl_coef": 0.1}}
    whole, one = run(tmp_path / "whole", **options, max_train_steps=8, checkpointing_steps=4)
    again, two = run(
        tmp_path / "again", **options, max_train_steps=8, checkpointing_steps=4,
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"),
    )  # fmt: skip
    assert_same(again.student.state_dict(), whole.student.state_dict())
    assert one.number == two.number == 1  # six steps a roll-out: 4 is inside the first
    first, second = (tensors(folder / "checkpoint-8") for folder in (tmp_path / "whole", tmp_path / "again"))
    seconds = COLUMNS.index("seconds")
    for found in (first, second):
        found["source/history"][:, seconds] = 0
    assert_same(second, first)


@pytest.mark.parametrize("training", [True, False])
def test_drawn_without_dropout_and_learnt_from_as_before(tmp_path, training):
    """Two parts of three steps are drawn in eval mode; then the probabilities as training will compute them."""
    trainer, source = run(tmp_path, max_train_steps=1)
    student, seen = trainer.student.train(training), []
    student.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    source.number = -1  # draw again
    next(source(0))
    assert seen == [False] * 6 + [training] * 4
    assert student.training == training


def test_passes_of_the_network_are_counted(tmp_path):
    _, source = run(tmp_path, {"inner_epochs": 2}, max_train_steps=8)
    passes = [row[COLUMNS.index("passes")] for row in source.history.rows]
    per_rollout = 8 * (STEPS + 2 + 2 * 2 * 3)  # drawn, for the probabilities, and learnt from twice
    assert passes == [per_rollout, 2 * per_rollout]


@pytest.mark.parametrize(
    ("rollouts", "method", "per_sample"),
    [
        ({}, {}, STEPS + 2 * 3 + 2),
        ({"kl_in_advantage": 0.1}, {}, STEPS + 2 * 3 + 2 + 2),
        ({}, {"kl_coef": 0.1}, STEPS + 2 * 3 + 2 + 2 * 2),
    ],
)
def test_passes_of_the_model_before_are_counted_too(tmp_path, rollouts, method, per_sample):
    """Two of three steps have noise: each divergence takes a pass when it is drawn, and with kl_coef when it is learnt from."""
    _, source = run(tmp_path, rollouts, method, max_train_steps=4)
    passes, kl = COLUMNS.index("passes"), COLUMNS.index("kl")
    assert source.history.rows[0][passes] == 8 * per_sample
    first, second = (row[kl] for row in source.history.rows[:2])
    assert first == 0
    assert (second > 0) == bool(rollouts or method)


def test_rewards_rise_and_those_of_others_do_not_help(tmp_path):
    """Against the same rewards handed to other samples. (With `drop` they fall here: see `test_rlcm`.)"""
    order, ends = torch.Generator().manual_seed(0), {}

    def shuffled(latents, numbers):
        return score(latents, numbers)[torch.randperm(len(numbers), generator=order)]

    for name, reward in (("right", score), ("shuffled", shuffled)):
        settings = {"samples_per_rollout": 64, "train_batch_size": 64, "sample_batch_size": 64, "baseline": "batch"}
        method, worth = {"final_step": "stochastic"}, Task((4,), PROMPTS, conditions, reward)
        _, source = run(tmp_path / name, settings, method, worth, max_train_steps=60)
        rewards = [row[COLUMNS.index("reward")] for row in source.history.rows]
        ends[name] = sum(rewards[-5:]) / 5 - sum(rewards[:5]) / 5
    assert ends["right"] > 0.3
    assert ends["right"] > 3 * abs(ends["shuffled"])


def test_with_pathwise_the_last_step_is_given_too(tmp_path):
    trainer, source = run(tmp_path, method={"final_step": "pathwise"}, max_train_steps=2)
    assert source.num_transitions == STEPS
    assert {m.index for m in given(source, 3)} == {0, 1, 2}


def test_divergence_in_the_advantage_is_nothing_at_the_start(tmp_path):
    found = [
        run(tmp_path / str(weight), {"kl_in_advantage": weight}, max_train_steps=1)[1].rollout.advantages
        for weight in (0.0, 5.0)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("rollouts", "config", "message"),
    [
        ({"samples_per_prompt": 3}, {}, "--samples_per_rollout 8 must be a multiple of --samples_per_prompt 3"),
        ({"train_batch_size": 5}, {}, "--samples_per_rollout 8 must be a multiple of --train_batch_size 5"),
        ({}, {"gradient_accumulation_steps": 3}, "must be a multiple of 2, the transitions of a sample"),
        ({}, {"gradient_accumulation_steps": 8}, "must divide the 4 micro-batches of a roll-out"),
    ],
)
def test_numbers_that_do_not_fit(tmp_path, rollouts, config, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, rollouts, **config)


def test_groups_share_a_prompt(tmp_path):
    _, source = run(tmp_path, {"samples_per_prompt": 4, "baseline": "group"}, max_train_steps=1)
    prompts, advantages = source.rollout.prompts.view(2, 4), source.rollout.advantages.view(2, 4)
    assert (prompts == prompts[:, :1]).all()
    if prompts[0, 0] != prompts[1, 0]:
        assert torch.allclose(advantages.mean(1), torch.zeros(2), atol=1e-5)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("two")
    run_worker("rollout_worker.py", folder)
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in (0, 1)]


def test_statistics_of_two_processes_are_those_of_one(two_processes):
    one, two = two_processes
    rewards, prompts = (
        torch.cat([rank[f"first/{name}"] for rank in two_processes]) for name in ("rewards", "prompts")
    )
    assert not torch.equal(one["first/rewards"], two["first/rewards"])
    statistics = PromptStatistics(PROMPTS, 6, 3)
    expected = compared(rewards, prompts, "per_prompt", statistics).of(rewards)
    assert torch.equal(torch.cat([rank["first/advantages"] for rank in two_processes]), expected)
    for rank in two_processes:
        assert_same({name: rank[f"statistics/{name}"] for name in ("rewards", "seen")}, statistics.state())


def test_two_processes_agree_and_resume_bit_exactly(two_processes):
    for rank in two_processes:
        whole, again = (
            {n.partition("/")[2]: v for n, v in rank.items() if n.startswith(f"{kind}/")}
            for kind in ("whole", "again")
        )
        assert_same(again, whole)
    weights = [{name: value for name, value in rank.items() if "layers" in name} for rank in two_processes]
    assert weights[0]
    assert_same(weights[1], weights[0])
