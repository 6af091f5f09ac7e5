"""Time rescaling: what is compared, on data whose denoiser is known exactly."""

import pytest
import torch
from diffusers import UNet2DModel
from oracles import Gaussian, edm_teacher
from tiny import tiny_scheduler, tiny_unet

from cm_diffusers.diffusion.preconditioning import edm_scalings
from cm_diffusers.diffusion.process import EDM, DiscreteVP, append_dims
from cm_diffusers.diffusion.views import EDMView, VPView
from cm_diffusers.objectives.time_rescaling import TimeRescalingConfig, TimeRescalingObjective
from cm_diffusers.types import Batch, Networks, Progress


DATA, PROGRESS = Gaussian(0.3, 0.5), Progress(0, 10)


ADM = EDMView(0.5, "adm")


def loss(student, size=64, view=ADM, **settings):
    objective = TimeRescalingObjective(TimeRescalingConfig(**settings), view)
    nets = Networks(student, teacher=edm_teacher(DATA, noise_conditioning="adm"))
    return objective(nets, Batch(0.3 + 0.5 * torch.randn(size, 8)), PROGRESS)


def test_the_same_answer_at_another_time_costs_nothing() -> None:
    """The student reads sigma from atan(sigma / 0.5), the teacher from 250 ln(sigma)."""
    found = loss(edm_teacher(DATA, noise_conditioning="trigflow"))
    assert found.value.item() < 1e-8
    assert found.logs["relative_error"].item() < 1e-8


def test_an_error_of_f_counts_alike_at_all_noise() -> None:
    """F is that of EDM (2206.00364, Eq. 7): of the answer times 1.1 the relative error is 0.01, at any sigma."""
    student = edm_teacher(DATA, noise_conditioning="trigflow")
    student.gain.data *= 1.1
    for sigma in (0.01, 0.5, 40.0):
        found = loss(student, sigma_min=sigma, sigma_max=1.0001 * sigma)
        assert found.logs["relative_error"].item() == pytest.approx(0.01, rel=1e-3)


def test_the_value_is_that_of_the_teacher_s_f() -> None:
    """A student that answers 0, at one sigma."""
    student, sigma = edm_teacher(DATA, noise_conditioning="trigflow"), torch.full((4000,), 0.5, dtype=torch.float64)
    student.gain.data *= 0
    x = 0.3 + 0.5 * torch.randn(4000, 8, dtype=torch.float64)
    x = x + 0.5 * torch.randn_like(x)
    c_skip, c_out = (append_dims(c, x) for c in edm_scalings(sigma, 0.5))
    expected = ((DATA.predict(EDM(), x, sigma).x0 - c_skip * x) / c_out).square().mean()
    found = loss(student, 4000, sigma_min=0.5, sigma_max=0.50001).value
    torch.testing.assert_close(found, expected.float(), rtol=0.03, atol=0)


def test_what_it_learns_is_the_teacher() -> None:
    student = edm_teacher(DATA, noise_conditioning="trigflow")
    student.gain.data *= 0.5
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        loss(student, 16).value.backward()
        optimizer.step()
    assert student.gain.item() == pytest.approx(1, abs=0.05)


def test_the_embedding_learns_its_time_without_images() -> None:
    """What is left of the error is a tenth or so, and nothing else moves."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        8, block_out_channels=(32, 32), down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2
    )
    objective = TimeRescalingObjective(TimeRescalingConfig(), EDMView(0.5, "edm"))
    sigmas = torch.tensor([0.01, 0.1, 0.5, 2.0, 10.0, 70.0])
    wanted, others = embedded(unet, EDMView(0.5, "edm").told(sigmas)), unet.conv_in.weight.clone()
    before = embedded(unet, objective.rescaled.told(sigmas))
    objective.prepare(unet)
    after = embedded(unet, objective.rescaled.told(sigmas))
    assert (after - wanted).square().mean() < (before - wanted).square().mean() / 4
    assert torch.equal(unet.conv_in.weight, others)
    assert all(parameter.grad is None for parameter in unet.parameters())


@torch.no_grad()
def embedded(unet: UNet2DModel, times: torch.Tensor) -> torch.Tensor:
    return unet.time_embedding(unet.time_proj(times.float()))


def test_a_vp_network_learns_and_its_teacher_does_not() -> None:
    view = VPView(DiscreteVP.from_scheduler(tiny_scheduler()), "epsilon", 1.0)
    objective = TimeRescalingObjective(TimeRescalingConfig(sigma_min=0.03, sigma_max=14.0), view)
    nets = Networks(tiny_unet(), teacher=tiny_unet().requires_grad_(False))
    batch = Batch(torch.randn(2, 4, 8, 8), {"encoder_hidden_states": torch.randn(2, 5, 32)})
    objective(nets, batch, PROGRESS).value.backward()
    assert nets.student.time_embedding.linear_1.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in nets.teacher.parameters())


@pytest.mark.parametrize(
    ("settings", "view", "message"),
    [
        ({}, EDMView(0.5, "trigflow"), "it needs no rescaling, distil it as it is"),
        ({}, VPView(DiscreteVP.from_scheduler(tiny_scheduler()), "epsilon", 1.0), "--sigma_min 0.002 is less noise"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, ADM, "--sigma_min 2.0 is above --sigma_max 1.0; swap them"),
    ],
)
def test_what_is_refused(settings, view, message) -> None:
    with pytest.raises(ValueError, match=message):
        loss(None, view=view, **settings)
