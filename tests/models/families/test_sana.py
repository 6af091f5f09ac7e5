"""Sana and SANA-Sprint: calls, text, latents and students are those of the stock pipelines."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import SanaPipeline, SanaSprintPipeline
from flow_checks import adapted, distinct_times, euler, jvp_error, predict
from peft import get_peft_model_state_dict
from tiny_flow_a import tiny_sana, tiny_sana_transformer, tiny_sprint
from torch import Tensor

from cm_diffusers.diffusion.guidance import Conditions
from cm_diffusers.errors import UserError
from cm_diffusers.models.adapters import WithoutAdapters
from cm_diffusers.models.families.base import family_of
from cm_diffusers.models.families.sana import FAMILY
from cm_diffusers.models.students import StudentConfig, make_student


PROMPTS = ["a photo of a bag", "an ankle boot"]
SIZE = {"height": 32, "width": 32, "use_resolution_binning": False, "output_type": "latent"}


def noise() -> Tensor:
    return torch.randn(2, 4, 8, 8)


def conditions(length: int = 6, guidance: float | None = None) -> Conditions:
    """The second prompt has two tokens less."""
    mask = torch.ones(2, length)
    mask[1, -2:] = 0
    told = {} if guidance is None else {"guidance": torch.full((2,), guidance)}
    return {"encoder_hidden_states": torch.randn(2, length, 16), "encoder_attention_mask": mask, **told}


def as_prompt(cond: Conditions) -> Conditions:
    names = {"prompt_embeds": "encoder_hidden_states", "prompt_attention_mask": "encoder_attention_mask"}
    return {name: cond[of_network] for name, of_network in names.items()}


def negative(cond: Conditions) -> Conditions:
    return {"negative_prompt": None, **{f"negative_{name}": value for name, value in as_prompt(cond).items()}}


def sampled(pipeline: SanaPipeline | SanaSprintPipeline, x: Tensor, **arguments: object) -> Tensor:
    return pipeline(**{**SIZE, **arguments}, latents=x.clone()).images


def test_the_network_has_this_family() -> None:
    network = tiny_sana_transformer()
    assert family_of(network) is FAMILY
    assert FAMILY.guidance(network) == "cfg"
    assert FAMILY.guidance(tiny_sana_transformer(guidance_embeds=True)) == "embedded"


@pytest.mark.parametrize("scale", [1.0, 4.5])
@pytest.mark.parametrize("timestep_scale", [1.0, 0.001])
def test_pipeline_is_our_loop(scale: float, timestep_scale: float) -> None:
    pipeline, x, cond, uncond = tiny_sana(timestep_scale=timestep_scale), noise(), conditions(), conditions()
    wanted = sampled(pipeline, x, **as_prompt(cond), **negative(uncond), num_inference_steps=4, guidance_scale=scale)
    found = euler(FAMILY, pipeline.transformer, x, pipeline.scheduler.sigmas, cond, uncond, scale)
    assert (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("steps", [1, 2])
def test_sprint_is_a_consistency_model_of_the_flow(steps: int) -> None:
    """Its pipeline's TrigFlow cancels: f = x - t v, and x_s = (1 - s) f + s z."""
    pipeline, x, cond, scale = tiny_sprint(), noise(), conditions(), 4.5
    options = {"intermediate_timesteps": 1.3 if steps == 2 else None, "num_inference_steps": steps}
    generator = torch.Generator().manual_seed(3)
    wanted = sampled(pipeline, x, **as_prompt(cond), **options, guidance_scale=scale, generator=generator)
    told = FAMILY.told(pipeline.transformer)(cond, torch.full((2,), scale - 1))
    generator, z, x0 = torch.Generator().manual_seed(3), x, torch.zeros_like(x)
    for theta in pipeline.scheduler.timesteps[:-1]:
        t = theta.sin() / (theta.sin() + theta.cos())
        x0 = predict(FAMILY, pipeline.transformer)((1 - t) * x0 + t * z, t.expand(2), told).x0.detach()
        z = torch.randn(x.shape, generator=generator)
    assert (x0 - wanted).abs().max() < 3e-5


@pytest.mark.parametrize("make", [tiny_sana, tiny_sprint])
def test_text_is_that_of_the_call(make: type) -> None:
    pipeline, x = make(), noise()
    with torch.no_grad():
        cond, uncond = FAMILY.encode(pipeline, PROMPTS), FAMILY.encode(pipeline, ["", ""])
    options = {"intermediate_timesteps": None} if make is tiny_sprint else negative(uncond)
    arguments = {"num_inference_steps": 1, "guidance_scale": 4.5}
    own = sampled(pipeline, x, **as_prompt(cond), **options, **arguments)
    options = {"intermediate_timesteps": None} if make is tiny_sprint else {}
    assert torch.equal(own, sampled(pipeline, x, prompt=PROMPTS, **options, **arguments))


def test_the_empty_prompt_has_no_instruction_among_others() -> None:
    pipeline = tiny_sana()
    with torch.no_grad():
        mixed, alone = FAMILY.encode(pipeline, ["a bag", "", "a coat"]), FAMILY.encode(pipeline, [""])
        wanted = pipeline.encode_prompt(["a bag"])
    assert mixed["encoder_hidden_states"].shape == (3, 300, 16)
    assert not torch.equal(mixed["encoder_hidden_states"][0], wanted[0][0])
    for found in (mixed["encoder_hidden_states"][1], alone["encoder_hidden_states"][0]):
        assert torch.equal(found, wanted[2][0])
    for found in (mixed["encoder_attention_mask"][1], alone["encoder_attention_mask"][0]):
        assert torch.equal(found, wanted[3][0])


@torch.no_grad()
def test_latents_are_those_of_the_pipeline() -> None:
    pipeline, x = tiny_sana(), noise()
    latents, cond = FAMILY.latents(pipeline.vae), conditions()
    arguments = {**as_prompt(cond), "num_inference_steps": 1, "guidance_scale": 1.0}
    images = sampled(pipeline, x, **arguments, output_type="pt")
    pixels = latents.decode(pipeline.vae, sampled(pipeline, x, **arguments))
    assert torch.allclose((pixels / 2 + 0.5).clamp(0, 1), images, atol=1e-6)
    mean, std = latents.encode(pipeline.vae, pixels)
    assert torch.equal(latents.of_network(mean), 0.41407 * pipeline.vae.encode(pixels).latent)
    assert torch.allclose(latents.of_vae(latents.of_network(mean)), mean)
    assert std.shape == (2, 4, 8, 8)
    assert not std.any()
    assert latents.downscale == 4


def test_a_student_has_guidance_in_its_weights() -> None:
    """By default, too: Sana's pipeline tells none, and Sprint's tells times that Sana's teachers do not know."""
    teacher, x, t, cond = tiny_sana_transformer(), noise(), torch.tensor([0.3, 1.0]), conditions()
    student = make_student(teacher, StudentConfig().guidance_embedding_dim(teacher))
    assert FAMILY.pipeline(student) == "SanaPipeline"
    assert torch.equal(FAMILY.call(student, x, t, cond), FAMILY.call(teacher, x, t, cond))
    assert {id(value) for value in student.parameters()}.isdisjoint({id(value) for value in teacher.parameters()})
    assert all(value.requires_grad for value in student.parameters())


def test_sprint_is_no_teacher() -> None:
    FAMILY.check("here", tiny_sana())
    with pytest.raises(UserError, match="here is a SanaSprintPipeline that is distilled to few steps already"):
        FAMILY.check("here", tiny_sprint())


@pytest.mark.parametrize("sprint", [False, True])
def test_gradient_reaches_adapters_only(sprint: bool) -> None:
    network = (tiny_sprint() if sprint else tiny_sana()).transformer
    moved, adapters = adapted(FAMILY, network, noise(), conditions(guidance=0.45 if sprint else None))
    assert moved == adapters
    assert len(adapters) == 2 * (2 * (4 + 4 + 2) + 1)  # A and B of both attentions, convolutions and the time's layer


def test_adapters_survive_the_stock_loader(tmp_path: Path) -> None:
    pipeline, x, t, cond = tiny_sana(), noise(), torch.tensor([0.3, 1.0]), conditions()
    fresh = copy.deepcopy(pipeline.transformer)
    adapted(FAMILY, pipeline.transformer, x, cond)
    wanted = FAMILY.call(pipeline.transformer.eval(), x, t, cond)
    pipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer))
    loaded = tiny_sana(transformer=fresh)
    loaded.load_lora_weights(tmp_path, use_safetensors=True)
    assert torch.allclose(FAMILY.call(fresh, x, t, cond), wanted, atol=1e-6)


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    network, x, t, cond = tiny_sana_transformer(), noise(), torch.tensor([0.3, 0.9]), conditions()
    longer = {
        "encoder_hidden_states": torch.cat([cond["encoder_hidden_states"], torch.randn(2, 3, 16)], 1),
        "encoder_attention_mask": torch.cat([cond["encoder_attention_mask"], torch.zeros(2, 3)], 1),
    }
    assert torch.allclose(FAMILY.call(network, x, t, longer), FAMILY.call(network, x, t, cond), atol=1e-6)


@pytest.mark.parametrize("sprint", [False, True])
def test_jvp_equals_differences(sprint: bool) -> None:
    network = (tiny_sprint() if sprint else tiny_sana()).transformer
    assert jvp_error(FAMILY, network, noise(), conditions(guidance=0.45 if sprint else None)) < 1e-3


def test_adapters_can_be_off() -> None:
    network, x, t, cond = tiny_sana_transformer(), noise(), torch.tensor([0.3, 1.0]), conditions()
    wanted = FAMILY.call(network, x, t, cond)
    adapted(FAMILY, network, x, cond)
    assert torch.equal(FAMILY.call(WithoutAdapters(network), x, t, cond), wanted)
    assert not torch.equal(FAMILY.call(network, x, t, cond), wanted)


def test_the_time_is_known_behind_the_wrapper_of_several_devices() -> None:
    network, x, t, cond = tiny_sana_transformer(), noise(), torch.tensor([0.3, 1.0]), conditions()
    assert torch.equal(FAMILY.call(torch.nn.DataParallel(network), x, t, cond), FAMILY.call(network, x, t, cond))


def test_times_stay_distinct_under_autocast() -> None:
    assert distinct_times(FAMILY, tiny_sana_transformer(), noise(), conditions()) == 100
