"""Rewards of images: what `finetune_*.py` train for."""

from cm_diffusers.rewards.base import CheckedReward, Reward, WeightedSum, require_differentiable
from cm_diffusers.rewards.loading import load_reward, load_rewards
from cm_diffusers.rewards.multi_view import MultiViewConsistency


__all__ = [
    "CheckedReward",
    "MultiViewConsistency",
    "Reward",
    "WeightedSum",
    "load_reward",
    "load_rewards",
    "require_differentiable",
]
