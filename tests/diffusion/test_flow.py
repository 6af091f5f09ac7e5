"""Rectified flow: its grids of times, what a velocity says, and solver steps from pure noise, on data known exactly."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from oracles import Gaussian, OracleNet, as_output, guided
from tiny import tiny_scheduler, tiny_unet

from cm_diffusers.diffusion.denoisers import as_denoiser, call_unet
from cm_diffusers.diffusion.guidance import guide
from cm_diffusers.diffusion.process import DiscreteVP, RectifiedFlow, interpret
from cm_diffusers.diffusion.solvers import NOISE_SCALES, SOLVERS, ddim_sde, ddim_step, er_sde, heun_step
from cm_diffusers.diffusion.teaching import flow_teaching
from cm_diffusers.diffusion.times import shifted, shifted_grid


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
    teaching = flow_teaching(call_unet, 3.0, 4)
    grid, (t, s) = shifted_grid(4, 3.0), teaching.pairs(1000)
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


# ---- what a velocity says


def test_data_and_noise_of_a_velocity():
    """D + t v = x and (1 - t) D + t noise = x, also at both ends."""
    t = at(0, 0.2, 0.75, 1)
    x, v = torch.randn(2, 4, 6, dtype=torch.float64)
    x0, noise = interpret(RF, v, x, t, "flow_prediction")
    torch.testing.assert_close(x0 + t[:, None] * v, x)
    torch.testing.assert_close((1 - t[:, None]) * x0 + t[:, None] * noise, x)
    torch.testing.assert_close(noise - x0, v)


def velocity(x, t):
    """v of N(.3, 1.3^2): -mu + (t - (1 - t) S^2) / V (x - (1 - t) mu)."""
    mu, variance = 0.3, (1 - t) ** 2 * 1.69 + t**2
    return -mu + (t - (1 - t) * 1.69) / variance * (x - (1 - t) * mu)


def test_the_oracle_is_the_velocity_s():
    x, t = torch.randn(4, 5, dtype=torch.float64), at(0.02, 0.3, 0.75, 1)
    found = as_output(RF, DATA.predict(RF, x, t), x, t, "flow_prediction")
    torch.testing.assert_close(found, velocity(x, t[:, None]), rtol=1e-12, atol=1e-12)
    denoised = interpret(RF, velocity(x, t[:, None]), x, t, "flow_prediction")
    for ours, theirs in zip(denoised, DATA.predict(RF, x, t), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (1.0, 0.4), (0.75, 0.1), (0.2, 0.9)])
def test_the_flow_of_the_oracle_is_the_integral_of_the_velocity(start, end):
    """Runge-Kutta 4, from pure noise as well."""
    x = torch.randn(2, 5, dtype=torch.float64)
    y, t, h = x, start, (end - start) / 400
    for _ in range(400):
        k1 = velocity(y, t)
        k2 = velocity(y + h / 2 * k1, t + h / 2)
        k3 = velocity(y + h / 2 * k2, t + h / 2)
        k4 = velocity(y + h * k3, t + h)
        y, t = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), t + h
    torch.testing.assert_close(DATA.flow(RF, x, at(start, start), at(end, end)), y, rtol=1e-9, atol=1e-9)
    if end == 0:
        torch.testing.assert_close(DATA.consistency(RF, x, at(start, start)), y, rtol=1e-9, atol=1e-9)


# ---- solvers, from t = 1


def integrate(step, data, x, times):
    for t, s in pairwise(times):
        rows = (torch.full((len(x),), float(time), dtype=torch.float64) for time in (t, s))
        x = step(lambda x, t: data.predict(RF, x, t), RF, x, *rows)
    return x


def down(points, shift=1.0):
    """1 ... 0 in `points` steps."""
    return [*shifted(torch.arange(points, 0, -1) / points, shift).tolist(), 0.0]


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_ddim_is_the_scheduler_s_euler(steps):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    x = torch.randn(2, 4, 8, 8)
    for time, t, s in zip(scheduler.timesteps, *(scheduler.sigmas[i:] for i in (0, 1)), strict=False):
        v = torch.randn_like(x)
        rows = torch.full((2,), float(t)), torch.full((2,), float(s))
        denoise = lambda x, t, v=v: interpret(RF, v, x, t, "flow_prediction")  # noqa: E731
        ours = ddim_step(denoise, RF, x, *rows)
        torch.testing.assert_close(ours, scheduler.step(v, time, x).prev_sample, rtol=1e-5, atol=1e-6)
        x = ours


@pytest.mark.parametrize(("points", "ratio"), [(25, 0.939), (50, 0.969), (100, 0.984)])
def test_ddim_loses_so_much_of_the_spread(points, ratio):
    """The product of [(1 - t)(1 - s) S^2 + t s] / V_t over a grid of shift 3: where distillation ends."""
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    assert float(integrate(ddim_step, DATA, x, down(points, 3.0)).diff(dim=0)) / 1.3 == pytest.approx(ratio, abs=6e-4)


@pytest.mark.parametrize(("steps", "ratio"), [(1, 0), (2, 0.365), (4, 0.662), (8, 0.819), (28, 0.945)])
def test_a_teacher_of_few_steps_has_so_much_spread(steps, ratio):
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    assert float(integrate(ddim_step, DATA, x, down(steps, 3.0)).diff(dim=0)) / 1.3 == pytest.approx(ratio, abs=6e-4)


def test_guidance_leads_to_the_guided_mean():
    """1.5 + 3 (1.5 + .4) = 7.2, from pure noise in 1000 steps."""
    cond, uncond = Gaussian(1.5, 1.3), Gaussian(-0.4, 1.3)
    net, x = OracleNet(RF, "flow_prediction", cond, uncond), torch.zeros(1, 1, dtype=torch.float64)
    w = torch.full((1,), 3.0, dtype=torch.float64)
    denoise = guide(as_denoiser(net, RF, "flow_prediction"), {"label": torch.ones(1)}, {"label": torch.zeros(1)}, w)
    for t, s in pairwise(down(1000)):
        x = ddim_step(denoise, RF, x, at(t), at(s))
    assert x.item() == pytest.approx(7.2, abs=1e-2)
    assert guided(cond, uncond, 3.0).mean == pytest.approx(7.2)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("solver", "ratio", "tolerance"), [("ddim", 2, 0.05), ("heun", 4, 0.05), ("dpm_2s", 4, 0.3)])
def test_steps_keep_their_order_from_pure_noise(solver, ratio, tolerance, shift):
    """Heun in sigma / alpha would be infinite there, and of order 1 beside it."""
    x = torch.tensor([[2.0]], dtype=torch.float64)
    exact = DATA.flow(RF, x, at(1), at(0.05))
    times = [[t for t in down(n, shift) if t > 0.05] + [0.05] for n in (40, 80, 160)]
    errors = [float((integrate(SOLVERS[solver], DATA, x, grid) - exact).abs()) for grid in times]
    assert errors[0] < (0.1 if solver == "ddim" else 0.02)
    assert errors[1] / errors[2] == pytest.approx(ratio, rel=tolerance)


def test_heun_averages_velocities():
    """Exact for v = 1 + 2 t; one step from pure noise to data, typed out, for one that knows x."""
    x, t, s = torch.randn(3, 2, dtype=torch.float64), at(1, 0.8, 0.5), at(0, 0.3, 0.5)

    def linear(x, t):
        return interpret(RF, (1 + 2 * t)[:, None].expand_as(x), x, t, "flow_prediction")

    torch.testing.assert_close(heun_step(linear, RF, x, t, s), x + (s - t + s**2 - t**2)[:, None])
    v_t = velocity(x, t[:, None])
    v_s = velocity(x + (s - t)[:, None] * v_t, s[:, None])
    found = heun_step(lambda x, t: DATA.predict(RF, x, t), RF, x, t, s)
    torch.testing.assert_close(found, x + (s - t)[:, None] * (v_t + v_s) / 2, rtol=1e-12, atol=1e-12)


CROSSINGS = {
    **SOLVERS,
    **{f"ddim_{eta}": partial(ddim_sde, steps=3, eta=eta) for eta in (0.0, 0.4, 1.0)},
    **{f"er_{kind}_{n}": partial(er_sde, steps=n, noise_scale=kind) for kind in NOISE_SCALES for n in (1, 4)},
}


@pytest.mark.parametrize(
    ("name", "end"), [(name, end) for name in CROSSINGS for end in (0.0, 0.4) if end or name != "heun"]
)
def test_a_point_mass_is_kept_from_pure_noise(name, end):
    """N((1 - s) m, s^2), whatever the steps and the noise: no solver needs signal."""
    size = 40_000
    x, t, s = torch.randn(1, size, dtype=torch.float64), at(1), at(end)
    x_s = CROSSINGS[name](lambda x, t: Gaussian(0.7, 0.0).predict(RF, x, t), RF, x, t, s)
    assert float(x_s.mean()) == pytest.approx(0.7 * (1 - end), abs=5 * end / math.sqrt(size) + 1e-9)
    assert float(x_s.std()) == pytest.approx(end, rel=0.02, abs=1e-9)
    if name in SOLVERS or name.startswith(("ddim_0.0", "er_ode")):
        torch.testing.assert_close(x_s, (1 - end) * 0.7 + end * x, rtol=1e-9, atol=1e-9)


def test_er_s_ode_goes_on_from_pure_noise_in_its_second_order():
    x = torch.tensor([[2.0]], dtype=torch.float64)
    exact = DATA.flow(RF, x, at(1), at(0.0))
    errors = {
        (steps, order): float(
            (er_sde(lambda x, t: DATA.predict(RF, x, t), RF, x, at(1), at(0.0), steps, "ode", order) - exact).abs()
        )
        for steps in (50, 100)
        for order in (1, 2)
    }
    assert errors[50, 2] < errors[50, 1] / 3
    assert errors[50, 1] / errors[100, 1] == pytest.approx(2, rel=0.1)
    assert errors[50, 2] / errors[100, 2] > 3


def test_full_noise_on_a_discrete_process_starts_without_signal():
    """At zero terminal SNR, as at t = 1: a step of "sde" is then a fresh sample around the data."""
    config = tiny_scheduler().config
    process = DiscreteVP.from_scheduler(type(tiny_scheduler()).from_config(config, rescale_betas_zero_snr=True))
    x, t, s = torch.randn(1, 20_000, dtype=torch.float64), torch.tensor([999]), torch.tensor([500])
    assert process.alpha(t) == 0
    x_s = er_sde(lambda x, t: Gaussian(0.7, 0.0).predict(process, x, t), process, x, t, s, 1, "sde")
    assert float(x_s.mean()) == pytest.approx(0.7 * float(process.alpha(s)), abs=0.03)
    assert float(x_s.std()) == pytest.approx(float(process.sigma(s)), rel=0.02)


# ---- fresh noise


@pytest.mark.parametrize(("gamma", "std"), [(1.0, 1.300), (0.5, 1.481), (0.0, 2.095)])
def test_a_consistency_function_wants_all_noise_fresh(gamma, std):
    """Sampled at 1, .9, .75, .5 by x' = a x + b z, x = (1 - s) f + s noise at s = (1 - gamma) t', with the noise told by f.

    With x the flow's own sample, the law is kept for any gamma: a flow map may be sampled without fresh noise.
    """

    def follow(x, jump):
        times = [1.0, 0.9, 0.75, 0.5]
        for t, there in pairwise([*times, 0.0]):
            s = (1 - gamma) * there
            x = jump(x, t, s)
            a = (1 - there) / (1 - s)
            x = a * x + math.sqrt(max(there**2 - (a * s) ** 2, 0)) * torch.randn_like(x)
        return x

    def from_f(x, t, s):
        f = DATA.consistency(RF, x, at(t))
        return (1 - s) * f + s * (x - (1 - t) * f) / t

    def flow(x, t, s):
        return DATA.flow(RF, x, at(t), at(s))

    x = torch.randn(1, 200_000, dtype=torch.float64)
    assert float(follow(x, from_f).std()) == pytest.approx(std, rel=0.006)
    assert float(follow(x, flow).std()) == pytest.approx(1.3, rel=0.006)
