"""Rewards that tests name as MODULE:FUNCTION."""

from torch import Tensor


class Red:
    """How much redder than blue an image is."""

    differentiable = True

    def __call__(self, images: Tensor, prompts: list[str], metadata: object) -> Tensor:
        return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
