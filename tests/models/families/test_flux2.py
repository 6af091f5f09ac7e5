"""FLUX.2: dev is told its guidance, klein is guided by a second pass; both equal to their stock pipelines."""

import diffusers
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from flow_checks import PROMPTS, adapted, branches, brief, check_latents, euler, jvp_error, without_adapters
from tiny_flow_b import tiny_flux2, tiny_klein

from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import family_of
from cm_diffusers.models.families.flux2 import FAMILY
from cm_diffusers.models.families.shared import tokens, untokened


SIZES = {"height": 32, "width": 48, "num_inference_steps": 3}


@pytest.fixture
def klein() -> Flux2KleinPipeline:
    return tiny_klein()


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(1))


def test_dev_and_klein_share_a_class_but_no_pipeline(klein: Flux2KleinPipeline) -> None:
    dev = tiny_flux2()
    for pipe, guidance in ((klein, "cfg"), (dev, "embedded")):
        assert family_of(pipe.transformer) is FAMILY
        assert getattr(diffusers, FAMILY.pipeline(pipe.transformer)) is type(pipe)
        assert FAMILY.guidance(pipe.transformer) == guidance


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_steps_along_devs_velocity_are_those_of_its_pipeline(scale: float, noise: torch.Tensor) -> None:
    pipe = tiny_flux2()
    stock = pipe(prompt=PROMPTS, **SIZES, latents=noise, output_type="latent", **FAMILY.guided(scale)).images
    told = FAMILY.told(pipe.transformer)(branches(FAMILY, pipe)[0], torch.full((2,), scale - 1))
    ours = euler(FAMILY, pipe.transformer, noise, pipe.scheduler.sigmas, told, told, 1.0)
    torch.testing.assert_close(tokens(ours), stock, rtol=0, atol=1e-5)


def test_the_guidance_that_dev_is_told_changes_its_output(noise: torch.Tensor) -> None:
    pipe, t = tiny_flux2(), torch.tensor([0.3, 0.8])
    cond, _ = branches(FAMILY, pipe)
    outputs = [
        FAMILY.call(pipe.transformer, noise, t, FAMILY.told(pipe.transformer)(cond, torch.full((2,), w)))
        for w in (0.0, 2.5)
    ]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_steps_along_kleins_velocity_are_those_of_its_pipeline(
    klein: Flux2KleinPipeline, scale: float, noise: torch.Tensor
) -> None:
    stock = klein(prompt=PROMPTS, **SIZES, latents=noise, output_type="latent", **FAMILY.guided(scale)).images
    ours = euler(FAMILY, klein.transformer, noise, klein.scheduler.sigmas, *branches(FAMILY, klein), scale)
    latents = FAMILY.latents(klein.vae)
    torch.testing.assert_close(klein._unpatchify_latents(latents.of_vae(ours)), stock, rtol=0, atol=2e-5)


def test_tokens_are_the_pipelines_and_can_be_undone(noise: torch.Tensor) -> None:
    assert torch.equal(tokens(noise), Flux2Pipeline._pack_latents(noise))
    assert torch.equal(untokened(tokens(noise), 4, 6), noise)


@torch.no_grad()
@pytest.mark.parametrize(("tiny", "size"), [(tiny_flux2, 24), (tiny_klein, 24)])
def test_text_is_encoded_as_by_a_call_of_the_pipeline(tiny: type, size: int) -> None:
    pipe = tiny()
    states, _ = pipe.encode_prompt(PROMPTS)
    assert states.shape == (2, 512, size)
    assert torch.equal(FAMILY.encode(pipe, PROMPTS)["prompt_embeds"], states)


@torch.no_grad()
def test_latents_are_the_pipelines(klein: Flux2KleinPipeline, noise: torch.Tensor) -> None:
    latents, vae = FAMILY.latents(klein.vae), klein.vae
    check_latents(latents, vae)
    assert latents.downscale == 8
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = latents.encode(vae, pixels)
    torch.testing.assert_close(latents.of_network(mean), klein._encode_vae_image(pixels, None))
    assert torch.equal(klein._unpatchify_latents(std), vae.encode(pixels).latent_dist.std)
    spread = (vae.bn.running_var + 1e-4).sqrt().view(1, -1, 1, 1)
    raw = klein._unpatchify_latents(noise * spread + vae.bn.running_mean.view(1, -1, 1, 1))
    torch.testing.assert_close(latents.decode(vae, noise), vae.decode(raw).sample)


def test_adapters_are_on_every_layer_of_the_blocks(klein: Flux2KleinPipeline, noise: torch.Tensor) -> None:
    """The single blocks, too: their layers have names of their own."""
    moved, adapters = adapted(FAMILY, klein.transformer, noise, brief(branches(FAMILY, klein)[0]))
    assert moved == adapters
    assert len(adapters) == 2 * (2 * 12 + 2 * 2)  # A and B of two double blocks and two single ones
    assert without_adapters(klein.transformer, "transformer_blocks", "single_transformer_blocks") == set()


def test_forward_mode_derivatives_are_those_of_differences(klein: Flux2KleinPipeline, noise: torch.Tensor) -> None:
    assert jvp_error(FAMILY, klein.transformer, noise, brief(branches(FAMILY, klein)[0])) < 1e-3


def test_a_klein_that_is_distilled_already_is_no_teacher(klein: Flux2KleinPipeline) -> None:
    FAMILY.check("base", klein)
    with pytest.raises(UserError, match="fast is a Flux2KleinPipeline that is distilled to few steps already"):
        FAMILY.check("fast", tiny_klein(is_distilled=True))
