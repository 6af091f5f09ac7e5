"""A small image classifier: the feature extractor and prompt judge of small benchmarks."""

from collections.abc import Sequence

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from cm_diffusers.errors import UserError


class ImageClassifier(ModelMixin, ConfigMixin):
    """Convolutional classifier of grey images.

    Args:
        labels: The K class names, in the order of the logits.
        channels: Channels of the 3x3 convolutions; the image is halved after each.
        image_size: Side length, in pixels, that every input is resized to; a multiple of `2 ** len(channels)`.
        num_features: Size D of the penultimate layer.
        dropout: Dropped fraction of the penultimate features in training.
    """

    @register_to_config
    def __init__(
        self,
        labels: Sequence[str],
        channels: Sequence[int] = (24, 48, 96),
        image_size: int = 32,
        num_features: int = 128,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        if image_size % 2 ** len(channels):
            raise UserError(
                f"image_size is {image_size} but {len(channels)} halvings need a multiple of {2 ** len(channels)}."
            )
        self.blocks = nn.Sequential(*[_block(i, o) for i, o in zip([1, *channels], channels, strict=False)])
        side = image_size // 2 ** len(channels)
        self.embed = nn.Linear(channels[-1] * side**2, num_features)
        self.head = nn.Linear(num_features, len(labels))

    @property
    def labels(self) -> list[str]:
        return list(self.config.labels)

    @property
    def num_features(self) -> int:
        return self.config.num_features

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations (B, D) of `images` (B, 3, H, W) in [0, 1]."""
        grey = images.to(self.dtype).mean(1, keepdim=True)
        size = (self.config.image_size,) * 2
        if grey.shape[-2:] != size:
            grey = F.interpolate(grey, size, mode="bilinear", antialias=True)
        return self.embed(self.blocks(2 * grey - 1).flatten(1)).relu()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of `images` (B, 3, H, W) in [0, 1]."""
        return self.head(F.dropout(self.features(images), self.config.dropout, self.training))


def _block(inputs: int, outputs: int) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))
