"""Train a small Stable Diffusion 3 pipeline (transformer of a rectified flow) from scratch on captioned images."""

import cm_diffusers.engine.early
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.data.text_image import text_image_batches
from cm_diffusers.engine.cli import parse_configs, refuse_changed, run
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.models.families.base import family_of
from cm_diffusers.objectives.flow import FlowConfig, FlowObjective
from cm_diffusers.publishing.pipelines import save_pipeline
from cm_diffusers.tasks.callbacks import ValidationConfig, sample_grid, show_end
from cm_diffusers.tasks.flow_models import SmallFlowConfig, new_flow_pipeline
from cm_diffusers.tasks.summary import announce, conclude
from cm_diffusers.types import Networks


@dataclass
class ResultConfig:
    save_fp16: bool = HfArg(default=False, help="Store the transformer in bfloat16, the VAE in float16.")


CONFIGS = (SmallFlowConfig, DataConfig, FlowConfig, OptimConfig, TrainConfig, ValidationConfig, ResultConfig)


def main() -> None:
    shape, data, method, optim, train, validation, result = configs = parse_configs(CONFIGS, __doc__)
    refuse_changed(validation, "validation_teacher_steps", "without a teacher")
    seed_everything(train.seed)
    pipe = new_flow_pipeline(shape, data.resolution, method.shift)
    objective = FlowObjective(method, family_of(pipe.transformer).call)
    grid = sample_grid(validation, lambda _: pipe, resolution=data.resolution)
    trainer = Trainer(train, Networks(pipe.transformer), objective, optim, settings=[data, shape], callbacks=[grid])
    batches = text_image_batches(data, Encoders.from_pipeline(pipe), train.seed, *trainer.place)
    trainer.fit(announce(trainer, batches, configs, "pipeline"))
    show_end(trainer)
    with trainer.exported() as network:
        if network is not None:
            pipe.transformer = network
            save_pipeline(pipe, Path(train.output_dir) / "pipeline", result.save_fp16)
    conclude(trainer, configs, "pipeline")
    trainer.end()


if __name__ == "__main__":
    run(main)
