"""Train an AutoencoderKL on images: the latent space of a text-to-image teacher."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers.hf_argparser import HfArg

from cm_diffusers.data.images import image_batches
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.trainer import TrainConfig, Trainer
from cm_diffusers.models.small_stable_diffusion import SmallVAEConfig, new_vae
from cm_diffusers.objectives.autoencoder import AutoencoderConfig, AutoencoderObjective, AutoencoderWithPosterior
from cm_diffusers.publishing.folders import write_result
from cm_diffusers.tasks.summary import announce, conclude
from cm_diffusers.types import Networks


@dataclass
class MeasureConfig:
    """What is measured at the end."""

    test_data_dir: str | None = HfArg(default=None, help="Images to measure the reconstruction error on.")
    latent_samples: int = HfArg(default=2048, help="Images the latents' scale is measured on.")


CONFIGS = (SmallVAEConfig, MeasureConfig, DataConfig, AutoencoderConfig, OptimConfig, TrainConfig)


@torch.no_grad()
def measure(vae: AutoencoderKL, data: DataConfig, samples: int, seed: int) -> dict[str, float]:
    """Reconstruction error in [-1, 1] pixels and the standard deviation of sampled latents."""
    stream, latents, errors = image_batches(data, seed)(0), [], []
    for batch in (next(stream).to(vae.device) for _ in range(-(-samples // data.train_batch_size))):
        posterior = vae.encode(batch.x0).latent_dist
        latents.append(posterior.sample())
        errors.append((vae.decode(posterior.mean).sample - batch.x0).square().mean())
    return {"latent_std": torch.cat(latents).std().item(), "mse": torch.stack(errors).mean().item()}


def main() -> None:
    model, final, data, method, optim, train = configs = parse_configs(CONFIGS, __doc__)
    seed_everything(train.seed)
    vae = new_vae(model, data.resolution)
    trainer = Trainer(
        train, Networks(AutoencoderWithPosterior(vae)), AutoencoderObjective(method), optim, settings=[data]
    )
    accelerator = trainer.accelerator
    batches = image_batches(data, train.seed, accelerator.process_index, accelerator.num_processes)
    announce(trainer, batches, configs, "vae")
    trainer.fit(batches)
    with trainer.export_weights():
        figures = {"train": measure(vae, data, final.latent_samples, train.seed)}
        if final.test_data_dir:
            data.train_data_dir = final.test_data_dir
            figures["test"] = measure(vae, data, final.latent_samples, train.seed)
        vae.register_to_config(scaling_factor=1 / figures["train"]["latent_std"])  # 2112.10752, Appendix G
        if accelerator.is_main_process:
            write_result(Path(train.output_dir) / "vae", [vae.save_pretrained])
            figures |= {"samples": final.latent_samples, "seed": train.seed}
            (Path(train.output_dir) / "metrics.json").write_text(json.dumps(figures, indent=1))
            print(json.dumps(figures))
    conclude(trainer, configs, "vae")
    trainer.end()


if __name__ == "__main__":
    run(main)
