"""A variational autoencoder for latents (1312.6114; as in 2112.10752, Appendix G, without its adversarial term)."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.types import Batch, Loss, Networks, Progress


@dataclass
class AutoencoderConfig:
    """How the terms of the loss are weighed."""

    kl_weight: float = HfArg(
        default=1e-6, help="Weight of the KL divergence to N(0, 1), summed over a sample's latents."
    )
    l1_weight: float = HfArg(default=1.0, help="Weight of the absolute error beside the squared one.")


class AutoencoderWithPosterior(nn.Module):
    """Runs encoder and decoder in one `forward`, which distributed training needs, and returns the posterior too."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = self.vae.encode(pixels).latent_dist
        z = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        return self.vae.decode(z).sample, posterior.mean, posterior.logvar


class AutoencoderObjective:
    """Reconstruction error of sampled latents and the KL divergence of the posterior."""

    def __init__(self, config: AutoencoderConfig) -> None:
        self.config = config
        self.players = {"student": self}

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        reconstruction, mean, logvar = (value.float() for value in nets.student(batch.x0))
        error = reconstruction - batch.x0
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()  # 1312.6114, Appendix B
        mse, l1 = error.square().mean(), error.abs().mean()
        value = mse + self.config.l1_weight * l1 + self.config.kl_weight * kl
        return Loss(value, {"mse": mse.detach(), "l1": l1.detach(), "kl": kl.detach()})
