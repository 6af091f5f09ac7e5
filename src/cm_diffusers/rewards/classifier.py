"""How surely a classifier sees what the prompt names."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from cm_diffusers.errors import UserError, readable
from cm_diffusers.evaluation.metrics import label_in_prompt
from cm_diffusers.models.classifier import ImageClassifier
from cm_diffusers.rewards.preparation import Preparation


class LabelLogProbability(nn.Module):
    """log p(label | image) of the label that the prompt names.

    Args:
        network: Images `(B, 3, H, W)` in [0, 1] -> logits `(B, K)`.
        labels: The K class names; one may hold several, with commas between them, as ImageNet's do.
    """

    def __init__(self, network: nn.Module, labels: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.names = [(name.strip(), i) for i, label in enumerate(labels) for name in label.split(",")]

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """
        Raises:
            ValueError: A prompt names no class.
        """
        wanted = torch.tensor([self.label(prompt) for prompt in prompts], device=images.device)
        return self.network(images).log_softmax(1).gather(1, wanted[:, None]).squeeze(1)

    def check(self, prompts: list[str]) -> None:
        """
        Raises:
            ValueError: A prompt names no class.
        """
        for prompt in prompts:
            self.label(prompt)

    def label(self, prompt: str) -> int:
        """Number of the class whose name is the longest that occurs in the prompt."""
        found = label_in_prompt(prompt, [name for name, _ in self.names])
        if found is None:
            some = ", ".join(name for name, _ in self.names[:10])
            raise UserError(
                f"The prompt {prompt!r} names no class of the classifier, which knows {some}{' ...' * (len(self.names) > 10)}; "
                "take other prompts, or another classifier."
            )
        return self.names[found][1]


class _Prepared(nn.Module):
    def __init__(self, model: nn.Module, prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.prepare = model, prepare

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=self.prepare(images)).logits


def load_classifier(source: str, revision: str | None = None) -> LabelLogProbability:
    """
    Args:
        source: Folder of an `ImageClassifier`, or folder or Hub id of an image classifier of transformers in safetensors.
        revision: Of the Hub repository.

    Raises:
        ValueError: It cannot be loaded.
    """
    with readable(f"The classifier {source} (a folder, or a Hub id)"):
        config = Path(source) / "config.json"
        if config.is_file() and f'"{ImageClassifier.__name__}"' in config.read_text("utf-8"):
            own = ImageClassifier.from_pretrained(source, use_safetensors=True)
            return LabelLogProbability(own, own.labels)
        options = {"revision": revision, "trust_remote_code": False}
        model = AutoModelForImageClassification.from_pretrained(source, use_safetensors=True, **options)
        prepare = Preparation.of(AutoImageProcessor.from_pretrained(source, **options))
        labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
        return LabelLogProbability(_Prepared(model, prepare), labels)
