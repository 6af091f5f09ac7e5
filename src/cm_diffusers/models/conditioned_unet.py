"""A video network in front of which a condition is trained."""

from diffusers import ControlNetModel, UNetMotionModel
from torch import Tensor, nn

from cm_diffusers.models.image_to_video import ImageToVideoAdapter


class ConditionedUNet(nn.Module):
    """A video student that is told a condition: `image_latents` `(B, C, h, w)` or `control` `(B, 3, F, H, W)`."""

    def __init__(self, unet: UNetMotionModel, condition: ImageToVideoAdapter | ControlNetModel) -> None:
        super().__init__()
        self.unet, self.condition = unet, condition

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        image_latents: Tensor | None = None,
        control: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        frames = sample.shape[2]
        if control is None:
            down, mid = self.condition(image_latents, frames)
        else:
            times, shown = timestep.repeat_interleave(frames), control.transpose(1, 2).flatten(0, 1)
            images = sample.transpose(1, 2).flatten(0, 1)
            down, mid = self.condition(images, times, encoder_hidden_states, shown, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return self.unet(sample, timestep, encoder_hidden_states, **residuals, return_dict=return_dict)
