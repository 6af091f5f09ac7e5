"""Networks that turn images into the features that the metrics compare."""

import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from cm_diffusers.errors import UserError
from cm_diffusers.extras import FIDELITY, missing
from cm_diffusers.models.classifier import ImageClassifier


VideoExtractor = Callable[[Tensor], Tensor]  # (N, F, 3, H, W) in [0, 1] -> (N, D)


class NotFiniteError(UserError):
    """Images or their features are no numbers."""


class InceptionFeatures(nn.Module):
    """Inception-v3 pool features (B, 2048), the network of published FIDs.

    Raises:
        ValueError: if torch-fidelity or its weights are missing.
    """

    def __init__(self) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        super().__init__()
        try:
            self.network = FrechetInceptionDistance(feature=2048).inception
        except ModuleNotFoundError as error:
            raise UserError(missing("--feature_extractor inception", FIDELITY)) from error
        except (OSError, RuntimeError) as error:
            raise UserError(
                "The Inception weights could not be downloaded; check the network or TORCH_HOME."
            ) from error

    def features(self, images: Tensor) -> Tensor:
        return self.network((images * 255).round().byte())


def load_extractor(name: str, device: torch.device | str = "cpu") -> ImageClassifier | InceptionFeatures:
    """Network with a method `features`, images (B, 3, H, W) in [0, 1] -> (B, D).

    Args:
        name: "inception", or the folder of a saved `ImageClassifier`.
        device: Where the network runs.

    Raises:
        ValueError: if `name` is neither.
    """
    if name == "inception":
        return InceptionFeatures().to(device).eval()
    config = Path(name) / "config.json"
    if not config.is_file() or ImageClassifier.__name__ not in config.read_text(encoding="utf-8"):
        raise UserError(
            f"Unknown feature extractor {name!r}: give 'inception' or the folder of a saved ImageClassifier."
        )
    return ImageClassifier.from_pretrained(name, dtype=torch.float32, use_safetensors=True).to(device).eval()


@torch.no_grad()
def extract_features(extractor: ImageClassifier | InceptionFeatures, images: Tensor, batch_size: int = 64) -> Tensor:
    """Features (N, D) of images (N, 3, H, W) in [0, 1], computed in float32 on the extractor's device and kept there.

    Raises:
        ValueError: Some are not finite: LAPACK would end the process on them.
    """
    device = next(extractor.parameters()).device
    with torch.autocast(device.type, enabled=False):
        features = torch.cat([extractor.features(part.to(device).float()) for part in images.split(batch_size)])
    if broken := int((~features.isfinite().all(1)).sum()):
        raise NotFiniteError(
            f"Features of {broken} of {len(images)} images are not finite: the images are not, or the extractor."
        )
    return features


@torch.no_grad()
def classify(extractor: ImageClassifier | InceptionFeatures, features: Tensor) -> Tensor | None:
    """Logits (N, K) of features (N, D) that `extract_features` made; None for an extractor that is no classifier."""
    return extractor.head(features) if isinstance(extractor, ImageClassifier) else None


def load_video_extractor(name: str) -> VideoExtractor:
    """
    Args:
        name: "module:function".

    Raises:
        ValueError: There is no such function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, ValueError, AttributeError) as error:
        raise UserError(f"--video_extractor {name!r} is no module:function that can be imported: {error}.") from error
    if not callable(found):
        raise UserError(f"--video_extractor {name!r} is not callable: name a function of clips.")
    return found


def video_features(extractor: VideoExtractor, clips: Tensor) -> Tensor:
    """Features (N, D) of clips (N, F, 3, H, W).

    Raises:
        ValueError: The extractor gives something else.
    """
    features = extractor(clips)
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(clips):
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UserError(f"--video_extractor must give features (N, D), here N = {len(clips)}, but it gave {found}.")
    return features
