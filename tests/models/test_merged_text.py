"""Equal zeros at the end of a text are computed once, and nothing changes but the time that takes."""

import copy
from pathlib import Path

import pytest
import torch
from tiny_flow import tiny_sd3, tiny_sd3_transformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cm_diffusers.diffusion.guidance import Conditions
from cm_diffusers.models.families.sd3 import FAMILY
from cm_diffusers.models.merged_text import merge_zero_text, merge_zeros, merges_zeros, silent_t5, silent_tokenizer
from cm_diffusers.models.teachers import TeacherConfig, load_network, load_teacher, release_encoders


T = torch.tensor([0.3, 0.9])


def conditions(words: int = 5, zeros: int = 256) -> Conditions:
    states = torch.cat([torch.randn(2, words, 48), torch.zeros(2, zeros, 48)], 1)
    return {"encoder_hidden_states": states, "pooled_projections": torch.randn(2, 40)}


def gradients(network: nn.Module, x: Tensor, cond: Conditions) -> list[Tensor]:
    output = FAMILY.call(network, x, T, cond)
    return [output, *torch.autograd.grad(output.square().mean(), list(network.parameters()), allow_unused=True)]


@pytest.mark.parametrize("zeros", [0, 1, 256])
@pytest.mark.parametrize("normed", [None, "rms_norm"])
def test_outputs_and_gradients_stay(zeros: int, normed: str | None) -> None:
    network, x, cond = tiny_sd3_transformer(qk_norm=normed), torch.randn(2, 4, 8, 8), conditions(zeros=zeros)
    merged = copy.deepcopy(network)
    merge_zeros(merged)
    for wanted, found in zip(gradients(network, x, cond), gradients(merged, x, cond), strict=True):
        assert (wanted is None) == (found is None)
        if wanted is not None:
            assert torch.allclose(found, wanted, atol=2e-6, rtol=1e-4)


def test_texts_of_a_batch_keep_the_words_of_the_longest() -> None:
    network, x, cond = tiny_sd3_transformer(), torch.randn(2, 4, 8, 8), conditions()
    cond["encoder_hidden_states"][0, 2:] = 0
    with torch.no_grad():
        wanted = FAMILY.call(network, x, T, cond)
        merge_zeros(network)
        assert torch.allclose(FAMILY.call(network, x, T, cond), wanted, atol=2e-6)


@torch.no_grad()
def test_a_text_of_zeros_alone_is_one_token() -> None:
    network, x, cond = tiny_sd3_transformer(), torch.randn(2, 4, 8, 8), conditions(words=0)
    wanted = FAMILY.call(network, x, T, cond)
    merge_zeros(network)
    assert torch.allclose(FAMILY.call(network, x, T, cond), wanted, atol=2e-6)


@torch.no_grad()
def test_a_pipeline_draws_the_same_from_a_tenth_of_the_tokens() -> None:
    pipeline, x, lengths = tiny_sd3(), torch.randn(2, 4, 8, 8), []
    arguments = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
    wanted = pipeline(["a bag", "a coat"], latents=x, **arguments).images
    merge_zero_text(pipeline)
    pipeline.transformer.context_embedder.register_forward_hook(lambda _, args, out: lengths.append(out.shape[1]))
    found = pipeline(["a bag", "a coat"], latents=x, **arguments).images
    assert torch.allclose(found, wanted, atol=1e-5)
    assert set(lengths) == {16 + 1}


@pytest.mark.parametrize("speaks", [False, True])
def test_a_t5_that_says_something_is_heard(speaks: bool) -> None:
    tower = silent_t5(48)
    if speaks:
        tower.encoder.final_layer_norm.weight.data.fill_(1)
    pipeline = tiny_sd3(text_encoder_3=tower)
    before = pipeline.transformer.attn_processors
    merge_zero_text(pipeline)
    assert (pipeline.transformer.attn_processors == before) == speaks


@torch.no_grad()
def test_a_silent_t5_says_what_none_does() -> None:
    said = []
    for parts in ({}, {"text_encoder_3": silent_t5(48), "tokenizer_3": silent_tokenizer()}):
        said.append(FAMILY.encode(tiny_sd3(**parts), ["a bag", ""])["encoder_hidden_states"])
    assert torch.equal(*said)


@torch.no_grad()
def test_a_second_time_and_on_a_copy_it_is_the_same() -> None:
    network, x, cond = tiny_sd3_transformer(), torch.randn(2, 4, 8, 8), conditions()
    wanted = FAMILY.call(network, x, T, cond)
    for _ in range(2):
        merge_zeros(network)
        network = copy.deepcopy(network)
    assert torch.allclose(FAMILY.call(network, x, T, cond), wanted, atol=2e-6)


def test_recomputed_activations_count_as_they_did() -> None:
    """Another text may pass the network between forward and backward pass."""
    network, x, cond, other = tiny_sd3_transformer(), torch.randn(2, 4, 8, 8), conditions(), conditions(zeros=2)
    wanted = gradients(network, x, cond)[1:]
    merge_zeros(network.train())
    network.enable_gradient_checkpointing()
    loss = FAMILY.call(network, x, T, cond).square().mean()
    FAMILY.call(network, x, T, other)
    found = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    assert all(torch.allclose(a, b, atol=2e-6) for a, b in zip(found, wanted, strict=True) if b is not None)


def test_forward_mode_derivatives_stay() -> None:
    network, x, cond = tiny_sd3_transformer().double(), torch.randn(2, 4, 8, 8).double(), conditions()
    cond = {name: value.double() for name, value in cond.items()}

    def derivative() -> Tensor:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(lambda x_t: FAMILY.call(network, x_t, T, cond), (x,), (x.cos(),))[1]

    wanted = derivative()
    merge_zeros(network)
    assert torch.allclose(derivative(), wanted, atol=1e-6)


def test_a_network_that_is_loaded_late_merges_too(tmp_path: Path) -> None:
    tiny_sd3(text_encoder_3=silent_t5(48), tokenizer_3=silent_tokenizer()).save_pretrained(tmp_path)
    config = TeacherConfig(str(tmp_path))
    teacher = load_teacher(config, late=True)
    release_encoders(teacher)
    load_network(teacher, config)
    assert merges_zeros(teacher.transformer)
    assert not next(teacher.transformer.parameters()).is_meta
