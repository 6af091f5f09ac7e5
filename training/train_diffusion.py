"""Train a small Stable Diffusion pipeline (UNet and text tower) from scratch on captioned images."""

import cm_diffusers.engine.early
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from transformers.hf_argparser import HfArg

from cm_diffusers.data.cache import Vae
from cm_diffusers.data.found import Found
from cm_diffusers.data.sources import DataConfig, load_image_text
from cm_diffusers.data.text_image import token_batches
from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.models.small_stable_diffusion import SmallStableDiffusionConfig, new_pipeline
from cm_diffusers.models.students import TextConditionedUNet
from cm_diffusers.objectives.diffusion import DiffusionConfig, DiffusionObjective
from cm_diffusers.publishing.pipelines import save_pipeline
from cm_diffusers.tasks.callbacks import ValidationConfig, sample_grid, show_end
from cm_diffusers.tasks.image_models import load_vae
from cm_diffusers.tasks.summary import announce, conclude
from cm_diffusers.types import Networks


@dataclass
class ModelConfig:
    """What the pipeline is built around."""

    pretrained_vae: str = HfArg(help="Folder of a trained AutoencoderKL.")
    save_fp16: bool = HfArg(default=False, help="Store UNet and VAE in half precision.")


CONFIGS = (
    ModelConfig,
    SmallStableDiffusionConfig,
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    TrainConfig,
    ValidationConfig,
)


def main() -> None:
    model, shape, data, method, optim, train, validation = configs = parse_configs(CONFIGS, __doc__)
    seed_everything(train.seed)
    captions = load_image_text(data, None, Found("the batches report"))[data.caption_column][:]
    vae = load_vae(model.pretrained_vae)
    texts = chain.from_iterable(c if isinstance(c, list) else [c] for c in captions)
    pipe = new_pipeline(shape, vae, texts, method.prediction_type)
    student = TextConditionedUNet(pipe.unet, pipe.text_encoder).train()
    objective = DiffusionObjective(method, DiscreteVP.from_scheduler(pipe.scheduler))
    grid = sample_grid(validation, lambda _: pipe, resolution=data.resolution)
    trainer = Trainer(train, Networks(student), objective, optim, settings=[data, shape], callbacks=[grid])
    batches = token_batches(data, Vae.from_model(vae), pipe.tokenizer, train.seed, *trainer.place)
    trainer.fit(announce(trainer, batches, configs, "pipeline"))
    show_end(trainer)
    with trainer.exported() as network:
        if network is not None:
            pipe.unet, pipe.text_encoder = network.unet, network.text_encoder
            save_pipeline(pipe, Path(train.output_dir) / "pipeline", model.save_fp16)
    conclude(trainer, configs, "pipeline")
    trainer.end()


if __name__ == "__main__":
    run(main)
