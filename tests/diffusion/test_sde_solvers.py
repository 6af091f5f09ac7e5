"""Stochastic solvers: against diffusers' schedulers, and on data where mean and variance are known at every time."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from oracles import Gaussian, Mixture
from tiny import tiny_scheduler

from cm_diffusers.diffusion.denoisers import as_denoiser
from cm_diffusers.diffusion.process import EDM, DiscreteVP, Prediction, RectifiedFlow, TrigFlow
from cm_diffusers.diffusion.solvers import NOISE_SCALES, ddim_noise, ddim_sde, ddim_step, er_sde, sub_times


VP = DiscreteVP.from_scheduler(tiny_scheduler())
SPREAD = torch.tensor([999, 500, 100, 24, 3, 1])
RANGES = {  # a process, t and s
    "vp": (VP, SPREAD, (SPREAD - 24).clamp(min=0)),
    "edm": (EDM(), *torch.tensor([[80.0, 1.0], [3.0, 0.5]], dtype=torch.float64)),
    "trig": (TrigFlow(0.5), *torch.tensor([[1.5, 0.9], [1.2, 0.1]], dtype=torch.float64)),
    "flow": (RectifiedFlow(), *torch.tensor([[1.0, 0.8], [0.9, 0.1]], dtype=torch.float64)),
}


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def denoiser(data, process=VP):
    return lambda x, t: data.predict(process, x, t)


def below(t, skip):
    return (t - skip).clamp(min=0)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def gain(solve, start=999, skip=8, std=1.0):
    """By how much the mean of x grows from `start` to 0: the noise of equal seeds cancels in a difference."""
    ends = []
    for value in (0.0, 1.0):
        x, generator = torch.full((1, 1), value, dtype=torch.float64), seeded()
        for t in range(start, 0, -skip):
            time = torch.tensor([t])
            x = solve(denoiser(Gaussian(0.0, std)), VP, x, time, below(time, skip), generator)
        ends.append(x)
    return float(ends[1] - ends[0])


def flow_gain(std, start=999):
    one = torch.ones(1, 1, dtype=torch.float64)
    return float(Gaussian(0.0, std).consistency(VP, one, torch.tensor([start])))


def ddim(eta, steps=1):
    return lambda denoise, process, x, t, s, generator: ddim_sde(denoise, process, x, t, s, steps, eta, generator)


def er(noise_scale, order=1, steps=1):
    return lambda denoise, process, x, t, s, g: er_sde(denoise, process, x, t, s, steps, noise_scale, order, g)


# ---- against diffusers


@pytest.mark.parametrize("eta", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("t", [999, 519, 19])
def test_ddim_with_noise_equals_the_scheduler(eta, t):
    scheduler = tiny_scheduler()
    scheduler.set_timesteps(50)
    x, output = torch.randn(2, 2, 4, 8, 8)
    denoise = as_denoiser(lambda *_, **__: (output,), VP, "epsilon")
    times = torch.full((2,), t)
    ours = ddim_sde(lambda x, t: denoise(x, t, {}), VP, x, times, below(times, 20), 1, eta, seeded())
    theirs = scheduler.step(output, t, x, eta=eta, generator=seeded()).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("t", "s"), [(999, 979), (499, 479), (19, 0)])
def test_the_noise_is_that_of_the_scheduler(t, s):
    ours = float(ddim_noise(VP, torch.tensor([t]), torch.tensor([s]), 0.3))
    assert ours == pytest.approx(0.3 * float(tiny_scheduler()._get_variance(t, s)) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("solve", [ddim(1.0), er("sde")], ids=["ddim-1", "er-sde"])
@pytest.mark.parametrize("t", [999, 519, 39])
def test_full_noise_is_the_posterior_of_ddpm(solve, t):
    scheduler = DDPMScheduler.from_config(tiny_scheduler().config)
    scheduler.set_timesteps(timesteps=[t, t - 20])
    x, output = torch.randn(2, 2, 4, 8, 8)
    denoise = as_denoiser(lambda *_, **__: (output,), VP, "epsilon")
    times = torch.full((2,), t)
    ours = solve(lambda x, t: denoise(x, t, {}), VP, x, times, below(times, 20), seeded())
    theirs = scheduler.step(output, t, x, generator=seeded()).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=5e-6)


def test_a_step_without_way_is_as_if_it_were_not_there():
    """From 2 to 0 in three whole steps is 2, 1, 1, 0: the second order still looks back to 2."""
    assert sub_times(torch.tensor([2]), torch.tensor([0]), 3).flatten().tolist() == [2, 1, 1, 0]
    x, t, s, data = normal(1, 3), torch.tensor([2]), torch.tensor([0]), denoiser(Gaussian(0.3, 0.5))
    three, two = (er_sde(data, VP, x, t, s, steps, "sde_5", 2, seeded()) for steps in (3, 2))
    ode = [er_sde(data, VP, x, t, s, steps, "ode", 2) for steps in (3, 2)]
    torch.testing.assert_close(*ode, rtol=1e-13, atol=1e-13)
    assert (ode[0] - er_sde(data, VP, x, t, s, 3, "ode", 1)).abs().max() > 1e-6
    assert not torch.equal(three, two)  # a draw of noise more


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *where: ddim_sde(*where, eta=1.5), "eta is 1.5 but must lie between 0"),
        (lambda *where: er_sde(*where, order=3), "Unknown order 3; one of 1, 2."),
        (lambda *where: er_sde(*where, noise_scale="sde_6"), "Unknown noise_scale 'sde_6'; one of ode, sde, sde_5."),
    ],
)
def test_wrong_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call(denoiser(Gaussian(0.3, 0.5)), VP, normal(6, 3), SPREAD, below(SPREAD, 24))


# ---- one family


@pytest.mark.parametrize("solve", [ddim(0.0), er("ode")], ids=["ddim", "er"])
def test_without_noise_both_are_the_ode(solve):
    x, s = normal(6, 3), below(SPREAD, 24)
    expected = ddim_step(denoiser(Gaussian(0.3, 0.5)), VP, x, SPREAD, s)
    torch.testing.assert_close(solve(denoiser(Gaussian(0.3, 0.5)), VP, x, SPREAD, s, None), expected, rtol=1e-12, atol=1e-12)  # fmt: skip


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", RANGES)
def test_er_with_the_square_is_ddim_with_full_noise(name, steps):
    """The posterior of a process, which the paper of DDIM has for alpha^2 + sigma^2 = 1 alone."""
    process, t, s = RANGES[name]
    x, denoise = normal(len(t), 3), denoiser(Gaussian(0.3, 0.5), process)
    one, two = (f(denoise, process, x, t, s, seeded()) for f in (ddim(1.0, steps), er("sde", 1, steps)))
    torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


def test_any_eta_is_an_er_step():
    """shrink = lam_s / lam_t sqrt(1 - eta^2 (1 - lam_s^2 / lam_t^2)) gives the coefficients of DDIM(eta)."""
    x, s, x0 = normal(6, 3), below(SPREAD, 24), 0.4
    alpha, alpha_t, lam, lam_t = VP.alpha(s), VP.alpha(SPREAD), *(VP.sigma(t) / VP.alpha(t) for t in (s, SPREAD))
    shrink = lam / lam_t * (1 - 0.3**2 * (1 - (lam / lam_t) ** 2)).sqrt()
    mean = (alpha / alpha_t * shrink)[:, None] * x + (alpha * (1 - shrink))[:, None] * x0
    std = alpha * (lam**2 - (lam_t * shrink) ** 2).sqrt()
    noise = torch.randn(x.shape, generator=seeded(), dtype=x.dtype)
    found = ddim_sde(denoiser(Gaussian(x0, 0.0)), VP, x, SPREAD, s, 1, 0.3, seeded())
    torch.testing.assert_close(found, mean + std[:, None] * noise, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("solve", "draws"), [(ddim(0.0, 3), False), (er("ode", 2, 3), False), (ddim(0.1, 3), True), (er("sde_5", 2, 3), True)])  # fmt: skip
def test_noise_comes_from_the_generator_or_not_at_all(solve, draws):
    generator, x, data = seeded(), normal(6, 3), denoiser(Gaussian(0.3, 0.5))
    torch_state, own_state = torch.get_rng_state(), generator.get_state()
    first = solve(data, VP, x, SPREAD, below(SPREAD, 24), generator)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert torch.equal(generator.get_state(), own_state) != draws
    assert torch.equal(solve(data, VP, x, SPREAD, below(SPREAD, 24), seeded()), first)


def test_noise_never_exceeds_what_is_left():
    """sigma_s^2 - std^2 >= 0 for every pair of times; at s = 0 too."""
    t = torch.arange(1, 1000)
    for skip in (1, 8, 24, 999):
        s = below(t, skip)
        budget = VP.sigma(s) ** 2
        assert (budget - ddim_noise(VP, t, s, 1.0) ** 2).min() > -1e-16
        lam, lam_s = (VP.sigma(i) / VP.alpha(i) for i in (t, s))
        for phi in NOISE_SCALES.values():
            assert (1 - (lam * phi(lam_s) / phi(lam) / lam_s) ** 2).min() > -1e-14


def test_sub_steps_are_whole_and_even():
    times = sub_times(torch.tensor([999, 24, 2]), torch.tensor([975, 0, 0]), 3)
    assert times.T.tolist() == [[999, 991, 983, 975], [24, 16, 8, 0], [2, 1, 1, 0]]
    assert sub_times(torch.tensor([1.0]), torch.tensor([0.5]), 2).T.tolist() == [[1.0, 0.75, 0.5]]


@pytest.mark.parametrize("solve", [ddim(1.0, 3), er("sde_5", 2, 3)], ids=["ddim", "er"])
def test_no_way_to_go_is_no_change(solve):
    """Repeated whole times are skipped to the last bit, and leave the second order nothing to divide by."""
    x, one = normal(2, 3), torch.tensor([1, 700])
    assert torch.equal(solve(denoiser(Gaussian(0.3, 0.5)), VP, x, one, one, seeded()), x)
    found = solve(denoiser(Gaussian(0.3, 0.0)), VP, x, torch.tensor([2, 1]), torch.tensor([0, 0]), seeded())
    assert found.isfinite().all()


# ---- known answers


@pytest.mark.parametrize(("process", "t", "s"), [(VP, 700, 300), (VP, 24, 0), (EDM(), 3.0, 0.5), (TrigFlow(), 1.2, 0.4)])  # fmt: skip
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("solve", [lambda steps: ddim(0.0, steps), lambda steps: ddim(0.7, steps), lambda steps: er("sde_5", 2, steps)], ids=["ode", "ddim", "er"])  # fmt: skip
def test_a_point_mass_keeps_its_law(solve, steps, process, t, s):
    """N(alpha_s m, sigma_s^2) whatever the noise and the number of steps."""
    t, s = (torch.full((50_000,), value) for value in (t, s))
    x = process.alpha(t[:1]) * 0.7 + process.sigma(t[:1]) * normal(50_000, 1)
    x_s = solve(steps)(denoiser(Gaussian(0.7, 0.0), process), process, x, t, s, seeded())
    sigma = float(process.sigma(s[:1]))
    assert float(x_s.mean()) == pytest.approx(0.7 * float(process.alpha(s[:1])), abs=5 * sigma / math.sqrt(50_000))
    assert float(x_s.std()) == pytest.approx(sigma, rel=0.015)


@pytest.mark.parametrize(("eta", "expected"), [(0, 0.989), (0.1, 0.964), (0.2, 0.892), (0.3, 0.783), (0.6, 0.386), (1, 0.068)])  # fmt: skip
def test_noise_pulls_the_mean_towards_the_posterior(eta, expected):
    """The gain falls as the power (1 + eta^2) / 2 of the variance ratio, where the ODE has 1 / 2."""
    found = gain(ddim(eta))
    assert found / flow_gain(1.0) == pytest.approx(expected, abs=6e-4)
    a, b = (float(v) for v in VP.alphas_cumprod[[0, 999]])
    assert found == pytest.approx((b / a) ** (eta**2 / 2), rel=0.02)  # s = 1: 1 / alpha^2 in the paper's coordinates


@pytest.mark.parametrize(("std", "expected"), [(1.0, 0.660), (0.5, 0.627)])
def test_gain_of_sde_5(std, expected):
    assert gain(er("sde_5"), std=std) / flow_gain(std) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(("std", "expected"), [(1.0, 0.0682939), (0.5, 0.0171771)])
@pytest.mark.parametrize("skip", [24, 8, 333])
@pytest.mark.parametrize("steps", [1, 3])
def test_full_noise_gives_the_posterior_mean_exactly(steps, skip, std, expected):
    assert gain(ddim(1.0, steps), skip=skip, std=std) == pytest.approx(expected, rel=1e-5)


def test_three_sub_steps_are_three_steps():
    assert gain(ddim(0.0, 3), 984, skip=24) == pytest.approx(gain(ddim(0.0), 984, skip=8), rel=1e-12)
    assert gain(ddim(0.0)) ** 2 == pytest.approx(0.9780, abs=6e-5)  # marginal variance, std = 1
    bias = [100 * abs(1 - gain(ddim(0.0, steps), skip=24, std=0.5) / flow_gain(0.5)) for steps in (1, 3)]
    assert bias == pytest.approx([5.1, 2.0], abs=0.8)


def linear(process):
    """x0 = 1 + 2 lam, whatever x."""

    def denoise(x, t):
        x0 = (1 + 2 * process.sigma(t) / process.alpha(t))[:, None].expand_as(x)
        return Prediction(x0, (x - process.alpha(t)[:, None] * x0) / process.sigma(t)[:, None])

    return denoise


@pytest.mark.parametrize("noise_scale", NOISE_SCALES)
def test_second_order_is_exact_where_data_is_linear_in_lambda(noise_scale):
    """From its second step on: y = x / alpha then follows y' / phi - phi' y / phi^2, whose integral is known."""
    phi, (t, m, s) = NOISE_SCALES[noise_scale], (torch.tensor([i]) for i in (900, 800, 700))
    lam_t, lam_m, lam_s = (VP.sigma(i) / VP.alpha(i) for i in (t, m, s))
    x = normal(1, 3)
    middle = er_sde(linear(VP), VP, x, t, m, 1, noise_scale, 2, generator := seeded()) / VP.alpha(m)
    u = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    grid = lam_s + (lam_m - lam_s) * u
    kept = phi(lam_s) / phi(lam_m)
    # x0(lam_s) - kept x0(lam_m) - phi(lam_s) \int x0' / phi: integration by parts of -\int x0 (1 / phi)'
    drift = (1 + 2 * lam_s) - kept * (1 + 2 * lam_m) + 2 * phi(lam_s) * torch.trapezoid(1 / phi(grid), grid)
    std = (lam_s**2 - (lam_m * kept) ** 2).clamp(min=0).sqrt()
    noise = 0 if noise_scale == "ode" else torch.randn(x.shape, generator=generator, dtype=x.dtype)
    exact = VP.alpha(s) * (kept * middle + drift + std * noise)
    found = [er_sde(linear(VP), VP, x, t, s, 2, noise_scale, order, seeded()) for order in (1, 2)]
    torch.testing.assert_close(found[1], exact, rtol=2e-4, atol=2e-4)
    assert (found[0] - exact).abs().min() > 0.02


@pytest.mark.parametrize("solve", [ddim(0.2, 3), er("sde_5", 2, 3)], ids=["ddim", "er"])
def test_modes_keep_their_mass(solve):
    data, x = Mixture((0.3, 0.7), (-1.0, 1.0), (0.1, 0.1)), normal(4000, 1)
    generator = seeded()
    for t in range(999, 0, -24):
        times = torch.full((4000,), t)
        x = solve(denoiser(data), VP, x, times, below(times, 24), generator)
    assert float((x < 0).double().mean()) == pytest.approx(0.3, abs=0.03)
    assert float(x.abs().mean()) == pytest.approx(1.0, abs=0.03)
