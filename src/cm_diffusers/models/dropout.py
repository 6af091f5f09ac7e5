"""Dropout of diffusers' UNets, after they are made."""

from dataclasses import dataclass

from diffusers import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers.hf_argparser import HfArg

from cm_diffusers.errors import UserError
from cm_diffusers.ranges import check_ranges


@dataclass
class DropoutConfig:
    """Dropout of the trained network: both sides of a pair draw the same masks."""

    dropout: float | None = HfArg(
        default=None, help="Of the residual blocks; if not given, what the network's own settings say."
    )
    dropout_max_resolution: int | None = HfArg(
        default=None, help="Only blocks of feature maps up to this size get --dropout, the others none."
    )

    def __post_init__(self) -> None:
        if self.dropout is None and self.dropout_max_resolution is not None:
            raise UserError("--dropout_max_resolution says where --dropout acts, which is not given: give both.")
        check_ranges(self)


def set_dropout(unet: ModelMixin, config: DropoutConfig) -> None:
    """Sets the dropout of the residual blocks, in place.

    Raises:
        ValueError: No block is as small as the config says, or it is not known how large they are; or it is no UNet.
    """
    if config.dropout is None:
        return
    if not hasattr(unet, "down_blocks"):
        raise UserError(f"--dropout is of a UNet's residual blocks, but {type(unet).__name__} has none: leave it out.")
    lowest, most = len(unet.down_blocks) - 1, config.dropout_max_resolution
    side = 0 if most is None else _longer_side(unet)
    if (least := side >> lowest) > (most or 0):
        raise UserError(
            f"--dropout_max_resolution is {most}, but no block is smaller than {least}: give at least that."
        )
    levels = [*enumerate(unet.down_blocks), *enumerate(reversed(unet.up_blocks)), (lowest, unet.mid_block)]
    for level, block in levels:
        for module in block.modules() if block is not None else ():
            if isinstance(module, ResnetBlock2D):
                module.dropout.p = config.dropout if side >> level <= (most or 0) else 0.0


def _longer_side(unet: ModelMixin) -> int:
    """Of what the network was made for; its config has a number, or height and width."""
    size = unet.config.sample_size
    if size is None:
        raise UserError(
            "--dropout_max_resolution needs the size of the feature maps, and the network's config has no sample_size: "
            "leave the flag out, or write sample_size there."
        )
    return size if isinstance(size, int) else max(size)


def has_dropout(network: nn.Module) -> bool:
    """Whether two passes on the same input differ; a plain function's do not."""
    layers = network.modules() if isinstance(network, nn.Module) else ()
    return any(isinstance(layer, _DropoutNd) and layer.training and layer.p > 0 for layer in layers)
