"""Image classification: the objective that trains the benchmark's feature extractor."""

from dataclasses import dataclass

from torch.nn import functional as F
from transformers.hf_argparser import HfArg

from cm_diffusers.types import Batch, Loss, Networks, Progress


@dataclass
class ClassificationConfig:
    """Hyper-parameters of `ClassificationObjective`."""

    label_smoothing: float = HfArg(default=0.0, help="Probability mass spread evenly over all classes.")


class ClassificationObjective:
    """Cross entropy between `student(images)` (B, K) and `batch.cond["class_labels"]` (B,).

    `batch.x0` holds pixels (B, 3, H, W) in [-1, 1]; the student sees them in [0, 1].
    """

    def __init__(self, config: ClassificationConfig) -> None:
        self.config = config
        self.players = {"student": self}

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        labels = batch.cond["class_labels"]
        logits = nets.student((batch.x0 + 1) / 2).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        accuracy = (logits.argmax(1) == labels).float().mean()
        return Loss(loss, {"loss": loss.detach(), "accuracy": accuracy})
