"""Flux.1: equal to its stock pipeline, told its guidance."""

import diffusers
import pytest
import torch
from diffusers import FluxPipeline
from flow_checks import PROMPTS, adapted, branches, brief, check_latents, euler, jvp_error, without_adapters
from tiny_flow_b import tiny_flux

from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import family_of
from cm_diffusers.models.families.flux import FAMILY
from cm_diffusers.models.families.shared import pack, unpack


@pytest.fixture
def pipe() -> FluxPipeline:
    return tiny_flux()


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))


def packed(latents: torch.Tensor) -> torch.Tensor:
    return FluxPipeline._pack_latents(latents, *latents.shape)


def test_it_is_found_by_the_class_of_the_network(pipe: FluxPipeline) -> None:
    assert family_of(pipe.transformer) is FAMILY
    assert getattr(diffusers, FAMILY.pipeline(pipe.transformer)) is FluxPipeline


@pytest.mark.parametrize(("embeds", "scale"), [(True, 3.5), (True, 1.0), (False, 1.0)])
def test_steps_along_its_velocity_are_those_of_the_stock_pipeline(
    embeds: bool, scale: float, noise: torch.Tensor
) -> None:
    pipe = tiny_flux(guidance_embeds=embeds)
    sizes = {"height": 32, "width": 48, "num_inference_steps": 3}
    stock = pipe(PROMPTS, **sizes, latents=packed(noise), output_type="latent", **FAMILY.guided(scale)).images
    cond, _ = branches(FAMILY, pipe)
    if FAMILY.guidance(pipe.transformer) == "embedded":
        cond = FAMILY.told(pipe.transformer)(cond, torch.full((2,), scale - 1))
    ours = euler(FAMILY, pipe.transformer, noise, pipe.scheduler.sigmas, cond, cond, 1.0)
    torch.testing.assert_close(packed(ours), stock, rtol=0, atol=1e-5)


def test_guidance_is_a_number_that_dev_is_told_and_schnell_is_not(pipe: FluxPipeline, noise: torch.Tensor) -> None:
    cond, t = branches(FAMILY, pipe)[0], torch.tensor([0.3, 0.8])
    outputs = [
        FAMILY.call(pipe.transformer, noise, t, FAMILY.told(pipe.transformer)(cond, torch.full((2,), w)))
        for w in (0.0, 2.5)
    ]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    assert FAMILY.told(pipe.transformer)(cond, torch.tensor([2.5]))["guidance"] == 3.5
    assert FAMILY.guidance(pipe.transformer) == "embedded"
    assert FAMILY.guidance(tiny_flux(guidance_embeds=False).transformer) == "none"


def test_packing_is_the_pipelines_and_can_be_undone(noise: torch.Tensor) -> None:
    assert torch.equal(pack(noise), packed(noise))
    assert torch.equal(unpack(pack(noise), noise), noise)
    assert torch.equal(unpack(packed(noise), noise), FluxPipeline._unpack_latents(packed(noise), 32, 48, 4))


@torch.no_grad()
def test_text_is_encoded_as_by_a_call_of_the_pipeline(pipe: FluxPipeline) -> None:
    states, pooled, _ = pipe.encode_prompt(PROMPTS, None)
    encoded = FAMILY.encode(pipe, PROMPTS)
    assert encoded.keys() == {"prompt_embeds", "pooled_prompt_embeds"}
    assert torch.equal(encoded["prompt_embeds"], states)
    assert torch.equal(encoded["pooled_prompt_embeds"], pooled)
    assert states.shape == (2, 512, 16)


@torch.no_grad()
def test_latents_are_the_pipelines(pipe: FluxPipeline, noise: torch.Tensor) -> None:
    latents = FAMILY.latents(pipe.vae)
    check_latents(latents, pipe.vae)
    assert (latents.shift, latents.scale, latents.downscale, latents.patch) == (0.1, 0.5, 4, 2)
    pixels = torch.rand(2, 3, 32, 32)
    posterior = pipe.vae.encode(pixels).latent_dist
    assert torch.equal(latents.encode(pipe.vae, pixels)[0], posterior.mode())
    assert torch.equal(latents.encode(pipe.vae, pixels)[1], posterior.std)
    assert torch.equal(latents.decode(pipe.vae, noise), pipe.vae.decode(noise / 0.5 + 0.1).sample)


def test_adapters_are_on_attention_and_feed_forward_layers(pipe: FluxPipeline, noise: torch.Tensor) -> None:
    cond = FAMILY.told(pipe.transformer)(brief(branches(FAMILY, pipe)[0]), torch.tensor([0.0, 3.0]))
    moved, adapters = adapted(FAMILY, pipe.transformer, noise, cond)
    assert moved == adapters
    assert without_adapters(pipe.transformer, "transformer_blocks.0", "single_transformer_blocks") == {
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.norm1_context.linear",
        "single_transformer_blocks.0.norm.linear",
        "single_transformer_blocks.0.proj_mlp",
        "single_transformer_blocks.0.proj_out",
    }


def test_forward_mode_derivatives_are_those_of_differences(pipe: FluxPipeline, noise: torch.Tensor) -> None:
    cond = FAMILY.told(pipe.transformer)(brief(branches(FAMILY, pipe)[0]), torch.tensor([0.0, 3.0]))
    assert jvp_error(FAMILY, pipe.transformer, noise, cond) < 1e-3


def test_schnell_is_no_teacher(pipe: FluxPipeline) -> None:
    FAMILY.check("dev", pipe)
    with pytest.raises(UserError, match="schnell is a FluxPipeline that is distilled to few steps already"):
        FAMILY.check("schnell", tiny_flux(guidance_embeds=False))
