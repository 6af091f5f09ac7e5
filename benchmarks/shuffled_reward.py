"""Rewards in a random order: the control of reward fine-tuning, with the same rewards and nothing to learn from them."""

import torch
from torch import Tensor

from cm_diffusers.rewards import jpeg
from cm_diffusers.rewards.base import Metadata, Reward


def jpeg_compressibility(images: Tensor, prompts: list[str], metadata: Metadata | None = None) -> Tensor:
    return _shuffled(jpeg.jpeg_compressibility, images, prompts, metadata)


def jpeg_incompressibility(images: Tensor, prompts: list[str], metadata: Metadata | None = None) -> Tensor:
    return _shuffled(jpeg.jpeg_incompressibility, images, prompts, metadata)


def _shuffled(reward: Reward, images: Tensor, prompts: list[str], metadata: Metadata | None) -> Tensor:
    """The rewards `(B,)` of these images, each given to any of them; their mean stays."""
    values = reward(images, prompts, metadata)
    return values[torch.randperm(len(values)).to(values.device)]
