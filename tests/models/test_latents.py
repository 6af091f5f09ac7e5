"""Latents of VAEs against the VAEs' own: what they encode, what they decode, and how a pipeline normalises them."""

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    StableDiffusionPipeline,
)
from tiny import tiny_pipeline, tiny_vae
from torch import nn

from cm_diffusers.errors import UserError
from cm_diffusers.models import decoding
from cm_diffusers.models.families.base import network_of
from cm_diffusers.models.families.latents import dc_latents, kl_latents, per_channel_latents


MEAN, STD = [0.5, -1.0, 0.25, 2.0], [2.0, 0.5, 1.25, 4.0]


def seeded(build) -> nn.Module:
    torch.manual_seed(0)
    return build().eval().requires_grad_(False)


def tiny_wan(**config) -> AutoencoderKLWan:
    """Pixels divided by 4, frames by 2."""
    defaults = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 1, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
    }
    return AutoencoderKLWan(**defaults | config, latents_mean=MEAN, latents_std=STD)


def tiny_qwen() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=MEAN, latents_std=STD,
    )  # fmt: skip


def tiny_dc() -> AutoencoderDC:
    blocks = ("ResBlock",) * 3
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8, 16), decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1,) * 3, decoder_layers_per_block=(1,) * 3,
        encoder_qkv_multiscales=((),) * 3, decoder_qkv_multiscales=((),) * 3,
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("build", [tiny_wan, tiny_qwen])
def test_images_are_clips_of_one_frame(build, images):
    vae = seeded(build)
    latents = per_channel_latents(vae)
    mean, std = latents.encode(vae, images)
    posterior = vae.encode(images[:, :, None]).latent_dist
    assert mean.shape == (2, 4, 8, 4)
    assert latents.downscale == latents.multiple == 4
    assert torch.equal(mean, posterior.mean[:, :, 0])
    assert torch.equal(std, posterior.std[:, :, 0])
    x = latents.of_network(mean)
    for channel in range(4):
        torch.testing.assert_close(x[:, channel], (mean[:, channel] - MEAN[channel]) / STD[channel])
    own = vae.decode(posterior.mean).sample[:, :, 0]
    torch.testing.assert_close(latents.decode(vae, x), own, rtol=1e-4, atol=1e-4)
    assert latents.decode(vae, x).shape == images.shape


@pytest.mark.parametrize("build", [tiny_wan, tiny_qwen])
def test_clips_pass_with_fewer_frames(build, images):
    vae = seeded(build)
    latents = per_channel_latents(vae, patch=2)
    clips = torch.stack([images, images.flip(0), images.flip(3), images / 2, -images], dim=2)
    mean, std = latents.encode(vae, clips)
    assert mean.shape == std.shape == (2, 4, 3, 8, 4)
    assert latents.multiple == 8
    assert torch.equal(mean, vae.encode(clips).latent_dist.mean)
    x = latents.of_network(mean.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(latents.decode(vae, x), vae.decode(mean).sample, rtol=1e-4, atol=1e-4)


def test_a_vae_that_cuts_patches_first_divides_by_them_too(images):
    vae = seeded(lambda: tiny_wan(patch_size=2, in_channels=12, out_channels=12))
    latents = per_channel_latents(vae)
    assert latents.downscale == 8
    assert latents.encode(vae, images)[0].shape == (2, 4, 4, 2)


def test_an_autoencoder_without_a_posterior_has_no_noise(images):
    vae = seeded(tiny_dc)
    latents = dc_latents(vae)
    mean, std = latents.encode(vae, images)
    assert torch.equal(mean, vae.encode(images).latent)
    assert std.shape == mean.shape == (2, 4, 8, 4)
    assert std.count_nonzero() == 0
    assert latents.downscale == 4
    assert torch.equal(latents.of_network(mean), mean * 0.41407)
    torch.testing.assert_close(latents.decode(vae, mean * 0.41407), vae.decode(mean).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shift", "scale"), [(None, 0.18215), (0.0609, 1.5305)])
def test_latents_of_a_kl_autoencoder_are_what_the_pipelines_make(shift, scale, images):
    vae = seeded(tiny_vae)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    latents = kl_latents(vae, patch=2)
    mean, std = latents.encode(vae, images)
    posterior = vae.encode(images).latent_dist
    assert torch.equal(mean, posterior.mean)
    assert torch.equal(std, posterior.std)
    assert (latents.shift, latents.scale, latents.downscale, latents.multiple) == (shift or 0.0, scale, 4, 8)
    x = (mean - (shift or 0.0)) * scale
    assert torch.equal(latents.of_network(mean), x)
    assert torch.equal(latents.decode(vae, x), vae.decode(x / scale + (shift or 0.0)).sample)


def test_a_kl_autoencoder_may_have_statistics_of_each_channel(images):
    vae = seeded(tiny_vae)
    vae.register_to_config(latents_mean=MEAN, latents_std=STD, scaling_factor=0.5)
    latents = kl_latents(vae)
    mean, _ = latents.encode(vae, images)
    expected = (mean - torch.tensor(MEAN).view(1, 4, 1, 1)) * 0.5 / torch.tensor(STD).view(1, 4, 1, 1)
    torch.testing.assert_close(latents.of_network(mean), expected)
    torch.testing.assert_close(latents.of_vae(expected), mean)


def test_channels_are_scaled_where_and_as_the_latents_are(images):
    latents = per_channel_latents(seeded(tiny_wan))
    z = torch.zeros(2, 4, 1, 1, dtype=torch.float64)
    assert latents.of_network(z).dtype == torch.float64
    assert latents.of_network(z.to("meta")).device.type == "meta"


def test_the_network_of_a_pipeline_is_found_by_its_class():
    pipe = tiny_pipeline()
    assert network_of(pipe) is pipe.unet
    other = StableDiffusionPipeline(**pipe.components | {"unet": None}, requires_safety_checker=False)
    with pytest.raises(
        UserError, match="without a network of a known family, but with AutoencoderKL, CLIPTextModel; "
    ):
        network_of(other)


@pytest.mark.parametrize(("downscale", "parts"), [(4, [2, 2, 1]), (8, [2, 2, 1]), (16, [1] * 5), (32, [1] * 5)])
def test_fewer_latents_are_decoded_at_once_where_each_makes_more_pixels(monkeypatch, downscale, parts):
    monkeypatch.setattr(decoding, "CHUNK", 128)
    assert decoding.in_chunks(len, torch.zeros(5, 4, 8, 8), downscale) == parts
