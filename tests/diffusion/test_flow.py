"""Rectified flow: its grids of times, what a velocity says, and solver steps from pure noise, on data known exactly."""

import math

import pytest
import torch
from oracles import Gaussian, OracleNet
from tiny import tiny_scheduler, tiny_unet

from cm_diffusers.diffusion.denoisers import as_denoiser, call_unet
from cm_diffusers.diffusion.process import DiscreteVP, RectifiedFlow
from cm_diffusers.diffusion.times import sample_shifted_pairs, shifted, shifted_grid


RF, DATA = RectifiedFlow(), Gaussian(0.3, 1.3)


def at(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- grids


def test_shifts_multiply_the_noise_to_signal_and_each_other():
    u = torch.linspace(0, 0.999, 100, dtype=torch.float64)
    t = shifted(u, 3.0)
    torch.testing.assert_close(t / (1 - t), 3 * u / (1 - u), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(shifted(t, 5 / 3), shifted(u, 5.0), rtol=1e-14, atol=0)
    torch.testing.assert_close(shifted(t, 1 / 3), u, rtol=1e-13, atol=0)
    assert torch.equal(shifted(u, 1.0), u)


def test_the_exponential_shift_is_one_of_e_to_the_mu():
    """exp(mu) / (exp(mu) + 1 / u - 1), as diffusers' pipelines shift dynamically."""
    u, mu = torch.linspace(0.01, 1, 100, dtype=torch.float64), 1.15
    torch.testing.assert_close(shifted(u, math.exp(mu)), math.exp(mu) / (math.exp(mu) + 1 / u - 1))
    assert math.exp(mu) == pytest.approx(3.158, abs=1e-3)


@pytest.mark.parametrize(
    ("shift", "times"),
    [(3.0, [0.5, 0.75, 0.9, 1.0]), (5.0, [0.625, 0.8333, 0.9375, 1.0]), (1.0, [0.25, 0.5, 0.75, 1])],
)
def test_four_points_are_shifted_once(shift, times):
    """The stock scheduler's second shift ends at .0089 where .5 is right."""
    grid = shifted_grid(4, shift)
    assert grid.tolist() == pytest.approx(times, abs=2**-9)
    assert grid.dtype == torch.float64


@pytest.mark.parametrize(("points", "shift"), [(50, 3.0), (96, 3.0), (50, 5.0), (200, 1.0), (1, 3.0)])
def test_no_two_times_are_one_in_bfloat16(points, shift):
    grid = shifted_grid(points, shift)
    assert torch.equal(grid.bfloat16().double(), grid)
    assert len(grid.unique()) == points
    assert (grid.diff() > 0).all()
    assert grid[-1] == 1
    wanted = shifted(torch.arange(1, points + 1, dtype=torch.float64) / points, shift)
    torch.testing.assert_close(grid, wanted, rtol=2**-8, atol=0)
    assert points == 1 or not any(abs(float(t) - 0.0089) < 0.005 for t in shifted_grid(min(points, 50), 3.0))


@pytest.mark.parametrize(
    ("points", "shift", "message"),
    [
        (
            100,
            3.0,
            "Of the 100 times of a grid with shift 3.0 only 99 differ in bfloat16, in which networks are told them; give "
            "at most 96 points.",
        ),
        (0, 3.0, "A grid of 0 points with shift 3.0 is none; give at least 1 point and a shift above 0."),
        (4, 0.0, "A grid of 4 points with shift 0.0 is none; give at least 1 point and a shift above 0."),
    ],
)
def test_grids_that_are_none(points, shift, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared
        shifted_grid(points, shift)
    assert str(error.value) == message


def test_pairs_are_neighbours_down_to_the_data():
    grid = shifted_grid(4, 3.0)
    t, s = sample_shifted_pairs(1000, grid)
    below = dict(zip(grid.tolist(), [0.0, *grid.tolist()], strict=False))
    assert set(t.tolist()) == set(grid.tolist())
    assert s.tolist() == [below[time] for time in t.tolist()]


# ---- denoisers


def test_another_architecture_is_called_its_own_way():
    """Told 1 - t, with the sign turned: the output is that of the process again."""
    net, x, t = OracleNet(RF, "epsilon", DATA), torch.randn(3, 2), at(0.1, 0.5, 0.9)
    seen = []

    def call(network, x_t, told, cond):
        seen.append((told, cond))
        return -network(x_t, 1 - told)

    def network(x_t, told):
        return -net(x_t, 1 - told)[0]

    found = as_denoiser(network, RF, "epsilon", call)(x, t, {"label": 1})
    torch.testing.assert_close(found.x0.double(), DATA.predict(RF, x, t).x0, rtol=1e-5, atol=1e-5)
    ((told, cond),) = seen
    assert (told.dtype, cond) == (torch.float32, {"label": 1})


def test_a_unet_is_called_as_ever():
    process, unet = DiscreteVP.from_scheduler(tiny_scheduler()), tiny_unet()
    x, cond = torch.randn(2, 4, 8, 8), {"encoder_hidden_states": torch.randn(2, 5, 32)}
    with torch.no_grad():
        for t in (torch.tensor([3, 900]), at(3.5, 900.0)):
            plain = unet(x, t if t.dtype == torch.long else t.float(), **cond, return_dict=False)[0]
            assert torch.equal(as_denoiser(unet, process, "epsilon")(x, t, cond).noise, plain)
            assert torch.equal(as_denoiser(unet, process, "epsilon", call_unet)(x, t, cond).noise, plain)
