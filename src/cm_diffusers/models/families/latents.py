"""Latents of the VAEs that several families share."""

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan
from torch import Tensor, nn

from cm_diffusers.models.families.base import Latents


def kl_latents(vae: AutoencoderKL, patch: int = 1) -> Latents:
    """One shift and scale for all channels, or those of each where the config has statistics."""
    config = vae.config
    shift, scale = config.get("shift_factor") or 0.0, config.scaling_factor
    if config.get("latents_mean") and config.get("latents_std"):
        shift, scale = _each(config.latents_mean), scale / _each(config.latents_std)

    def decode(vae: AutoencoderKL, x: Tensor) -> Tensor:
        return vae.decode(latents.of_vae(x)).sample

    downscale = 2 ** (len(config.block_out_channels) - 1)
    latents = Latents(posterior, decode, shift, scale, downscale, config.latent_channels, patch)
    return latents


def posterior(vae: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each `(B, C, ...)`."""
    found = vae.encode(pixels).latent_dist
    return found.mean, found.std


def per_channel_latents(
    vae: AutoencoderKLWan | AutoencoderKLQwenImage, patch: int = 1, clips: bool = False
) -> Latents:
    """Of VAEs of clips, which take an image as a clip of one frame.

    Clips pass too: pixels `(B, 3, F, H, W)` and latents `(B, C, f, h, w)`.

    Args:
        clips: Whether the network sees them.
    """

    def encode(vae: AutoencoderKLWan | AutoencoderKLQwenImage, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = posterior(vae, _as_clips(pixels))
        return _as_before(mean, pixels), _as_before(std, pixels)

    def decode(vae: AutoencoderKLWan | AutoencoderKLQwenImage, x: Tensor) -> Tensor:
        frames = latents.of_vae(_as_clips(x).transpose(1, 2))
        return _as_before(vae.decode(frames.transpose(1, 2)).sample, x)

    shift, scale = _each(vae.config.latents_mean), 1 / _each(vae.config.latents_std)
    downscale = 2 ** len(vae.temperal_downsample) * (vae.config.get("patch_size") or 1)
    frames_per_latent = 2 ** sum(vae.temperal_downsample) if clips else None
    latents = Latents(encode, decode, shift, scale, downscale, vae.config.z_dim, patch, frames_per_latent)
    return latents


def dc_latents(vae: AutoencoderDC, patch: int = 1) -> Latents:
    """Of an autoencoder without a posterior: its standard deviation is 0."""

    def encode(vae: AutoencoderDC, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean = vae.encode(pixels).latent
        return mean, torch.zeros_like(mean)

    def decode(vae: AutoencoderDC, x: Tensor) -> Tensor:
        return vae.decode(latents.of_vae(x)).sample

    sizes = vae.spatial_compression_ratio, vae.config.latent_channels, patch
    latents = Latents(encode, decode, 0.0, vae.config.scaling_factor, *sizes)
    return latents


def _each(values: list[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)


def _as_clips(images: Tensor) -> Tensor:
    return images[:, :, None] if images.ndim == 4 else images


def _as_before(clips: Tensor, like: Tensor) -> Tensor:
    return clips[:, :, 0] if like.ndim == 4 else clips
