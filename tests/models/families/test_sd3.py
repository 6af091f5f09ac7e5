"""Stable Diffusion 3: calls, text and latents are those of the stock pipeline."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from flow_checks import adapted, distinct_times, euler, jvp_error
from tiny_flow import tiny_sd3, tiny_sd3_transformer
from torch import Tensor

from cm_diffusers.diffusion.guidance import Conditions
from cm_diffusers.diffusion.process import RectifiedFlow
from cm_diffusers.models.families.base import family_of
from cm_diffusers.models.families.sd3 import FAMILY


PROMPTS = ["a photo of a bag", "an ankle boot"]


def noise() -> Tensor:
    return torch.randn(2, 4, 8, 8)


def conditions() -> Conditions:
    return {"encoder_hidden_states": torch.randn(2, 6, 48), "pooled_projections": torch.randn(2, 40)}


def sampled(pipeline: StableDiffusion3Pipeline, x: Tensor, **arguments: object) -> Tensor:
    return pipeline(PROMPTS, latents=x.clone(), num_inference_steps=4, **{"output_type": "latent", **arguments}).images


def test_the_network_has_this_family() -> None:
    pipeline = tiny_sd3()
    assert family_of(pipeline.transformer) is FAMILY
    assert FAMILY.pipeline(pipeline.transformer) == type(pipeline).__name__
    assert FAMILY.guidance(pipeline.transformer) == "cfg"
    assert FAMILY.student is None
    assert FAMILY.process(pipeline) == RectifiedFlow()
    assert FAMILY.prediction_type(pipeline) == "flow_prediction"


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_pipeline_is_our_loop(scale: float) -> None:
    pipeline, x = tiny_sd3(), noise()
    wanted = sampled(pipeline, x, **FAMILY.guided(scale))
    with torch.no_grad():
        cond, uncond = FAMILY.encode(pipeline, PROMPTS), FAMILY.encode(pipeline, ["", ""])
    found = euler(FAMILY, pipeline.transformer, x, pipeline.scheduler.sigmas, cond, uncond, scale)
    assert (found - wanted).abs().max() < 1e-5


@torch.no_grad()
def test_text_is_both_towers_then_zeros_for_a_missing_t5() -> None:
    pipeline = tiny_sd3()
    found = FAMILY.encode(pipeline, [*PROMPTS, ""])
    states, pooled = found["encoder_hidden_states"], found["pooled_projections"]
    assert states.shape == (3, 16 + 256, 48)
    assert not states[:, 16:].any()
    assert not states[:, :16, 40:].any()  # the towers are narrower than what the network reads
    for tower, columns in ((pipeline.text_encoder, slice(16)), (pipeline.text_encoder_2, slice(16, 40))):
        ids = pipeline.tokenizer([*PROMPTS, ""], padding="max_length", return_tensors="pt").input_ids
        told = tower(ids, output_hidden_states=True)
        assert torch.equal(states[:, :16, columns], told.hidden_states[-2])
        assert torch.equal(pooled[:, columns], told.text_embeds)


@torch.no_grad()
def test_latents_are_those_of_the_pipeline() -> None:
    pipeline, x = tiny_sd3(), noise()
    latents = FAMILY.latents(pipeline.vae)
    pixels = latents.decode(pipeline.vae, sampled(pipeline, x, guidance_scale=1.0))
    shown = sampled(pipeline, x, guidance_scale=1.0, output_type="pt")
    assert torch.allclose((pixels / 2 + 0.5).clamp(0, 1), shown, atol=1e-5)
    mean, std = latents.encode(pipeline.vae, pixels)
    posterior = pipeline.vae.encode(pixels).latent_dist
    assert torch.equal(mean, posterior.mean)
    assert torch.equal(std, posterior.std)
    assert torch.allclose(latents.of_network(mean), (mean - 0.25) * 0.5)
    assert latents.downscale == pipeline.vae_scale_factor


def test_gradient_reaches_adapters_only() -> None:
    moved, adapters = adapted(FAMILY, tiny_sd3_transformer(), noise(), conditions())
    unread = {name for name in adapters if name.startswith("transformer_blocks.1.attn.add_q_proj")}
    assert moved == adapters - unread  # nothing reads what the last block's text attends to
    first, last = 8 + 4 + 4 + 2, 7 + 2 + 2  # attention, the second of it, feed-forward layers, modulations
    assert len(adapters) == 2 * (first + last)


@torch.no_grad()
def test_padding_is_seen() -> None:
    network, x, t, cond = tiny_sd3_transformer(), noise(), torch.tensor([0.3, 0.9]), conditions()
    states = cond["encoder_hidden_states"]
    longer = cond | {"encoder_hidden_states": torch.cat([states, torch.zeros(2, 3, 48)], 1)}
    assert (FAMILY.call(network, x, t, longer) - FAMILY.call(network, x, t, cond)).abs().max() > 1e-4


def test_jvp_equals_differences() -> None:
    assert jvp_error(FAMILY, tiny_sd3_transformer(), noise(), conditions()) < 1e-3


def test_times_stay_distinct_under_autocast() -> None:
    assert distinct_times(FAMILY, tiny_sd3_transformer(), noise(), conditions()) == 100
