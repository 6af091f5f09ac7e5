"""Which noise goes with which data: minibatch optimal transport (2302.00482), so that fewer of their lines cross."""

from types import ModuleType

import torch
from torch import Tensor

from cm_diffusers.diffusion.process import exact
from cm_diffusers.errors import UserError
from cm_diffusers.extras import POT, missing


def load_pot() -> ModuleType:
    """
    Raises:
        ValueError: The package POT is missing.
    """
    try:
        import ot
    except ImportError as error:
        raise UserError(missing("--coupling ot", POT)) from error
    return ot


def check_batch(size: int) -> None:
    """
    Raises:
        ValueError: There is nothing to choose from.
    """
    if size < 2:
        raise UserError(
            f"Optimal transport matches samples within a batch, but this one has {size}; give --train_batch_size 2 or "
            "more, or --coupling independent."
        )


def transport_in_classes(x0: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
    """As `transport`, among the samples of each class: so noise tells nothing about the class, as in sampling.

    Args:
        labels: Classes `(B,)`; what is alone in its class keeps its noise.
    """
    matched = noise.clone()
    for label in labels.unique():
        if (labels == label).sum() > 1:
            matched[labels == label] = transport(x0[labels == label], noise[labels == label])
    return matched


def transport(x0: Tensor, noise: Tensor) -> Tensor:
    """The rows of `noise` `(B, ...)` in the order in which they are, together, nearest to the rows of x0 `(B, ...)`.

    The exact plan between as many points of equal mass is a permutation: every noise is used once, and data keeps its
    conditions. Costs are squared distances.

    Raises:
        ValueError: There is one sample only, or POT is missing.
    """
    check_batch(len(x0))
    cost = torch.cdist(exact(x0.flatten(1)), exact(noise.flatten(1))).square()
    plan = load_pot().emd([], [], cost.numpy())
    return noise[torch.from_numpy(plan.argmax(1)).to(noise.device)]
