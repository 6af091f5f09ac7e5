"""Wan: calls, text and latents of clips and images are those of the stock pipeline."""

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from flow_checks import adapted, distinct_times, euler, jvp_error
from tiny_flow_a import tiny_wan, tiny_wan_transformer
from torch import Tensor

from cm_diffusers.diffusion.guidance import Conditions
from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import family_of
from cm_diffusers.models.families.wan import FAMILY
from cm_diffusers.models.teachers import TeacherConfig, load_teacher


PROMPTS = ["a photo of a bag", "an ankle boot"]


def clips(frames: int = 3, channels: int = 4) -> Tensor:
    return torch.randn(2, channels, frames, 8, 8)


def conditions(length: int = 6) -> Conditions:
    return {"encoder_hidden_states": torch.randn(2, length, 16)}


def as_prompts(cond: Conditions, uncond: Conditions) -> Conditions:
    branches = {"prompt_embeds": cond, "negative_prompt_embeds": uncond}
    return {name: branch["encoder_hidden_states"] for name, branch in branches.items()}


def sampled(pipeline: WanPipeline, x: Tensor, **arguments: object) -> Tensor:
    side = 8 * pipeline.vae_scale_factor_spatial
    size = {"height": side, "width": side, "num_frames": 4 * x.shape[2] - 3, "output_type": "latent"}
    return pipeline(**{**size, **arguments}, latents=x.clone()).frames


def test_the_network_has_this_family() -> None:
    network = tiny_wan_transformer()
    assert family_of(network) is FAMILY
    assert FAMILY.guidance(network) == "cfg"
    assert FAMILY.student is None
    FAMILY.check("Wan", tiny_wan())


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize(("channels", "frames"), [(4, 3), (4, 1), (48, 2)], ids=["clip", "image", "a time per token"])
def test_pipeline_is_our_loop(scale: float, channels: int, frames: int) -> None:
    pipeline, x, cond, uncond = tiny_wan(channels=channels), clips(frames, channels), conditions(), conditions()
    assert pipeline.config.expand_timesteps == (channels == 48)
    wanted = sampled(pipeline, x, **as_prompts(cond, uncond), num_inference_steps=4, guidance_scale=scale)
    found = euler(FAMILY, pipeline.transformer, x, pipeline.scheduler.sigmas, cond, uncond, scale)
    assert (found - wanted).abs().max() < 1e-5


def test_teacher_is_loaded_whole(tmp_path: Path) -> None:
    pipeline, x, t, cond = tiny_wan(), clips(), torch.tensor([0.3, 0.9]), conditions()
    pipeline.save_pretrained(tmp_path)
    teacher = load_teacher(TeacherConfig(str(tmp_path)))
    assert type(teacher) is WanPipeline
    found, wanted = (FAMILY.call(pipe.transformer, x, t, cond) for pipe in (teacher, pipeline))
    assert torch.equal(found, wanted)


@torch.no_grad()
def test_an_image_is_a_clip_of_one_frame() -> None:
    network, x, t, cond = tiny_wan_transformer(), clips(1), torch.tensor([0.3, 0.9]), conditions()
    assert torch.equal(FAMILY.call(network, x[:, :, 0], t, cond), FAMILY.call(network, x, t, cond)[:, :, 0])


@torch.no_grad()
def test_text_is_that_of_the_call() -> None:
    pipeline, x = tiny_wan(), clips()
    cond, uncond = FAMILY.encode(pipeline, PROMPTS), FAMILY.encode(pipeline, ["", ""])
    arguments = {"num_inference_steps": 1, "guidance_scale": 5.0}
    own = sampled(pipeline, x, **as_prompts(cond, uncond), **arguments)
    assert torch.equal(own, sampled(pipeline, x, prompt=PROMPTS, **arguments))


@torch.no_grad()
def test_text_is_512_tokens_of_which_those_after_the_prompt_are_zero() -> None:
    pipeline = tiny_wan()
    embeds = FAMILY.encode(pipeline, [*PROMPTS, ""])["encoder_hidden_states"]
    lengths = list(map(len, pipeline.tokenizer([*PROMPTS, ""]).input_ids))
    assert embeds.shape == (3, 512, 16)
    for row, length in zip(embeds, lengths, strict=True):
        assert row[:length].any(1).all()
        assert not row[length:].any()


@torch.no_grad()
@pytest.mark.parametrize(("channels", "frames"), [(4, 3), (4, 1), (48, 2)], ids=["clip", "image", "patches"])
def test_latents_are_those_of_the_pipeline(channels: int, frames: int) -> None:
    pipeline, x = tiny_wan(channels=channels), clips(frames, channels)
    latents = FAMILY.latents(pipeline.vae)
    arguments = {**as_prompts(conditions(), conditions()), "num_inference_steps": 1, "guidance_scale": 1.0}
    shown = sampled(pipeline, x, **arguments, output_type="pt")
    pixels = latents.decode(pipeline.vae, sampled(pipeline, x, **arguments))
    assert torch.allclose((pixels / 2 + 0.5).clamp(0, 1).transpose(1, 2), shown, atol=1e-5)
    mean, std = latents.encode(pipeline.vae, pixels)
    posterior = pipeline.vae.encode(pixels).latent_dist
    assert torch.equal(mean, posterior.mean)
    assert torch.equal(std, posterior.std)
    assert mean.shape == x.shape
    assert latents.downscale == pipeline.vae_scale_factor_spatial
    per_channel = {"means": pipeline.vae.config.latents_mean, "stds": pipeline.vae.config.latents_std}
    means, stds = (torch.tensor(values)[:, None, None, None] for values in per_channel.values())
    seen = latents.of_network(mean.transpose(1, 2)).transpose(1, 2)
    assert torch.allclose(seen, (mean - means) / stds, atol=1e-6)


def test_two_experts_are_refused() -> None:
    pipeline = tiny_wan(transformer_2=tiny_wan_transformer(), boundary_ratio=0.875)
    with pytest.raises(UserError, match=r"below boundary_ratio 0\.875, transformer_2, and each would need a student"):
        FAMILY.check("Wan", pipeline)


def test_a_network_that_is_told_an_image_is_refused() -> None:
    pipeline = tiny_wan(transformer=tiny_wan_transformer(in_channels=9))
    with pytest.raises(
        UserError, match="Wan takes 9 channels and makes 4: it is told an image, too; give a text-to-video"
    ):
        FAMILY.check("Wan", pipeline)


def test_gradient_reaches_adapters_only() -> None:
    moved, adapters = adapted(FAMILY, tiny_wan_transformer(), clips(), conditions())
    assert moved == adapters
    assert len(adapters) == 2 * 2 * (4 + 4 + 2)  # A and B of both attentions and the feed-forward layers of two blocks


@torch.no_grad()
def test_padding_is_seen() -> None:
    network, x, t, cond = tiny_wan_transformer(), clips(), torch.tensor([0.3, 0.9]), conditions()
    longer = {"encoder_hidden_states": torch.cat([cond["encoder_hidden_states"], torch.zeros(2, 3, 16)], 1)}
    change = FAMILY.call(network, x, t, longer) - FAMILY.call(network, x, t, cond)
    assert change.abs().max() > 1e-3


def test_jvp_equals_differences() -> None:
    assert jvp_error(FAMILY, tiny_wan_transformer(), clips(), conditions()) < 1e-3


def test_times_stay_distinct_under_autocast() -> None:
    assert distinct_times(FAMILY, tiny_wan_transformer(), clips(), conditions()) == 100
