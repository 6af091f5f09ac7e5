"""Double normalisation of sCM (2410.11081, Sec. 4.1) on diffusers' `UNet2DModel`, whose config says that it is there."""

import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from cm_diffusers.errors import UserError


class NormalizedScaleShift(nn.Linear):
    """What a residual block makes of the time: y = norm(x) pnorm(s(t)) + pnorm(b(t)).

    It has place, names and weights of the block's own layer. The block adds 1 to a scale, so 1 is taken off.
    """

    def forward(self, embedding: Tensor) -> Tensor:
        """Scale and shift `(B, 2 C)`."""
        scale, shift = super().forward(embedding).chunk(2, dim=1)
        return torch.cat([_pixel_norm(scale) - 1, _pixel_norm(shift)], dim=1)


def _pixel_norm(a: Tensor) -> Tensor:
    """pnorm(a) = a / sqrt(mean(a^2) + eps) over the channels of `(B, C)`, at least in float32."""
    wide = a.to(torch.promote_types(a.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-8)).to(a.dtype)


def double_normed(unet: nn.Module) -> nn.Module:
    """The network itself, with double normalisation if its config says `double_norm`; diffusers alone leaves it out."""
    for block in unet.modules() if unet.config.get("double_norm") else ():
        if isinstance(block, ResnetBlock2D) and type(layer := block.time_emb_proj) is nn.Linear:
            block.time_emb_proj = NormalizedScaleShift(layer.in_features, layer.out_features, device="meta")
            block.time_emb_proj.weight, block.time_emb_proj.bias = layer.weight, layer.bias
    return unet


def add_double_norm(unet: UNet2DModel) -> None:
    """Puts it on a new network, in place, and into its config.

    Raises:
        ValueError: The network has no scale.
    """
    if (found := unet.config.resnet_time_scale_shift) != "scale_shift":
        raise UserError(
            f"--double_norm is for scale and shift, but --unet_config has resnet_time_scale_shift {found!r}: set it to "
            '"scale_shift" there.'
        )
    unet.register_to_config(double_norm=True)
    double_normed(unet)
