"""Equal zeros at the end of a text are computed once, and nothing changes but the time that takes."""

import copy
import math
from pathlib import Path

import pytest
import torch
from tiny_flow import tiny_sd3, tiny_sd3_transformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from cm_diffusers.data.encoders import Encoders
from cm_diffusers.diffusion.guidance import Conditions
from cm_diffusers.models.families.sd3 import FAMILY
from cm_diffusers.models.merged_text import (
    _weights,
    merge_zero_text,
    merge_zeros,
    merges_zeros,
    silent_t5,
    silent_tokenizer,
)
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
    whole = tiny_sd3().transformer
    x, cond = torch.randn(2, 4, 8, 8), conditions(words=16, zeros=256)
    with torch.no_grad():
        wanted = FAMILY.call(whole, x, T, cond)
        cond["encoder_hidden_states"] = cond["encoder_hidden_states"][:, :16]
        assert torch.allclose(FAMILY.call(teacher.transformer, x, T, cond), wanted, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_weighs_as_many_in_every_precision(dtype: torch.dtype) -> None:
    """log(256) in bfloat16 is that of 252."""
    for count in (2, 3, 100, 256, 333):
        added = _weights(torch.zeros(1, 1, 9, 4, dtype=dtype), count)[0, 0, 0].double()
        assert math.exp(added[-1] - added[0]) == pytest.approx(count, rel=1e-4)


class Waits(TorchDispatchMode):
    """Counts what a GPU's host would wait for: values that become numbers of Python."""

    count = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@torch.no_grad()
def test_conditions_of_training_leave_the_zeros_out_and_wait_for_nothing() -> None:
    pipeline, x = tiny_sd3(), torch.randn(2, 4, 8, 8)
    whole = FAMILY.encode(pipeline, ["a bag", ""])
    merge_zero_text(pipeline)
    cond = FAMILY.encode(pipeline, ["a bag", ""])
    assert whole["encoder_hidden_states"].shape[1] == 16 + 256
    assert torch.equal(cond["encoder_hidden_states"], whole["encoder_hidden_states"][:, :16])
    with Waits() as counted:
        wanted = FAMILY.call(pipeline.transformer, x, T, whole)
    assert counted.count == 1
    with Waits() as silent:
        found = FAMILY.call(pipeline.transformer, x, T, cond)
    assert torch.equal(found, wanted)
    assert silent.count == 0


def test_a_cache_of_texts_with_zeros_is_another() -> None:
    pipeline = tiny_sd3()
    before = Encoders.from_pipeline(pipeline).fingerprint
    merge_zero_text(pipeline)
    assert Encoders.from_pipeline(pipeline).fingerprint != before
