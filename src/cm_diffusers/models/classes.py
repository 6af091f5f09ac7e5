"""The classes that a network without prompts knows."""

from torch import nn


ANY_CLASS = "any_class"  # in the config of a network whose last class stands for all of them


def classes_of(unet: nn.Module) -> int | None:
    """How many classes it knows, without the one for any; None if it takes none."""
    known = unet.config.num_class_embeds
    return known if known is None or unet.config.get(ANY_CLASS) is None else known - 1
