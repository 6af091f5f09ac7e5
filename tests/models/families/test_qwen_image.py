"""Qwen-Image: equal to its stock pipeline, with the guidance that keeps each token's length."""

import diffusers
import pytest
import torch
from diffusers import QwenImagePipeline
from flow_checks import PROMPTS, adapted, branches, check_latents, euler, jvp_error, without_adapters
from tiny_flow_b import tiny_qwen_image

from cm_diffusers.diffusion.process import Prediction
from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import family_of
from cm_diffusers.models.families.qwen_image import FAMILY
from cm_diffusers.models.families.shared import pack
from cm_diffusers.models.students import make_student


@pytest.fixture
def pipe() -> QwenImagePipeline:
    return tiny_qwen_image()


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))


def packed(latents: torch.Tensor) -> torch.Tensor:
    return QwenImagePipeline._pack_latents(latents[:, None], *latents.shape)


def test_it_is_found_by_the_class_of_the_network(pipe: QwenImagePipeline) -> None:
    assert family_of(pipe.transformer) is FAMILY
    assert getattr(diffusers, FAMILY.pipeline(pipe.transformer)) is QwenImagePipeline
    assert FAMILY.guidance(pipe.transformer) == "cfg"


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_steps_along_its_velocity_are_those_of_the_stock_pipeline(
    pipe: QwenImagePipeline, scale: float, noise: torch.Tensor
) -> None:
    sizes = {"height": 32, "width": 48, "num_inference_steps": 3}
    stock = pipe(PROMPTS, **sizes, latents=packed(noise), output_type="latent", **FAMILY.guided(scale)).images
    ours = euler(FAMILY, pipe.transformer, noise, pipe.scheduler.sigmas, *branches(FAMILY, pipe), scale)
    torch.testing.assert_close(packed(ours), stock, rtol=0, atol=1e-5)


def test_guidance_keeps_the_length_of_each_tokens_velocity() -> None:
    generator = torch.Generator().manual_seed(0)
    x_t, t, w = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([0.2, 1.0]), torch.tensor([3.0, 0.0])
    velocities = torch.randn(2, 2, 4, 8, 8, generator=generator).unbind()
    at = t.view(-1, 1, 1, 1)
    branch, other = (Prediction(x_t - at * v, x_t + (1 - at) * v) for v in velocities)
    guided = FAMILY.combine(branch, other, w, t)
    velocity, lengths = (
        guided.noise - guided.x0,
        [pack(v).norm(dim=-1) for v in (guided.noise - guided.x0, velocities[0])],
    )
    torch.testing.assert_close(lengths[0], lengths[1])
    torch.testing.assert_close((1 - at) * guided.x0 + at * guided.noise, x_t)
    direction = velocities[0] + 3 * (velocities[0] - velocities[1])
    cosine = torch.cosine_similarity(pack(velocity)[0], pack(direction)[0], dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    torch.testing.assert_close(velocity[1], velocities[0][1])  # w = 0


def test_packing_is_the_pipelines(noise: torch.Tensor) -> None:
    assert torch.equal(pack(noise), packed(noise))


@torch.no_grad()
def test_text_is_encoded_as_by_a_call_of_the_pipeline(pipe: QwenImagePipeline) -> None:
    states, mask = pipe.encode_prompt(PROMPTS, max_sequence_length=512)
    encoded = FAMILY.encode(pipe, PROMPTS)
    assert encoded["prompt_embeds"].shape == (2, 512, 16)  # the same for any prompts, as caches need
    assert torch.equal(encoded["prompt_embeds"][:, : states.shape[1]], states)
    assert torch.equal(encoded["prompt_embeds_mask"][:, : states.shape[1]], mask.bool())
    assert not encoded["prompt_embeds"][:, states.shape[1] :].any()
    assert not encoded["prompt_embeds_mask"][:, states.shape[1] :].any()
    assert mask.sum(1).diff().item() == len(PROMPTS[1]) - len(PROMPTS[0])
    alone = FAMILY.encode(pipe, PROMPTS[:1])  # where the pipeline says no mask
    assert torch.equal(alone["prompt_embeds_mask"], encoded["prompt_embeds_mask"][:1])
    assert FAMILY.encode(pipe, ["a" * 600])["prompt_embeds_mask"].all()


@torch.no_grad()
def test_a_row_is_the_same_alone_and_beside_a_longer_prompt(pipe: QwenImagePipeline, noise: torch.Tensor) -> None:
    both, t = FAMILY.encode(pipe, ["a", "a photo of an ankle boot and a bag and a coat"]), torch.tensor([0.3, 0.8])
    alone = FAMILY.call(pipe.transformer, noise[:1], t[:1], FAMILY.encode(pipe, ["a"]))
    torch.testing.assert_close(FAMILY.call(pipe.transformer, noise, t, both)[:1], alone)


@torch.no_grad()
def test_latents_are_the_pipelines(pipe: QwenImagePipeline, noise: torch.Tensor) -> None:
    latents, vae = FAMILY.latents(pipe.vae), pipe.vae
    check_latents(latents, vae)
    assert latents.downscale == 4
    pixels = torch.rand(2, 3, 32, 32)
    posterior = vae.encode(pixels[:, :, None]).latent_dist
    assert torch.equal(latents.encode(vae, pixels)[0][:, :, None], posterior.mode())
    assert torch.equal(latents.encode(vae, pixels)[1][:, :, None], posterior.std)
    mean, std = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([0.5, 1.0, 2.0, 1.5])
    raw = noise[:, :, None] * std.view(-1, 1, 1, 1) + mean.view(-1, 1, 1, 1)
    torch.testing.assert_close(latents.decode(vae, noise), vae.decode(raw).sample[:, :, 0])


def test_adapters_are_on_attention_and_feed_forward_layers(pipe: QwenImagePipeline, noise: torch.Tensor) -> None:
    """Nothing reads the text after the last block: what only makes that has none, for it gets no gradient."""
    moved, adapters = adapted(FAMILY, pipe.transformer, noise, branches(FAMILY, pipe)[0])
    modulations = {f"transformer_blocks.{block}.{kind}_mod.1" for block in (0, 1) for kind in ("img", "txt")}
    last = "attn.add_q_proj attn.to_add_out txt_mlp.net.0.proj txt_mlp.net.2".split()
    silent = {f"transformer_blocks.1.{name}" for name in last}
    assert without_adapters(pipe.transformer, "transformer_blocks") == modulations | silent
    assert moved == adapters


def test_all_of_a_whole_student_that_trains_gets_a_gradient(pipe: QwenImagePipeline, noise: torch.Tensor) -> None:
    """Several processes would wait for the others."""
    student = make_student(pipe.transformer, None)
    FAMILY.call(student, noise, torch.tensor([0.3, 0.8]), branches(FAMILY, pipe)[0]).square().mean().backward()
    values = list(student.parameters())
    assert all((value.grad is not None) == value.requires_grad for value in values)
    assert sum(not value.requires_grad for value in values) == 8


def test_forward_mode_derivatives_are_those_of_differences(pipe: QwenImagePipeline, noise: torch.Tensor) -> None:
    assert jvp_error(FAMILY, pipe.transformer, noise, branches(FAMILY, pipe)[0]) < 1e-3


def test_guidance_embeds_are_refused_for_no_layer_reads_them(pipe: QwenImagePipeline) -> None:
    FAMILY.check("qwen", pipe)
    with pytest.raises(UserError, match="The transformer of qwen has guidance_embeds"):
        FAMILY.check("qwen", tiny_qwen_image(guidance_embeds=True))
