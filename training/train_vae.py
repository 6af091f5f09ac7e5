"""Train an AutoencoderKL on images: the latent space of a text-to-image teacher."""

import cm_diffusers.engine.early
import json
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers.hf_argparser import HfArg

from cm_diffusers.data.folders import checked_folder, folder_of_test_data
from cm_diffusers.data.images import image_batches
from cm_diffusers.data.sampler import Stream
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.models.small_stable_diffusion import SmallVAEConfig, new_vae
from cm_diffusers.objectives.autoencoder import AutoencoderConfig, AutoencoderObjective, AutoencoderWithPosterior
from cm_diffusers.publishing.folders import write_result
from cm_diffusers.tasks.summary import announce, conclude
from cm_diffusers.types import Networks


@dataclass
class MeasureConfig:
    test_data_dir: str | None = HfArg(default=None, help="Images to measure the reconstruction error on.")
    latent_samples: int = HfArg(default=2048, help="Images the latents' scale is measured on.")

    def check(self) -> None:
        if self.test_data_dir is not None:
            checked_folder(self.test_data_dir, "--test_data_dir")


CONFIGS = (SmallVAEConfig, MeasureConfig, DataConfig, AutoencoderConfig, OptimConfig, TrainConfig)


@torch.no_grad()
def measure(vae: AutoencoderKL, images: Stream, number: int) -> dict[str, float]:
    """Over so many batches: reconstruction error in [-1, 1] pixels and the standard deviation of sampled latents."""
    latents, errors = [], []
    for batch in (batch.to(vae.device) for batch in islice(images(), number)):
        posterior = vae.encode(batch.x0).latent_dist
        latents.append(posterior.sample())
        errors.append((vae.decode(posterior.mean).sample - batch.x0).square().mean())
    return {"latent_std": torch.cat(latents).std().item(), "mse": torch.stack(errors).mean().item()}


def main() -> None:
    model, final, data, method, optim, train = configs = parse_configs(CONFIGS, __doc__)
    seed_everything(train.seed)
    measured = {}
    if final.test_data_dir:  # read before training: what is wrong with it is found now
        elsewhere = folder_of_test_data(final.test_data_dir) | {"dataset_name": None, "train_shards_path_or_url": None}
        measured["test"] = image_batches(replace(data, **elsewhere), train.seed)
    vae = new_vae(model, data.resolution)
    nets, objective = Networks(AutoencoderWithPosterior(vae)), AutoencoderObjective(method)
    trainer = Trainer(train, nets, objective, optim, settings=[data])
    trainer.fit(announce(trainer, image_batches(data, train.seed, *trainer.place[:2]), configs, "vae"))
    with trainer.exported() as network:
        if network is not None:
            vae, measured = network.vae, {"train": image_batches(data, train.seed), **measured}
            number = -(-final.latent_samples // data.train_batch_size)
            figures = {name: measure(vae, images, number) for name, images in measured.items()}
            vae.register_to_config(scaling_factor=1 / figures["train"]["latent_std"])  # 2112.10752, Appendix G
            write_result(Path(train.output_dir) / "vae", [vae.save_pretrained])
            figures |= {"samples": final.latent_samples, "seed": train.seed}
            (Path(train.output_dir) / "metrics.json").write_text(json.dumps(figures, indent=1))
            print(json.dumps(figures))
    conclude(trainer, configs, "vae")
    trainer.end()


if __name__ == "__main__":
    run(main)
