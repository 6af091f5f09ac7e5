"""Z-Image: equal to its stock pipeline, whose guidance scale is our w."""

import diffusers
import pytest
import torch
from diffusers import ZImagePipeline
from flow_checks import PROMPTS, adapted, branches, check_latents, euler, jvp_error, without_adapters
from tiny_flow_b import tiny_z_image

from cm_diffusers.models.families.base import family_of
from cm_diffusers.models.families.z_image import FAMILY


@pytest.fixture
def pipe() -> ZImagePipeline:
    return tiny_z_image()


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))


def test_it_is_found_by_the_class_of_the_network(pipe: ZImagePipeline) -> None:
    assert family_of(pipe.transformer) is FAMILY
    assert getattr(diffusers, FAMILY.pipeline(pipe.transformer)) is ZImagePipeline
    assert FAMILY.guidance(pipe.transformer) == "cfg"


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_steps_along_its_velocity_are_those_of_the_stock_pipeline(
    pipe: ZImagePipeline, scale: float, noise: torch.Tensor
) -> None:
    sizes = {"height": 32, "width": 48, "num_inference_steps": 3}
    stock = pipe(list(PROMPTS), **sizes, latents=noise, output_type="latent", **FAMILY.guided(scale)).images
    ours = euler(FAMILY, pipe.transformer, noise, pipe.scheduler.sigmas, *branches(FAMILY, pipe), scale)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)


def test_a_guidance_scale_of_ours_is_one_more_than_the_pipelines() -> None:
    assert FAMILY.guided(1.0) == {"guidance_scale": 0.0}
    assert FAMILY.guided(5.0) == {"guidance_scale": 4.0}


@torch.no_grad()
def test_text_is_encoded_as_by_a_call_of_the_pipeline(pipe: ZImagePipeline) -> None:
    prompts = list(PROMPTS)
    encoded = FAMILY.encode(pipe, prompts)
    assert prompts == PROMPTS  # the pipeline writes into its list
    assert encoded["prompt_embeds"].shape == (2, 512, 16)
    states, _ = pipe.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    assert [len(text) for text in states] == encoded["prompt_embeds_mask"].sum(1).tolist()
    for text, padded, mask in zip(states, encoded["prompt_embeds"], encoded["prompt_embeds_mask"], strict=True):
        assert torch.equal(padded[mask], text)
        assert not padded[~mask].any()


@torch.no_grad()
def test_a_row_is_the_same_alone_and_beside_a_longer_prompt(pipe: ZImagePipeline, noise: torch.Tensor) -> None:
    both = FAMILY.encode(pipe, ["a", "a photo of an ankle boot and a bag and a coat"])
    t = torch.tensor([0.3, 0.8])
    alone = FAMILY.call(pipe.transformer, noise[:1], t[:1], FAMILY.encode(pipe, ["a"]))
    torch.testing.assert_close(FAMILY.call(pipe.transformer, noise, t, both)[:1], alone)


@torch.no_grad()
def test_latents_are_the_pipelines(pipe: ZImagePipeline, noise: torch.Tensor) -> None:
    latents = FAMILY.latents(pipe.vae)
    check_latents(latents, pipe.vae)
    assert (latents.shift, latents.scale, latents.downscale) == (0.1, 0.5, 4)


def test_adapters_are_on_attention_and_feed_forward_layers(pipe: ZImagePipeline, noise: torch.Tensor) -> None:
    moved, adapters = adapted(FAMILY, pipe.transformer, noise, branches(FAMILY, pipe)[0])
    assert moved == adapters
    assert without_adapters(pipe.transformer, "layers", "noise_refiner", "context_refiner") == {
        "layers.0.adaLN_modulation.0",
        "layers.1.adaLN_modulation.0",
        "noise_refiner.0.adaLN_modulation.0",
    }


def test_forward_mode_derivatives_are_those_of_differences(pipe: ZImagePipeline, noise: torch.Tensor) -> None:
    assert jvp_error(FAMILY, pipe.transformer, noise, branches(FAMILY, pipe)[0]) < 1e-3
