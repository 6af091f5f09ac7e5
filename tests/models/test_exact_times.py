"""Times that are told in float32 are embedded in float32, in whatever precision a network computes."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from flow_checks import branches, distinct_times
from tiny_flow_b import tiny_flux, tiny_flux2, tiny_qwen_image
from torch import Tensor, nn

from cm_diffusers.diffusion.guidance import Conditions
from cm_diffusers.models.casting import cast
from cm_diffusers.models.exact_times import embed_exactly
from cm_diffusers.models.families.base import Family, family_of
from cm_diffusers.models.students import StudentConfig, make_networks
from cm_diffusers.models.teachers import TeacherConfig, load_network, load_teacher


PIPELINES = {"flux": tiny_flux, "qwen": tiny_qwen_image}
T = torch.tensor([0.7519, 0.9003])  # in bfloat16 0.75 and 0.8984


@pytest.fixture(params=PIPELINES.values(), ids=PIPELINES)
def pipe(request: pytest.FixtureRequest) -> DiffusionPipeline:
    return request.param()


def seen(pipe: DiffusionPipeline) -> tuple[Family, Tensor, Conditions]:
    family, network = family_of(pipe.transformer), pipe.transformer
    cond = branches(family, pipe)[0]
    if family.guidance(network) == "embedded":
        cond = family.told(network)(cond, torch.tensor([2.5, 2.53]))
    return family, torch.randn(2, 4, 8, 8), cond


@torch.no_grad()
def embedded(family: Family, network: nn.Module, x: Tensor, cond: Conditions) -> list[Tensor]:
    """What the layer of times answers under autocast: of the time, and of guidance where there is some."""
    found = []
    layer = network.get_submodule(family.rounded_time)
    hook = layer.register_forward_hook(lambda _, args, output: found.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        family.call(network, x, T, cond)
    hook.remove()
    return found


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_all_times_are_told_apart(pipe: DiffusionPipeline, weights: torch.dtype) -> None:
    family, x, cond = seen(pipe)
    network = cast(pipe.transformer, weights)
    assert distinct_times(family, network, x, cond) < 30
    embed_exactly(network)
    assert distinct_times(family, network, x, cond) >= 99


def test_the_time_is_as_in_float32_and_guidance_as_before(pipe: DiffusionPipeline) -> None:
    family, x, cond = seen(pipe)
    layer = pipe.transformer.get_submodule(family.rounded_time)
    exact = layer(T * (1000 / layer.scale))
    rounded, *before = embedded(family, cast(pipe.transformer, torch.bfloat16), x, cond)
    assert (rounded - exact).abs().max() > 0.1
    embed_exactly(pipe.transformer)
    for network in (pipe.transformer, copy.deepcopy(pipe.transformer)):
        time, *guidance = embedded(family, network, x, cond)
        assert torch.equal(time, exact)
        assert len(guidance) == len(before) == ("guidance" in cond)
        assert all(torch.equal(*pair) for pair in zip(guidance, before, strict=True))


@torch.no_grad()
def test_in_float32_nothing_changes(pipe: DiffusionPipeline) -> None:
    family, x, cond = seen(pipe)
    wanted = family.call(pipe.transformer, x, T, cond)
    embed_exactly(pipe.transformer)
    assert torch.equal(family.call(pipe.transformer, x, T, cond), wanted)


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
@pytest.mark.parametrize("lora", [True, False])
def test_loaded_teachers_and_their_students_do(
    make: Callable[[], DiffusionPipeline], lora: bool, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    config = TeacherConfig(str(tmp_path))
    pipe = load_teacher(config, late=True)
    family, x, cond = seen(pipe)
    load_network(pipe, config)
    layer = copy.deepcopy(pipe.transformer.get_submodule(family.rounded_time))
    exact = layer(T * (1000 / layer.scale))
    nets = make_networks(pipe.transformer, StudentConfig(lora=lora, lora_rank=2, cast_teacher_unet="bf16"))
    for network in (nets.student, pipe.transformer):
        assert torch.equal(embedded(family, network, x, cond)[0], exact)


def test_flux2_rounds_none_of_latents_in_float32() -> None:
    """As training has them: it casts its time to them, not to what it makes of them."""
    pipe = tiny_flux2()
    family, _, cond = seen(pipe)
    network = cast(pipe.transformer, torch.bfloat16)
    assert distinct_times(family, network, torch.randn(2, 16, 4, 4), cond) >= 99
