"""Train the small classifier whose features and labels `evaluate.py` uses."""

import cm_diffusers.engine.early
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import ClassLabel
from transformers.hf_argparser import HfArg

from cm_diffusers.data.folders import checked_folder, folder_of_test_data
from cm_diffusers.data.found import Found
from cm_diffusers.data.images import image_batches
from cm_diffusers.data.sources import DataConfig, load_image_text
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation.reference import Reference, ReferenceConfig, load_reference
from cm_diffusers.models.classifier import ImageClassifier
from cm_diffusers.objectives.classification import ClassificationConfig, ClassificationObjective
from cm_diffusers.publishing.folders import written_aside
from cm_diffusers.tasks.summary import announce, conclude
from cm_diffusers.types import Networks


@dataclass
class ClassifierConfig:
    """The classifier and its test data."""

    test_data_dir: str = HfArg(default="data/fashion/test", help="Folder of labelled images to measure accuracy on.")
    label_column: str = HfArg(default="label", help="ClassLabel column, whose names become the classifier's labels.")
    channels: list[int] = HfArg(default_factory=lambda: [24, 48, 96], help="Channels of the convolutions.")

    def check(self) -> None:
        checked_folder(self.test_data_dir, "--test_data_dir")


CONFIGS = (ClassifierConfig, DataConfig, ClassificationConfig, OptimConfig, TrainConfig)


@torch.no_grad()
def measure(model: ImageClassifier, reference: Reference) -> dict[str, float]:
    guesses = [model(part.to(model.device)).argmax(1).cpu() for part in reference.images.split(256)]
    correct = torch.cat(guesses) == torch.tensor(reference.labels)
    return {"accuracy": correct.double().mean().item(), "num_images": len(correct)}


def main() -> None:
    config, data, method, optim, train = configs = parse_configs(CONFIGS, __doc__)
    labels = load_image_text(data, [config.label_column], Found("the batches report")).features[config.label_column]
    if not isinstance(labels, ClassLabel):
        raise UserError(
            f"--label_column {config.label_column} must be a ClassLabel with the classes' names, as `datasets` writes it "
            f"into parquet files, but it is {labels}."
        )
    options = {"label_column": config.label_column, "resolution": data.resolution}
    test = load_reference(ReferenceConfig(**folder_of_test_data(config.test_data_dir), **options), captioned=False)
    seed_everything(train.seed)
    model = ImageClassifier(labels=labels.names, channels=config.channels, image_size=data.resolution)
    trainer = Trainer(train, Networks(model), ClassificationObjective(method), optim, settings=[data])
    batches = image_batches(data, train.seed, *trainer.place[:2], label_column=config.label_column)
    trainer.fit(announce(trainer, batches, configs, "classifier"))
    with trainer.exported() as student:
        if student is not None:
            figures = measure(student, test) | {"seed": train.seed}
            with written_aside(Path(train.output_dir) / "classifier") as folder:
                student.save_pretrained(folder)
                (folder / "metrics.json").write_text(json.dumps(figures, indent=1) + "\n")
            print(json.dumps(figures))
    conclude(trainer, configs, "classifier")
    trainer.end()


if __name__ == "__main__":
    run(main)
