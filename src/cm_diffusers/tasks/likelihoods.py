"""The likelihood of images under a model that knows noise levels."""

import math
from collections.abc import Iterator

import torch
from tqdm.auto import tqdm

from cm_diffusers.diffusion.views import edm_denoiser
from cm_diffusers.evaluation.likelihood import (
    LEVELS,
    LikelihoodConfig,
    bits_per_dimension,
    dequantized,
    log_likelihood,
)
from cm_diffusers.tasks.image_models import ImageModel
from cm_diffusers.types import Batch


def measure(model: ImageModel, batches: Iterator[Batch], config: LikelihoodConfig) -> dict[str, float | int | str]:
    """Mean and standard error of the bits per dimension of the first `num_images`, and what it took.

    Pixels are those of 8 bits; latents are a density, whose bits may be negative, in the units in which the network sees them.
    """
    denoise, generator = edm_denoiser(model.view, model.network), torch.Generator().manual_seed(config.seed)
    found, evaluations, pixels = [], 0, model.vae is None
    with tqdm(total=config.num_images, desc="Measuring", unit="image") as bar:
        while len(found) < config.num_images:
            batch, directions = next(batches), []
            x = dequantized(batch.x0, generator) if pixels else batch.x0
            for _ in range(config.num_probes):
                log_p, asked = log_likelihood(
                    lambda x, t, cond=batch.cond: denoise(x, t, cond),
                    x,
                    config.sigma_min,
                    config.sigma_max,
                    config.tolerance,
                    generator,
                )
                directions.append(log_p)
                evaluations += asked
            bits = bits_per_dimension(torch.stack(directions).mean(0), x[0].numel(), LEVELS if pixels else 1.0)
            found += bits[: config.num_images - len(found)].tolist()
            bar.update(min(len(bits), config.num_images - bar.n))
            bar.set_postfix(bits_per_dimension=f"{sum(found) / len(found):.3f}")
    values = torch.tensor(found, dtype=torch.float64)
    return {
        "bits_per_dimension": values.mean().item(),
        "standard_error": values.std().item() / math.sqrt(len(values)),
        "evaluations": evaluations,
        "of": "pixels of 8 bits" if pixels else "latents, a density",
    }
