"""Rewards as columns of a sweep: evaluation stands before rewards, so they are handed in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cm_diffusers.errors import UserError
from cm_diffusers.evaluation.kept import network_digest
from cm_diffusers.places import public
from cm_diffusers.rewards import CheckedReward, load_reward
from cm_diffusers.rewards.networks import NetworkReward


class RewardJudge:
    """A reward that knows what its numbers depend on: the weights of its network, or its name where it has none.

    Args:
        reward: What is asked.
    """

    def __init__(self, reward: CheckedReward) -> None:
        self.reward, inner = reward, reward.reward
        self.digest = network_digest(inner.network) if isinstance(inner, NetworkReward) else reward.name

    def check(self, prompts: Sequence[str]) -> None:
        self.reward.check(prompts)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.reward(images, prompts)


def reward_judges(names: Sequence[str], device: torch.device) -> dict[str, RewardJudge]:
    """Rewards, loaded, by what their columns are called: their names without folders of this machine.

    Raises:
        ValueError: As `load_reward`, or two would have one name.
    """
    shown = [public(name) for name in names]
    if twice := [name for name in shown if shown.count(name) > 1]:
        raise UserError(f"Two columns of --rewards would be called {twice[0]}: leave one out, or rename its folder.")
    return {short: RewardJudge(load_reward(name).to(device)) for short, name in zip(shown, names, strict=True)}
