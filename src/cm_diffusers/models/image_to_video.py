"""An image as the condition of a clip: an adapter that any motion UNet takes as additional residuals."""

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel, UNetMotionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from cm_diffusers.models.heads import zeroed


class ImageToVideoAdapter(ModelMixin, ConfigMixin):
    """Residuals for every skip connection and the middle of a UNet, from the latents of an image and the frame's place.

    In the manner of AnimateLCM's image encoder (2402.00769): levels as wide as the UNet's, pooled between, and told
    the index of the frame at their start. Its outputs are convolutions that start at zero, so a new adapter changes
    nothing.

    Args:
        in_channels: Channels of the latents.
        block_out_channels, layers_per_block, norm_num_groups: As in the config of the UNet.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int | Sequence[int] = 2,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        first, last = block_out_channels[0], block_out_channels[-1]
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.levels = nn.ModuleList(
            nn.ModuleList([_block(before, width, norm_num_groups), _block(width, width, norm_num_groups)])
            for before, width in zip((first, *block_out_channels), block_out_channels, strict=False)
        )
        self.outputs = nn.ModuleList(zeroed(nn.Conv2d(c, c, 1)) for c in skip_channels(self.config))
        self.mid_output = zeroed(nn.Conv2d(last, last, 1))

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel | UNetMotionModel) -> "ImageToVideoAdapter":
        """A new adapter that fits the UNet."""
        config = unet.config
        shared = {name: config[name] for name in ("block_out_channels", "layers_per_block", "norm_num_groups")}
        return cls(in_channels=config.out_channels, **shared)

    def forward(
        self, latents: Tensor, num_frames: int, motion_scale: float = 0.8
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """What `UNetMotionModel` takes as `down_block_additional_residuals` and `mid_block_additional_residual`.

        Args:
            latents: The VAE's latents of one image for each clip (B, C, h, w), scaled.
            num_frames: F.
            motion_scale: How strongly frames are told apart; with 0, all have the same residuals.

        Returns:
            (B * F, C_i, h_i, w_i) for every skip connection, in the UNet's order, and (B * F, C, h', w').
        """
        x = self.conv_in(latents).repeat_interleave(num_frames, dim=0)
        places = get_timestep_embedding(torch.arange(num_frames, device=x.device), x.shape[1]).to(x)
        x = x + motion_scale * places.repeat(len(latents), 1)[:, :, None, None]
        features = [x]
        for place, (level, layers) in enumerate(zip(self.levels, _layers(self.config), strict=True)):
            if place > 0:
                x = F.avg_pool2d(x, 2, ceil_mode=True)
                features.append(x)
            for block in level:
                x = self._run(block, x)
            features += [x] * layers
        down = tuple(output(x) for output, x in zip(self.outputs, features, strict=True))
        return down, self.mid_output(x)

    def _run(self, block: ResnetBlock2D, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, x, None)
        return block(x, None)


def skip_channels(config: dict) -> list[int]:
    """Channels of the skip connections of a UNet with this config: of its start, then those of each level."""
    widths = list(config["block_out_channels"])
    by_level = [[width] * layers for width, layers in zip(widths, _layers(config), strict=True)]
    halved = [[width] for width in widths[:-1]] + [[]]  # a level but the last ends with a half as large one
    return [widths[0], *(c for level, end in zip(by_level, halved, strict=True) for c in level + end)]


def _layers(config: dict) -> list[int]:
    layers = config["layers_per_block"]
    return [layers] * len(config["block_out_channels"]) if isinstance(layers, int) else list(layers)


def _block(inputs: int, outputs: int, groups: int) -> ResnetBlock2D:
    return ResnetBlock2D(in_channels=inputs, out_channels=outputs, temb_channels=None, groups=groups)
