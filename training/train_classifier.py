"""Train the small classifier whose features and labels `evaluate.py` uses."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import set_seed
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from cm_diffusers.data.images import image_batches
from cm_diffusers.data.sources import DataConfig, load_image_text
from cm_diffusers.evaluation.reference import load_reference
from cm_diffusers.models.classifier import ImageClassifier
from cm_diffusers.objectives.classification import ClassificationConfig, ClassificationObjective
from cm_diffusers.optimizers import OptimConfig
from cm_diffusers.trainer import TrainConfig, Trainer
from cm_diffusers.types import Networks


@dataclass
class ClassifierConfig:
    """The classifier and its test data."""

    test_data_dir: str = HfArg(default="data/fashion/test", help="Folder of labelled images to measure accuracy on.")
    label_column: str = HfArg(default="label", help="ClassLabel column, whose names become the classifier's labels.")
    channels: list[int] = HfArg(default_factory=lambda: [24, 48, 96], help="Channels of the convolutions.")


@torch.no_grad()
def test_accuracy(model: ImageClassifier, data: DataConfig, classifier: ClassifierConfig) -> dict[str, float]:
    config = replace(data, train_data_dir=classifier.test_data_dir, dataset_name=None, max_train_samples=None)
    reference = load_reference(config, None, classifier.label_column)
    parts = [model(part.to(model.device)).argmax(1).cpu() for part in reference.images.split(256)]
    correct = torch.cat(parts) == torch.tensor(reference.labels)
    return {"accuracy": round(correct.double().mean().item(), 4), "num_images": len(correct)}


def write_metrics(folder: Path, metrics: dict[str, float]) -> None:
    aside = folder / "metrics.json.tmp"
    aside.write_text(json.dumps(metrics, indent=2) + "\n")
    os.replace(aside, folder / "metrics.json")


def main() -> None:
    parser = HfArgumentParser((TrainConfig, OptimConfig, DataConfig, ClassificationConfig, ClassifierConfig))
    train, optim, data, loss, classifier = parser.parse_args_into_dataclasses(look_for_args_file=False)
    set_seed(train.seed)
    rows = load_image_text(data, [classifier.label_column])
    model = ImageClassifier(
        labels=rows.features[classifier.label_column].names, channels=classifier.channels, image_size=data.resolution
    )
    trainer = Trainer(train, Networks(model), ClassificationObjective(loss), optim)
    ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
    trainer.fit(image_batches(data, train.seed, *ranks, label_column=classifier.label_column))
    with trainer.export_weights() as student:
        metrics = test_accuracy(student, data, classifier) | {"seed": train.seed}
        if trainer.accelerator.is_main_process:
            folder = Path(train.output_dir) / "classifier"
            student.save_pretrained(folder)
            write_metrics(folder, metrics)
            print(metrics)


if __name__ == "__main__":
    main()
