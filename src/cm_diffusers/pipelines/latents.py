"""Between pixels and latents."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Generator, Tensor

from cm_diffusers.pipelines.checks import check_finite


Generators = Generator | list[Generator] | None
COMPUTED_IN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def dtype_of(model: ModelMixin) -> torch.dtype:
    """What the model computes in, without diffusers' walk over every module, unless the weights are stored otherwise."""
    first = next(model.parameters()).dtype
    return first if first in COMPUTED_IN else model.dtype


def decode(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) around [-1, 1] of latents (B, C, h, w).

    Raises:
        ValueError: They are not finite.
    """
    scale, mean = _affine(pipe.vae, latents)
    with _safe_precision(pipe) as dtype:
        images = pipe.vae.decode((latents / scale + mean).to(dtype), return_dict=False)[0]
    check_finite(images, "The images that the VAE made of finite latents")
    return images


def encode(pipe: DiffusionPipeline, images: Tensor, generator: Generators) -> Tensor:
    """Latents (B, C, h, w) drawn from the posteriors of images (B, 3, H, W) in [-1, 1]; latents pass through."""
    if images.shape[1] == pipe.vae.config.latent_channels:
        return images
    with _safe_precision(pipe) as dtype:
        posterior = pipe.vae.encode(images.to(dtype))
    latents = posterior.latent_dist.sample(generator) if "latent_dist" in posterior else posterior.latents
    scale, mean = _affine(pipe.vae, latents)
    return (latents - mean) * scale


def _affine(vae: ModelMixin, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Scale and mean (1, C, 1, 1) by which latents differ from what the VAE computes."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
    mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(like) for values in (mean, std))
    return vae.config.scaling_factor / std, mean


@contextmanager
def _safe_precision(pipe: DiffusionPipeline) -> Iterator[torch.dtype]:
    """The VAE's dtype; SDXL's VAE overflows in half precision and is float32 for the while."""
    vae, dtype = pipe.vae, dtype_of(pipe.vae)
    if not (pipe.is_xl and dtype == torch.float16 and vae.config.get("force_upcast")):
        yield dtype
        return
    vae.to(dtype=torch.float32)
    try:
        yield torch.float32
    finally:
        vae.to(dtype=torch.float16)
