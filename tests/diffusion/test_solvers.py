"""Solver steps on data whose flow is known exactly."""

from itertools import pairwise

import pytest
import torch
from oracles import Gaussian, Mixture, OracleNet, as_output, guided
from tiny import tiny_scheduler

from cm_diffusers.diffusion.denoisers import as_denoiser
from cm_diffusers.diffusion.guidance import guide
from cm_diffusers.diffusion.process import EDM, DiscreteVP, Prediction, RectifiedFlow, TrigFlow
from cm_diffusers.diffusion.solvers import SOLVERS, ddim_step, dpm_2s_step, heun_step
from cm_diffusers.diffusion.times import solver_grid


VP = DiscreteVP.from_scheduler(tiny_scheduler())
SPANS = {  # a process and a range of times from noisy to clean
    "vp": (VP, 900.0, 100.0),
    "edm": (EDM(), 3.0, 0.2),
    "trig": (TrigFlow(), 1.4, 0.1),
    "flow": (RectifiedFlow(), 0.9, 0.1),
}
each_process = pytest.mark.parametrize("name", SPANS)
each_solver = pytest.mark.parametrize("solver", SOLVERS)


def at(t, x):
    """Times `(B,)`: integers stay integers, as grids of the discrete process hold."""
    return torch.full((len(x),), t, dtype=torch.float64 if isinstance(t, float) else torch.long)


def ratio(process, t):
    return process.sigma(t) / process.alpha(t)


def integrate(step, data, process, x, times):
    for t, s in pairwise(times):
        x = step(lambda x, t: data.predict(process, x, t), process, x, at(t, x), at(s, x))
    return x


def grid(num_steps):
    return [*solver_grid(1000, num_steps).flip(0).tolist(), 0]


def gain_error(solver, std, times, process=VP):
    """Relative error of x_end for N(0, std^2), whose flow multiplies x by a gain."""
    x, data = torch.ones(1, 1, dtype=torch.float64), Gaussian(0.0, std)
    exact = data.flow(process, x, at(times[0], x), at(times[-1], x))
    return abs(float(integrate(SOLVERS[solver], data, process, x, times) / exact) - 1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("num_steps", [50, 4])
def test_ddim_equals_the_scheduler(num_steps, prediction_type):
    scheduler = tiny_scheduler(prediction_type)
    scheduler.set_timesteps(num_steps)
    skip = 1000 // num_steps
    for t in [skip - 1, 2 * skip - 1, 999]:
        x, output = torch.randn(2, 2, 4, 8, 8)
        denoise = as_denoiser(lambda *_, output=output, **__: (output,), VP, prediction_type)
        ours = ddim_step(lambda x, t, denoise=denoise: denoise(x, t, {}), VP, x, at(t, x), at(max(t - skip, 0), x))
        theirs = scheduler.step(output, t, x, eta=0.0).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("t", [999, 519, 19])
def test_one_ddim_step_on_a_gaussian_has_a_closed_gain(t):
    """(alpha_s alpha_t v + sigma_s sigma_t) / (alpha_t^2 v + sigma_t^2); cos of the angle between t and s at v = 1."""
    x, s = torch.tensor([[1.0], [-2.0]], dtype=torch.float64), max(t - 20, 0)
    a_t, a_s = (float(VP.alphas_cumprod[i]) for i in (t, s))
    cross, own = (a_s * a_t) ** 0.5 * 0.25 + ((1 - a_s) * (1 - a_t)) ** 0.5, a_t * 0.25 + 1 - a_t
    x_s = integrate(ddim_step, Gaussian(0.0, 0.5), VP, x, [t, s])
    torch.testing.assert_close(x_s, x * cross / own, rtol=1e-12, atol=0)
    angle = sum(sign * torch.acos(VP.alpha(torch.tensor(i))) for sign, i in ((1, t), (-1, s)))
    torch.testing.assert_close(integrate(ddim_step, Gaussian(0.0, 1.0), VP, x, [t, s]), x * torch.cos(angle))


@pytest.mark.parametrize(("num_steps", "percent"), [(25, 9.18), (50, 4.88), (100, 2.53), (200, 1.28), (500, 0.52)])
def test_ddim_error_halves_with_the_step(num_steps, percent):
    assert 100 * gain_error("ddim", 0.5, grid(num_steps)) == pytest.approx(percent, abs=0.006)


@pytest.mark.parametrize(("skip", "variance"), [(24, 0.9397), (8, 0.9780)])
def test_ddim_loses_variance(skip, variance):
    """Marginal variance at 0 of N(0, 1) data that starts exact at 999."""
    x = torch.ones(1, 1, dtype=torch.float64)
    x_0 = integrate(ddim_step, Gaussian(0.0, 1.0), VP, x, [*range(999, 0, -skip), 0])
    assert float(x_0) ** 2 == pytest.approx(variance, abs=6e-5)


@each_process
@pytest.mark.parametrize(("solver", "ratio"), [("ddim", 2), ("heun", 4), ("dpm_2s", 4)])
def test_order_under_every_process(name, solver, ratio):
    process, start, end = SPANS[name]
    errors = [
        gain_error(solver, 0.5, torch.linspace(start, end, n + 1, dtype=torch.float64).tolist(), process)
        for n in (30, 60, 120)
    ]
    assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(ratio, rel=0.08)


@each_process
@each_solver
def test_mixture_flow_is_the_limit(name, solver):
    process, start, end = SPANS[name]
    data, x = Mixture((0.4, 0.6), (-1.0, 1.0), (0.3, 0.5)), torch.linspace(-2, 2, 7, dtype=torch.float64)[None]
    x_s = integrate(SOLVERS[solver], data, process, x, torch.linspace(start, end, 101, dtype=torch.float64).tolist())
    exact = data.flow(process, x, at(start, x), at(end, x))
    assert (x_s - exact).abs().max() < (0.05 if solver == "ddim" else 0.005)


@each_process
@each_solver
def test_a_point_mass_is_exact_in_one_step(name, solver):
    """alpha_s m + sigma_s / sigma_t (x - alpha_t m), whatever the step."""
    process, start, end = SPANS[name]
    x, t, s = torch.randn(2, 3, dtype=torch.float64), at(start, "12"), at(end, "12")
    exact = process.alpha(s[:1]) * 0.7 + process.sigma(s[:1]) / process.sigma(t[:1]) * (x - process.alpha(t[:1]) * 0.7)
    torch.testing.assert_close(integrate(SOLVERS[solver], Gaussian(0.7, 0.0), process, x, [start, end]), exact)


@pytest.mark.parametrize("name", [name for name in SPANS if name != "flow"])
def test_heun_is_exact_where_noise_is_linear_in_lambda(name):
    """With noise = a + b lam: x / alpha gains its integral a d(lam) + b d(lam^2) / 2."""
    process, start, end = SPANS[name]
    x = torch.randn(2, 3, dtype=torch.float64)

    def denoise(x, t):
        noise = (0.3 + 0.5 * ratio(process, t))[:, None].expand_as(x)
        return Prediction((x - process.sigma(t)[:, None] * noise) / process.alpha(t)[:, None], noise)

    t, s = at(start, x), at(end, x)
    lam_t, lam_s = ratio(process, t), ratio(process, s)
    integral = 0.3 * (lam_s - lam_t) + 0.25 * (lam_s**2 - lam_t**2)
    exact = process.alpha(s)[:, None] * (x / process.alpha(t)[:, None] + integral[:, None])
    torch.testing.assert_close(heun_step(denoise, process, x, t, s), exact)
    assert (ddim_step(denoise, process, x, t, s) - exact).abs().max() > 0.01


@each_process
def test_dpm_2s_is_exact_where_data_is_quadratic_in_lambda(name):
    """With x0 = a + b lam^2: x / sigma gains the integral of x0 d(1 / lam), a d(1 / lam) - b d(lam)."""
    process, start, end = SPANS[name]
    x = torch.randn(2, 3, dtype=torch.float64)

    def denoise(x, t):
        x0 = (0.3 + 0.5 * ratio(process, t) ** 2)[:, None].expand_as(x)
        return Prediction(x0, (x - process.alpha(t)[:, None] * x0) / process.sigma(t)[:, None])

    t, s = at(start, x), at(end, x)
    lam_t, lam_s = ratio(process, t), ratio(process, s)
    integral = 0.3 * (1 / lam_s - 1 / lam_t) - 0.5 * (lam_s - lam_t)
    exact = process.sigma(s)[:, None] * (x / process.sigma(t)[:, None] + integral[:, None])
    torch.testing.assert_close(dpm_2s_step(denoise, process, x, t, s), exact)
    assert (ddim_step(denoise, process, x, t, s) - exact).abs().max() > 0.01


@pytest.mark.parametrize(("solver", "evaluations"), [("ddim", 1), ("heun", 2), ("dpm_2s", 2)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_guided_steps_follow_the_guided_gaussian(solver, evaluations, prediction_type):
    """Guidance between Gaussians of one std is a Gaussian again, so a fine guided solve has an exact answer."""
    cond, uncond, x = Gaussian(1.0, 0.5), Gaussian(-0.5, 0.5), torch.randn(3, 2, dtype=torch.float64)
    net = OracleNet(VP, prediction_type, cond, uncond)
    w = torch.full((3,), 2.5, dtype=torch.float64)
    denoise = guide(as_denoiser(net, VP, prediction_type), {"label": torch.ones(3)}, {"label": torch.zeros(3)}, w)
    y, times = x, list(range(900, 99, -16))
    for t, s in pairwise(times):
        y = SOLVERS[solver](denoise, VP, y, at(t, x), at(s, x))
    assert net.calls == [6] * evaluations * 50
    data = guided(cond, uncond, 2.5)
    assert data.mean == 4.75
    error = (y - data.flow(VP, x, at(900, x), at(100, x))).abs().max()
    assert error < (0.1 if solver == "ddim" else 0.005)


def test_integer_and_float_times_agree():
    x, data = torch.randn(2, 3, dtype=torch.float64), Gaussian(0.2, 0.5)
    for step in SOLVERS.values():
        one, two = integrate(step, data, VP, x, [999, 979]), integrate(step, data, VP, x, [999.0, 979.0])
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_oracle_output_is_what_the_process_reads():
    net, x, t = (
        OracleNet(VP, "v_prediction", Gaussian(0.4, 0.6)),
        torch.randn(3, 2, dtype=torch.float64),
        at(300, "123"),
    )
    expected = as_output(VP, Gaussian(0.4, 0.6).predict(VP, x, t), x, t, "v_prediction")
    torch.testing.assert_close(net(x, t, return_dict=False)[0], expected)
