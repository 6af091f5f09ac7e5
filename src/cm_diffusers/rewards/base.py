"""What a reward is, and what every reward is checked for."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cm_diffusers.errors import UserError


Metadata = list[dict[str, Any]]


class Reward(Protocol):
    """How good images are; higher is better.

    Attributes:
        differentiable: Whether the gradient of the reward reaches the images.
    """

    differentiable: bool

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata | None = None) -> Tensor:
        """Rewards `(B,)` in float32, on the images' device.

        Args:
            images: `(B, 3, H, W)` in [0, 1], on any device.
            prompts: B texts.
            metadata: What else is known of each prompt.
        """
        ...


class CheckedReward:
    """Any reward, or any function of images, prompts and metadata, held to the protocol `Reward`.

    A function may return rewards as a tensor, an array or a list, or `(rewards, info)` as those of trl's DDPOTrainer did;
    one without the attribute `differentiable` is not, and is given images without a gradient.

    Args:
        reward: What is called; a missing metadata reaches it as empty dicts.
        name: What messages and logs call it.
    """

    def __init__(self, reward: Callable[..., Any], name: str) -> None:
        self.reward, self.name = reward, name
        self.differentiable = bool(getattr(reward, "differentiable", False))

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        """
        Raises:
            ValueError: The arguments are not equally many, or the result is not one finite number for each image, or the
                gradient that was promised is not there.
        """
        metadata = [{} for _ in prompts] if metadata is None else metadata
        if not len(images) == len(prompts) == len(metadata):
            raise UserError(
                f"The reward {self.name} was given {len(images)} images, {len(prompts)} prompts and {len(metadata)} "
                "metadata; give equally many."
            )
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            shown = images if self.differentiable else images.detach()
            values = self._tensor(self.reward(shown, list(prompts), metadata), images)
            if images.requires_grad and torch.is_grad_enabled() and not values.requires_grad:
                raise UserError(
                    f"The reward {self.name} says that it is differentiable, but its result does not depend on the images; "
                    "compute it with torch alone and without no_grad, or set differentiable = False."
                )
        return values

    def to(self, device: torch.device | str) -> "CheckedReward":
        """Moves the networks of the reward, which loads them."""
        if hasattr(self.reward, "to"):
            self.reward.to(device)
        return self

    def check(self, prompts: Sequence[str]) -> None:
        """
        Raises:
            ValueError: The reward cannot judge images of one of these prompts, as far as it says so beforehand.
        """
        if hasattr(self.reward, "check"):
            self.reward.check(list(prompts))

    def _tensor(self, found: Any, images: Tensor) -> Tensor:
        found = found[0] if isinstance(found, tuple) else found
        try:
            values = torch.as_tensor(found, dtype=torch.float32, device=images.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{self._demand(images)} a {type(found).__name__} that is no list of numbers.") from error
        if values.shape != (len(images),):
            raise UserError(f"{self._demand(images)} the shape {tuple(values.shape)}.")
        if not values.isfinite().all():
            raise UserError(f"{self._demand(images)} {values.tolist()}.")
        return values

    def _demand(self, images: Tensor) -> str:
        return (
            f"The reward {self.name} must return one finite number for each of {len(images)} images, but it returned"
        )


class WeightedSum:
    """Rewards added up; differentiable if all are.

    Args:
        rewards: What is added.
        weights: By what each is multiplied.

    Raises:
        ValueError: They are not equally many, or there is none.
    """

    def __init__(self, rewards: Sequence[CheckedReward], weights: Sequence[float]) -> None:
        if not rewards or len(rewards) != len(weights):
            raise UserError(f"Found {len(rewards)} rewards and {len(weights)} weights; give a weight for each reward.")
        self.rewards, self.weights = list(rewards), list(weights)
        self.name = " + ".join(f"{w:g} {reward.name}" for w, reward in zip(weights, rewards, strict=True))
        self.differentiable = all(reward.differentiable for reward in rewards)

    def parts(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> dict[str, Tensor]:
        """Each reward `(B,)` by its name, before it is multiplied; to log."""
        return {reward.name: reward(images, prompts, metadata) for reward in self.rewards}

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        values = [reward(images, prompts, metadata) for reward in self.rewards]
        return torch.stack([w * value for w, value in zip(self.weights, values, strict=True)]).sum(0)

    def check(self, prompts: Sequence[str]) -> None:
        """As `CheckedReward.check`."""
        for reward in self.rewards:
            reward.check(prompts)

    def to(self, device: torch.device | str) -> "WeightedSum":
        """As `CheckedReward.to`."""
        for reward in self.rewards:
            reward.to(device)
        return self


def require_differentiable(reward: CheckedReward | WeightedSum, needed_by: str) -> None:
    """
    Args:
        reward: Whose gradient is wanted.
        needed_by: What wants it, such as a flag.

    Raises:
        ValueError: The reward, or a part of it, has no gradient.
    """
    without = [part.name for part in getattr(reward, "rewards", [reward]) if not part.differentiable]
    if without:
        raise UserError(
            f"{needed_by} needs the gradient of the reward, and {', '.join(without)} has none; take a differentiable reward "
            "such as clip_score, pick_score, hpsv2, aesthetic or classifier."
        )
