"""A UNet2DModel that is told where its jump ends, too. This file travels beside its weights: it needs diffusers alone."""

from functools import wraps
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn


class ClassAndTarget(nn.Module):
    """What the class and the end of the jump add to the embedding of the time; in the place of the classes' own embedding.

    Args:
        classes: The embedding of classes; None for a network that knows none.
        times: Waves of a time `(B,)`, `(B, C)`.
        channels: C.
        width: Of the embedding.
    """

    def __init__(self, classes: nn.Module | None, times: nn.Module, channels: int, width: int) -> None:
        super().__init__()
        self.classes, self.times = classes, times
        self.target = TimestepEmbedding(channels, width)
        nn.init.zeros_(self.target.linear_2.weight)
        nn.init.zeros_(self.target.linear_2.bias)

    def forward(self, told: tuple[Tensor | None, Tensor]) -> Tensor:
        """
        Args:
            told: Classes `(B,)` and ends `(B,)`.
        """
        labels, end = told
        shift = self.target(self.times(end).to(self.target.linear_1.weight.dtype))
        return shift if self.classes is None else shift + self.classes(labels)


class TwoTimeUNet2DModel(UNet2DModel):
    """The network of a consistency trajectory model (2310.02279): g(x, t, s) with a second embedding for s.

    What it adds is zero at first, so that the network is the one that it was made from, wherever a jump ends. Its config is
    that of a `UNet2DModel`.
    """

    is_told_target = True

    @wraps(UNet2DModel.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        channels = self.config.block_out_channels[0]
        times = Timesteps(channels, self.config.flip_sin_to_cos, self.config.freq_shift)
        width = self.time_embedding.linear_2.out_features
        self.class_embedding = ClassAndTarget(self.class_embedding, times, channels, width)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        target_timestep: Tensor | float | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As in diffusers.

        Args:
            target_timestep: What it is told of the end of the jump, `(B,)` or one for all, in the units of `timestep`; that
                one itself, the plain denoiser, if None.
        """
        end = torch.as_tensor(timestep if target_timestep is None else target_timestep)
        end = end.float() if end.dtype == torch.float64 else end  # which not every device has
        return super().forward(
            sample, timestep, (class_labels, end.to(sample.device).expand(len(sample))), return_dict
        )
