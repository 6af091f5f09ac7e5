"""Time grids, distances and random states."""

import random

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from torch.nn import functional as F

from cm_diffusers.diffusion.distances import DISTANCES, huber, l2
from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.diffusion.rng import rewind_rng
from cm_diffusers.diffusion.teaching import vp_teaching
from cm_diffusers.diffusion.times import solver_grid
from cm_diffusers.engine.rng import seed_everything


CPU = torch.device("cpu")


def test_the_grid_of_lcm():
    assert solver_grid(1000, 50).tolist() == list(range(19, 1000, 20))
    assert solver_grid(1000, 1).tolist() == [999]
    assert solver_grid(1000, 3).tolist() == [332, 665, 998]


@pytest.mark.parametrize("num_steps", [1, 4, 30, 50, 1000])
def test_grid_equals_the_schedulers(num_steps):
    """A sampler that uses every step of the training grid visits exactly our grid."""
    scheduler = LCMScheduler(original_inference_steps=num_steps)
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.flip(0).tolist() == solver_grid(1000, num_steps).tolist()


@pytest.mark.parametrize(
    ("n", "times"),
    [(1, [999]), (2, [999, 499]), (3, [999, 679, 339]), (4, [999, 759, 499, 259]),
     (8, [999, 879, 759, 639, 499, 379, 259, 139])],
)  # fmt: skip
def test_sampling_times_lie_on_the_grid(n, times):
    scheduler = LCMScheduler(original_inference_steps=50)
    scheduler.set_timesteps(n)
    assert scheduler.timesteps.tolist() == times
    assert set(times) <= set(solver_grid(1000, 50).tolist())


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_grid_size_is_checked(num_steps):
    with pytest.raises(ValueError, match=rf"has {num_steps} steps .* 1000 timesteps; choose between 1 and 1000\."):
        solver_grid(1000, num_steps)


def test_pairs_are_uniform_and_one_spacing_apart():
    t, s = vp_teaching(DiscreteVP(torch.linspace(0.99, 0.01, 1000)), "epsilon", None, 50).pairs(50_000)
    assert set(zip(t.tolist(), s.tolist(), strict=True)) == {(k, max(k - 20, 0)) for k in range(19, 1000, 20)}
    counts = torch.bincount(t)[19::20]
    assert ((counts - 1000).abs() < 5 * (1000 * 0.98) ** 0.5).all()
    assert t.dtype == s.dtype == torch.long


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_late_pairs_are_drawn_more_often(power):
    t, s = vp_teaching(DiscreteVP(torch.linspace(0.99, 0.01, 1000)), "epsilon", None, 50).pairs(50_000, power)
    assert set((t - s).tolist()) <= {19, 20}
    chances = torch.arange(1, 51) ** power / (torch.arange(1, 51) ** power).sum()
    counts, expected = torch.bincount(t, minlength=1000)[19::20], 50_000 * chances
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


@pytest.mark.parametrize(("d", "value"), [(1.0, 0.9990005), (1e-3, 4.142136e-4), (0.0, 0.0), (-1.0, 0.9990005)])
def test_huber_values(d, value):
    """sqrt(d^2 + c^2) - c at c = 0.001; (sqrt(2) - 1) c at d = c."""
    x = torch.full((2, 3, 4), d, dtype=torch.float64)
    assert huber(x, torch.zeros_like(x)).tolist() == pytest.approx([value] * 2, rel=1e-6)


def test_huber_sees_elements_not_norms():
    x = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
    assert float(huber(x, torch.zeros_like(x))) == pytest.approx(3.499, abs=1e-6)  # not 4.999 / 2


def test_l2_is_the_mean_square():
    x, y = torch.randn(2, 5, 3, 4)
    expected = torch.stack([F.mse_loss(a, b) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(l2(x, y), expected)
    assert float(l2(torch.full((1, 7), 3.0), torch.ones(1, 7))) == 4.0


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_are_per_sample_and_symmetric(name):
    x, y = torch.randn(2, 5, 3, 4)
    together = DISTANCES[name](x, y)
    assert together.shape == (5,)
    torch.testing.assert_close(torch.cat([DISTANCES[name](x[i : i + 1], y[i : i + 1]) for i in range(5)]), together)
    torch.testing.assert_close(DISTANCES[name](y, x), together)
    assert DISTANCES[name](x, x).tolist() == [0] * 5


DEVICES = ["cpu", *[kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()]]


@pytest.mark.parametrize("device", DEVICES)
def test_rewind_rng_repeats_dropout_masks(device):
    x = torch.ones(1000, device=device)
    with rewind_rng(torch.device(device)):
        first = F.dropout(x)
    second = F.dropout(x)
    assert torch.equal(first, second)
    assert not torch.equal(second, F.dropout(x))


def test_rewind_rng_rewinds_the_device_it_is_given(monkeypatch):
    """Not the current one."""
    states = {0: 10, 1: 20}
    number = lambda device: 0 if device is None else device.index  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device=None: states[number(device)])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device=None: states.update({number(device): state}))
    with rewind_rng(torch.device("cuda", 1)):
        states.update({0: 11, 1: 21})
    assert states == {0: 11, 1: 20}
    with rewind_rng(torch.device("cuda")):
        states.update({0: 12, 1: 22})
    assert states == {0: 11, 1: 22}


def test_rewind_rng_rewinds_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(KeyError), rewind_rng(CPU):  # noqa: PT012
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)


def draws(*entropy):
    seed_everything(*entropy)
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeds_depend_on_every_part():
    assert draws(1, 2, 3) == draws(1, 2, 3)
    for one, two in zip(draws(1, 2, 3), draws(1, 3, 2), strict=True):
        assert one != two
    assert len({draws(0, rank, step) for rank in range(3) for step in range(3)}) == 9
