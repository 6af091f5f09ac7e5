"""Activations that are computed again in the backward pass instead of kept."""

from diffusers import ModelMixin
from torch import nn

from cm_diffusers.errors import UserError


def recompute_activations(network: nn.Module) -> None:
    """Gradient checkpointing in every network of diffusers that the module is or holds.

    Raises:
        ValueError: One of them has none.
    """
    for model in [module for module in network.modules() if isinstance(module, ModelMixin)]:
        if not model._supports_gradient_checkpointing:
            raise UserError(
                f"--gradient_checkpointing is nothing that diffusers' {type(model).__name__} can do: leave it out, and take a "
                "smaller --train_batch_size with --gradient_accumulation_steps where memory is short."
            )
        model.enable_gradient_checkpointing()
