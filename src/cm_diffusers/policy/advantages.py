"""From rewards to advantages: how much better a sample is than others of its prompt, of its group or of its batch."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cm_diffusers.errors import UserError


Baseline = Literal["per_prompt", "group", "batch"]
EPSILON = 1e-6  # added to deviations, so that equal rewards have advantage 0


class Standing(NamedTuple):
    """What rewards are compared with, each `(N,)` float64: `advantage = (reward - mean) / scale`."""

    mean: Tensor
    scale: Tensor

    def of(self, rewards: Tensor) -> Tensor:
        return ((rewards.double() - self.mean) / self.scale).float()


def compared(
    rewards: Tensor, prompts: Tensor, baseline: Baseline, statistics: "PromptStatistics | None" = None
) -> Standing:
    """
    Args:
        rewards: Of all samples of a roll-out, of every process, `(N,)`.
        prompts: Number of each sample's prompt `(N,)`.
        baseline: "batch" compares with all samples, "group" with those of the same prompt in this roll-out,
            "per_prompt" with the last ones of the same prompt in this and earlier roll-outs (2305.13301, Sec. 4.3).
        statistics: For "per_prompt"; takes these rewards in.
    """
    rewards = rewards.double()
    if baseline == "per_prompt":
        return statistics.take(rewards, prompts)
    if baseline == "batch":
        prompts = torch.zeros_like(prompts)
    members = (prompts[:, None] == prompts).double()
    mean = members @ rewards / members.sum(1)
    squares = (rewards - mean[:, None]).square() * members  # of each one's group, about its mean
    return Standing(mean, (squares.sum(1) / members.sum(1)).sqrt() + EPSILON)


class PromptStatistics:
    """The last rewards of every prompt.

    Args:
        num_prompts: P.
        buffer_size: Rewards that are remembered of a prompt.
        min_count: A prompt with fewer is compared with the whole roll-out.

    Raises:
        ValueError: More rewards are wanted than are remembered.
    """

    def __init__(self, num_prompts: int, buffer_size: int, min_count: int) -> None:
        if not 1 <= min_count <= buffer_size:
            raise UserError(
                f"--min_count must be from 1 to --buffer_size, which is {buffer_size}, but it is {min_count}."
            )
        self.rewards = torch.zeros(num_prompts, buffer_size, dtype=torch.float64)
        self.seen = torch.zeros(num_prompts, dtype=torch.int64)
        self.min_count = min_count

    def take(self, rewards: Tensor, prompts: Tensor) -> Standing:
        """Remembers rewards `(N,)` of the prompts with these numbers `(N,)`, then compares with what is remembered."""
        size, whole = self.rewards.shape[1], compared(rewards, prompts, "batch")
        for reward, prompt in zip(rewards.cpu().double(), prompts.tolist(), strict=True):
            self.rewards[prompt, self.seen[prompt] % size] = reward
            self.seen[prompt] += 1
        mean, scale = whole.mean.clone(), whole.scale.clone()
        for place, prompt in enumerate(prompts.tolist()):
            if (count := int(self.seen[prompt])) >= self.min_count:
                kept = self.rewards[prompt, : min(count, size)]
                mean[place], scale[place] = kept.mean(), kept.std(correction=0) + EPSILON
        return Standing(mean, scale)

    def state(self) -> dict[str, Tensor]:
        return {"rewards": self.rewards, "seen": self.seen}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.rewards.copy_(state["rewards"])
        self.seen.copy_(state["seen"])
