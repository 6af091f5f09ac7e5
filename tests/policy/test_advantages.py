"""Advantages equal their definitions, written with plain NumPy."""

from collections import defaultdict, deque

import numpy as np
import pytest
import torch

from cm_diffusers.policy.advantages import PromptStatistics, compared


def deviations(rewards, members):
    return (rewards - members.mean()) / (members.std() + 1e-6)


def test_of_a_batch_and_of_groups():
    rewards, prompts = torch.tensor([1.0, 2.0, 4.0, 7.0, -3.0]), torch.tensor([0, 1, 0, 1, 0])
    values = rewards.numpy().astype(float)
    found = compared(rewards, prompts, "batch").of(rewards)
    assert np.allclose(found, deviations(values, values), atol=1e-6)
    found = compared(rewards, prompts, "group").of(rewards)
    expected = [deviations(r, values[prompts.numpy() == p]) for r, p in zip(values, prompts.tolist(), strict=True)]
    assert np.allclose(found, expected, atol=1e-6)


def test_running_statistics_are_those_of_the_last_rewards():
    """Against deques: eviction, the least count, and prompts that come twice in a roll-out."""
    rng, statistics, buffers = (
        np.random.default_rng(0),
        PromptStatistics(3, 5, 3),
        defaultdict(lambda: deque(maxlen=5)),
    )
    for _ in range(6):
        rewards, prompts = rng.normal(size=7), rng.integers(3, size=7)
        found = compared(torch.tensor(rewards), torch.tensor(prompts), "per_prompt", statistics).of(
            torch.tensor(rewards)
        )
        for reward, prompt in zip(rewards, prompts, strict=True):
            buffers[prompt].append(reward)
        for value, reward, prompt in zip(found.tolist(), rewards, prompts, strict=True):
            members = np.array(buffers[prompt]) if len(buffers[prompt]) >= 3 else rewards
            assert value == pytest.approx(deviations(reward, members), abs=1e-5)


@pytest.mark.parametrize("baseline", ["per_prompt", "group", "batch"])
def test_equal_rewards_have_no_advantage(baseline):
    rewards, prompts = torch.full((4,), 0.3), torch.tensor([0, 1, 0, 1])
    found = compared(rewards, prompts, baseline, PromptStatistics(2, 4, 1)).of(rewards)
    assert torch.equal(found, torch.zeros(4))


def test_statistics_come_back_from_their_state():
    one, other = PromptStatistics(2, 3, 2), PromptStatistics(2, 3, 2)
    prompts = torch.tensor([0, 1, 1, 1, 1])
    one.take(torch.arange(5.0), prompts)
    other.load_state(one.state())
    rewards = torch.tensor([3.0, -1.0])
    found = [statistics.take(rewards, torch.tensor([0, 1])) for statistics in (one, other)]
    assert torch.equal(found[0].mean, found[1].mean)
    assert torch.equal(found[0].scale, found[1].scale)
    assert found[0].mean.tolist() == [1.5, 2.0]  # of 0 and 3; of 3, 4 and -1


@pytest.mark.parametrize("least", [0, 5])
def test_more_than_is_remembered_cannot_be_asked_for(least):
    with pytest.raises(
        ValueError, match=f"--min_count must be from 1 to --buffer_size, which is 4, but it is {least}"
    ):
        PromptStatistics(1, 4, least)
