"""The scheduler in EDM's coordinates: equal to the stock one on its grid, exact on Gaussian data, at any noise level."""

import itertools
import math
from itertools import pairwise

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DDIMScheduler
from oracles import Gaussian, as_output, cm_scalings, edm_scalings

from cm_diffusers.diffusion.process import EDM, DiscreteVP
from cm_diffusers.diffusion.views import EDMView, VPView
from cm_diffusers.schedulers import EDMConsistencyScheduler


SHAPE = (2, 3, 4, 4)
SIGMA_MIN, DATA = 0.002, Gaussian(0.3, 0.5)
BOUNDARIES = ("cm", "edm")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
VP = {"network": "vp", "sigma_min": 0.03, "sigma_max": 14.0, "clip_denoised": False}
PUBLISHED = [(22, 40, 1.382), (106, 201, 1.913), (17, 40, 4.366), (18, 40, 3.520), (67, 151, 3.991), (62, 151, 5.249)]


def normal(seed, shape=SHAPE, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generators(several):
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)] if several else torch.Generator().manual_seed(3)


def assert_same_steps(stock, ours, dtype=torch.float32, several=False):
    """Feed both the same samples and outputs, step by step."""
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if dtype == torch.float16 else {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(ours.sigmas.float(), stock.sigmas, rtol=1e-6, atol=0)
    assert ours.init_noise_sigma == stock.init_noise_sigma
    g_stock, g_ours = generators(several), generators(several)
    x = (normal(0) * stock.init_noise_sigma).to(dtype)
    for i, t in enumerate(stock.timesteps):
        torch.testing.assert_close(ours.scale_model_input(x, t), stock.scale_model_input(x, t).to(dtype), **tolerance)
        output = normal(i + 1).to(dtype)
        expected = stock.step(output, t, x, generator=g_stock).prev_sample.to(dtype)
        actual = ours.step(output, t, x, generator=g_ours).prev_sample
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, **tolerance)
        x = expected


class TestEqualsStock:
    @pytest.mark.parametrize(
        "config", [{}, {"clip_denoised": False, "s_noise": 1.007}, {"sigma_max": 50, "sigma_data": 0.7, "rho": 5}]
    )
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    @pytest.mark.parametrize("num_steps", [1, 2, 7, 40])
    def test_numbers_of_steps(self, num_steps, dtype, config):
        stock, ours = CMStochasticIterativeScheduler(**config), EDMConsistencyScheduler(**config)
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        assert_same_steps(stock, ours, dtype)

    @pytest.mark.parametrize("several", [False, True])
    @pytest.mark.parametrize(("place", "points", "sigma"), PUBLISHED)
    def test_the_published_choices_of_two_steps(self, place, points, sigma, several):
        stock, ours = (cls(points) for cls in (CMStochasticIterativeScheduler, EDMConsistencyScheduler))
        stock.set_timesteps(timesteps=[place, 0])
        ours.set_timesteps(timesteps=[place, 0])
        assert ours.sigmas.tolist() == pytest.approx([80.0, sigma, 0.002], abs=6e-4)
        assert_same_steps(stock, ours, several=several)

    def test_every_place_of_the_grid(self):
        stock, ours = CMStochasticIterativeScheduler(clip_denoised=False), EDMConsistencyScheduler(clip_denoised=False)
        places = list(range(39, -1, -3))
        stock.set_timesteps(timesteps=places)
        ours.set_timesteps(timesteps=places)
        assert_same_steps(stock, ours, torch.float64)

    def test_forward_process(self):
        stock, ours = CMStochasticIterativeScheduler(), EDMConsistencyScheduler()
        t = stock.timesteps[[0, 22]]
        torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=1e-12, atol=1e-9)
        for dtype in (torch.float32, torch.float64):
            x, noise = normal(0).to(dtype), normal(1).to(dtype)
            expected = stock.add_noise(x, noise, t)
            torch.testing.assert_close(ours.add_noise(x, noise, t), expected, rtol=1e-6, atol=1e-6)
        assert (ours.order, len(ours)) == (stock.order, len(stock)) == (1, 40)

    def test_configs_go_both_ways(self, tmp_path):
        stock = CMStochasticIterativeScheduler(num_train_timesteps=201, sigma_max=50.0, clip_denoised=False)
        ours = EDMConsistencyScheduler.from_config(stock.config, gamma=0.5, boundary_scalings="edm")
        assert (ours.config.num_train_timesteps, ours.config.sigma_max, ours.config.clip_denoised) == (
            201,
            50.0,
            False,
        )
        back = CMStochasticIterativeScheduler.from_config(ours.config)
        assert (back.config.num_train_timesteps, back.config.sigma_max) == (201, 50.0)
        back.save_pretrained(tmp_path)  # our fields ride along
        again = EDMConsistencyScheduler.from_config(CMStochasticIterativeScheduler.from_pretrained(tmp_path).config)
        assert (again.config.gamma, again.config.boundary_scalings) == (0.5, "edm")

    def test_every_parameter_of_the_stock_one_has_its_default_here(self):
        stock, ours = CMStochasticIterativeScheduler().config, EDMConsistencyScheduler().config
        assert {name: ours[name] for name in stock if not name.startswith("_")} == {
            name: stock[name] for name in stock if not name.startswith("_")
        }


class TestStockDefects:
    """Both are wrong in the stock scheduler of diffusers 0.42."""

    @pytest.mark.parametrize("sigma_min", [0.1, 0.35])
    def test_the_end_has_no_noise_for_any_sigma_min(self, sigma_min):
        """In float32 sigma_min^2 - sigma_min^2 need not be 0: it adds noise of 3e-5 for 0.1, and NaN for 0.35."""
        scheduler = EDMConsistencyScheduler(sigma_min=sigma_min)
        scheduler.set_timesteps(2)
        x = torch.zeros(SHAPE)
        for t in scheduler.timesteps:
            x, denoised = scheduler.step(x, t, x, return_dict=False)
        assert torch.equal(x, denoised)

    def test_noise_starts_at_the_first_level(self):
        """It says sigma_max wherever it starts."""
        scheduler = EDMConsistencyScheduler()
        assert scheduler.init_noise_sigma == 80.0
        scheduler.set_timesteps(sigmas=[5.0, 1.0])
        assert scheduler.init_noise_sigma == 5.0


class TestLevels:
    @pytest.mark.parametrize("sigma", [0.821, 1.526])
    def test_any_sigma_exactly(self, sigma):
        scheduler = EDMConsistencyScheduler()
        scheduler.set_timesteps(sigmas=[80.0, sigma])
        assert scheduler.sigmas.tolist() == [80.0, sigma, SIGMA_MIN]
        assert scheduler.timesteps.tolist() == pytest.approx([1095.506658, 250 * math.log(sigma)], abs=1e-6)
        assert (scheduler.num_inference_steps, scheduler.custom_timesteps) == (2, True)

    def test_what_networks_are_told(self):
        sigmas = [14.0, 0.821, 0.03]
        adm, edm, vp = (
            EDMConsistencyScheduler(**config)
            for config in ({}, {"noise_conditioning": "edm"}, {**VP, "sigma_max": 14.0})
        )
        process = DiscreteVP.from_scheduler(DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear"))
        for scheduler in (adm, edm, vp):
            scheduler.set_timesteps(sigmas=sigmas)
        logs = torch.tensor(sigmas, dtype=torch.float64).log()
        torch.testing.assert_close(adm.timesteps, 250 * logs, rtol=1e-12, atol=0)
        torch.testing.assert_close(edm.timesteps, logs / 4, rtol=1e-12, atol=0)
        torch.testing.assert_close(vp.timesteps, process.time_at(-logs), rtol=1e-9, atol=1e-9)
        for scheduler in (adm, edm, vp):
            assert torch.equal(scheduler.sigma_to_t(torch.tensor(sigmas, dtype=torch.float64)), scheduler.timesteps)
        stock = CMStochasticIterativeScheduler().sigma_to_t(0.821)
        assert adm.sigma_to_t(0.821).item() == pytest.approx(float(stock), abs=1e-9)

    def test_the_recommended_ones(self):
        scheduler = EDMConsistencyScheduler(recommended_sigmas=[80.0, 0.821])
        scheduler.set_timesteps()
        assert scheduler.sigmas.tolist() == [80.0, 0.821, SIGMA_MIN]
        scheduler.set_timesteps(1)
        assert scheduler.sigmas.tolist() == [80.0, SIGMA_MIN]

    def test_the_last_level_is_that_of_the_boundary(self):
        scheduler = EDMConsistencyScheduler(boundary_scalings="edm")
        scheduler.set_timesteps(sigmas=[80.0])
        assert scheduler.sigmas.tolist() == [80.0, 0.0]

    @pytest.mark.parametrize("config", [{}, {"noise_conditioning": "edm"}, VP])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_add_noise_at_any_timestep(self, config, dtype):
        scheduler, sigma = EDMConsistencyScheduler(**config), torch.tensor([0.1, 7.3], dtype=torch.float64)
        scheduler.set_timesteps(sigmas=sigma.flip(0))
        t = scheduler.timesteps.flip(0).to(dtype)
        scheduler.set_timesteps(1)  # what is added does not depend on the schedule
        x, noise = normal(0), normal(1)
        expected = x + sigma.view(-1, 1, 1, 1) * noise
        torch.testing.assert_close(scheduler.add_noise(x, noise, t), expected, rtol=1e-5, atol=1e-5)
        halves = scheduler.add_noise(x.half(), noise.half(), t)
        assert halves.dtype == torch.float16  # rounded once, at the end
        expected = x.half().float() + sigma.float().view(-1, 1, 1, 1) * noise.half().float()
        assert ((halves - expected).abs() <= 0.501 * 2**-10 * expected.abs() + 1e-6).all()


class TestScalings:
    def test_constants_of_the_paper(self):
        """2303.01469, Appendix C, by hand at sigma = 1; with the shift also under the root c_out would be 0.44703."""
        scheduler = EDMConsistencyScheduler(clip_denoised=False)
        scheduler.set_timesteps(sigmas=[1.0])
        zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        assert scheduler.step(zero, 0.0, one).denoised.item() == pytest.approx(0.20064141, abs=1e-8)
        scheduler.set_timesteps(sigmas=[1.0])
        assert scheduler.step(one, 0.0, zero).denoised.item() == pytest.approx(0.44631917, abs=1e-8)

    @pytest.mark.parametrize("boundary", BOUNDARIES)
    @pytest.mark.parametrize("sigma", [0.002, 0.004, 0.821, 80.0])
    @pytest.mark.parametrize("conditioning", ["adm", "edm"])
    def test_trainer_and_scheduler_agree(self, sigma, boundary, conditioning):
        scheduler = EDMConsistencyScheduler(
            sigma_data=0.7, boundary_scalings=boundary, noise_conditioning=conditioning, clip_denoised=False
        )
        scheduler.set_timesteps(sigmas=[sigma])
        x, level = normal(0), torch.tensor([sigma], dtype=torch.float64)
        actual = scheduler.step(asked(scheduler, network, x), scheduler.timesteps[0], x).denoised
        torch.testing.assert_close(
            actual, trained(EDMView(0.7, conditioning), x, level, boundary), rtol=1e-5, atol=1e-5
        )

    @pytest.mark.parametrize("boundary", BOUNDARIES)
    @pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
    @pytest.mark.parametrize("sigma", [0.03, 0.821, 14.0])
    def test_trainer_and_scheduler_agree_on_vp_networks(self, sigma, prediction_type, boundary):
        scheduler = EDMConsistencyScheduler(
            **VP, sigma_data=0.7, prediction_type=prediction_type, boundary_scalings=boundary
        )
        process = DiscreteVP.from_scheduler(DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear"))
        scheduler.set_timesteps(sigmas=[sigma])
        x, level = normal(0), torch.tensor([sigma], dtype=torch.float64)
        actual = scheduler.step(asked(scheduler, network, x), scheduler.timesteps[0], x).denoised
        expected = trained(VPView(process, prediction_type, 0.7), x, level, boundary, 0.03)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
    @pytest.mark.parametrize("zero_snr", [False, True])
    def test_a_vp_network_is_its_own_denoiser(self, prediction_type, zero_snr):
        """With the boundary at 0, f of a diffusion model is E[x0 | x], here known exactly, whatever sigma_data is."""
        scheduler = EDMConsistencyScheduler(
            **VP, boundary_scalings="edm", prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr
        )
        stock = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", rescale_betas_zero_snr=zero_snr)
        process = DiscreteVP.from_scheduler(stock)
        scheduler.set_timesteps(sigmas=[14.0, 0.821, 0.1])
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            x, time = normal(0), t.expand(2)
            shown = scheduler.scale_model_input(x, t)
            output = as_output(process, DATA.predict(process, shown, time), shown, time, prediction_type)
            expected = DATA.predict(EDM(), x, sigma.expand(2)).x0
            torch.testing.assert_close(scheduler.step(output, t, x).denoised, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("config", [{"sigma_min": 0.03}, VP])
    def test_boundary_is_exact(self, dtype, config):
        scheduler = EDMConsistencyScheduler(**{**config, "clip_denoised": False})
        scheduler.set_timesteps(sigmas=[0.03])
        x = normal(0).to(dtype)
        assert torch.equal(scheduler.step(torch.full_like(x, 1e3), scheduler.timesteps[0], x).prev_sample, x)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_every_precision_is_computed_in_double(self, dtype):
        scheduler = EDMConsistencyScheduler(clip_denoised=False)
        x, output = (80 * normal(0)).to(dtype), normal(1).to(dtype)
        scheduler.set_timesteps(1)
        c_skip, c_out = cm_scalings(torch.tensor(80.0), SIGMA_MIN, 0.5)
        expected = c_skip * x.double() + c_out * output.double()
        found = scheduler.step(output, scheduler.timesteps[0], x).denoised
        assert torch.equal(found, expected.to(dtype))


def network(x, t, **conditions):
    """Some answer that depends on all it is given."""
    return (torch.sin(3 * x) + torch.cos(t / 100),)


def asked(scheduler, network, x):
    t = scheduler.timesteps[0]
    return network(scheduler.scale_model_input(x, t), t)[0]


def trained(view, x, sigma, boundary, sigma_min=SIGMA_MIN):
    """f as an objective computes it."""
    F = view(network, x, sigma, {})
    scalings = edm_scalings(sigma, 0.7) if boundary == "edm" else cm_scalings(sigma, sigma_min, 0.7)
    c_skip, c_out = (c.view(-1, 1, 1, 1) for c in scalings)
    return c_skip * x + c_out * F


class TestOracle:
    """Every step is linear on N(0.3, 0.5^2), so all points of {-1, 1}^steps as noise give its law without an error."""

    @pytest.mark.parametrize("boundary", BOUNDARIES)
    @pytest.mark.parametrize("sigmas", [[80.0], [80.0, 0.821], [80.0, 10.0, 1.0, 0.1, 0.004]])
    def test_variance_after_every_step(self, sigmas, boundary):
        run = run_on(design(sigmas), sigmas, boundary)
        levels = [*sigmas[1:], SIGMA_MIN if boundary == "cm" else 0.0]
        for x, level in zip(run, levels, strict=True):
            assert x.mean().item() == pytest.approx(DATA.mean, abs=1e-9)
            assert x.std(correction=0).item() == pytest.approx(math.hypot(DATA.std, level), rel=1e-9)

    @pytest.mark.parametrize(("boundary", "std"), [("cm", math.sqrt(3e-6)), ("edm", 2e-3)])
    def test_noise_at_twice_sigma_min(self, boundary, std):
        """sqrt(sigma^2 - sigma_min^2), and sigma where f is data itself; at 0.821 the difference could not be seen."""
        scheduler = EDMConsistencyScheduler(sigma_min=1e-3, boundary_scalings=boundary)
        scheduler.noise_sampler = lambda shape, *_: torch.ones(shape, dtype=torch.float64)
        scheduler.set_timesteps(sigmas=[80.0, 2e-3])
        zero = torch.zeros(SHAPE, dtype=torch.float64)
        result = scheduler.step(zero, scheduler.timesteps[0], zero)
        assert torch.equal(result.denoised, zero)
        torch.testing.assert_close(result.prev_sample, torch.full_like(zero, std), rtol=1e-12, atol=0)

    def test_one_step_from_pure_noise(self):
        """It starts at N(0, 80^2), not at data with noise: mean 0.3 (1 - a), std 80 a, a = 0.5 / sqrt(0.25 + 6400)."""
        x = torch.tensor([[80.0], [-80.0]], dtype=torch.float64)
        (result,) = run_on((x, []), [80.0], "edm")
        assert result.mean().item() == pytest.approx(0.298125, abs=1e-6)
        assert result.std(correction=0).item() == pytest.approx(0.4999902, abs=1e-7)

    @pytest.mark.parametrize("boundary", BOUNDARIES)
    @pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7, 1.0])
    def test_reused_noise_widens_the_variance(self, gamma, boundary):
        sigmas = [80.0, 10.0, 1.0, 0.1]
        result = run_on(design(sigmas), sigmas, boundary, gamma=gamma)[-1]
        floor = SIGMA_MIN if boundary == "cm" else 0.0
        variance, expected = DATA.std**2 + 80.0**2, None
        for sigma, following in pairwise([*sigmas, floor]):
            gain = math.hypot(DATA.std, floor) / math.hypot(DATA.std, sigma)  # f - mean = gain (x - mean)
            above, below = (math.sqrt(level**2 - floor**2) for level in (sigma, following))
            reused = gain + (1 - gamma) * below / above * (1 - gain)
            variance = reused**2 * variance + (1 - (1 - gamma) ** 2) * below**2
        expected = math.sqrt(variance)
        assert result.std(correction=0).item() == pytest.approx(expected, rel=1e-9)
        assert expected == pytest.approx(0.5, abs=1e-5) if gamma == 1 else expected > 0.51

    def test_without_fresh_noise_a_denoiser_follows_the_flow(self):
        """gamma = 0 with the boundary at 0 is an Euler step of dx / dsigma = (x - D) / sigma."""
        scheduler = EDMConsistencyScheduler(400, gamma=0.0, boundary_scalings="edm", clip_denoised=False)
        scheduler.set_timesteps(400)
        start = x = normal(0) * 80
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            level = sigma.expand(2)
            denoised = DATA.predict(EDM(), x, level).x0
            before, x = x, scheduler.step(as_network(denoised, x, sigma, "edm"), t, x).prev_sample
            following = scheduler.sigmas[scheduler.step_index]
            euler = before + (following - sigma) * (before - denoised) / sigma
            torch.testing.assert_close(x, euler, rtol=1e-9, atol=1e-9)
        expected = DATA.consistency(EDM(), start, torch.full((2,), 80.0))
        torch.testing.assert_close(x, expected, rtol=0.01, atol=0.01)


def as_network(f, x, sigma, boundary):
    """The network output with which c_skip x + c_out F is f."""
    c_skip, c_out = edm_scalings(sigma, 0.5) if boundary == "edm" else cm_scalings(sigma, SIGMA_MIN, 0.5)
    return (f - c_skip * x) / c_out


def design(sigmas):
    """x at the first level `(N, 1)` and the noise of each step, as a population without sampling error."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(sigmas))), dtype=torch.float64)
    return DATA.mean + math.hypot(DATA.std, sigmas[0]) * signs[:, :1], list(signs[:, 1:].split(1, dim=1))


def run_on(start, sigmas, boundary, gamma=1.0):
    """The samples after every step, with the exact consistency function to the level of the boundary."""
    x, noises = start
    scheduler = EDMConsistencyScheduler(boundary_scalings=boundary, gamma=gamma, clip_denoised=False)
    scheduler.noise_sampler = lambda *_: noises.pop(0)
    scheduler.set_timesteps(sigmas=sigmas)
    end, samples = torch.tensor([SIGMA_MIN if boundary == "cm" else 0.0], dtype=torch.float64), []
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        f = DATA.flow(EDM(), x, sigma.view(1), end)
        x = scheduler.step(as_network(f, x, sigma, boundary), t, x).prev_sample
        samples.append(x)
    return samples


class TestNoise:
    def test_the_last_step_draws_nothing(self):
        scheduler, drawn = EDMConsistencyScheduler(), []
        scheduler.noise_sampler = lambda shape, *_: drawn.append(shape) or torch.zeros(shape)
        scheduler.set_timesteps(3)
        x = torch.zeros(SHAPE)
        for t in scheduler.timesteps:
            x = scheduler.step(x, t, x).prev_sample
        assert drawn == [SHAPE, SHAPE]

    def test_deterministic_sampling_draws_nothing(self):
        scheduler, generator = EDMConsistencyScheduler(gamma=0.0), torch.Generator().manual_seed(0)
        scheduler.set_timesteps(2)
        before, x = generator.get_state(), torch.zeros(SHAPE)
        scheduler.step(x, scheduler.timesteps[0], x, generator=generator)
        assert torch.equal(generator.get_state(), before)

    def test_it_has_the_shape_of_the_sample(self):
        scheduler = EDMConsistencyScheduler()
        scheduler.noise_sampler = lambda shape, *_: torch.zeros(shape[1:])
        scheduler.set_timesteps(2)
        with pytest.raises(ValueError, match=r"noise of \(2, 3, 4, 4\), got \(3, 4, 4\)"):
            scheduler.step(torch.zeros(SHAPE), scheduler.timesteps[0], torch.zeros(SHAPE))

    def test_gamma_of_one_run(self):
        scheduler = EDMConsistencyScheduler(gamma=0.3)
        scheduler.set_timesteps(2, gamma=1.0)
        assert scheduler.gamma == 1.0
        scheduler.set_timesteps(2)
        assert scheduler.gamma == 0.3

    def test_clipping(self):
        scheduler = EDMConsistencyScheduler()
        scheduler.set_timesteps(sigmas=[80.0])
        x = torch.zeros(SHAPE)
        assert torch.equal(scheduler.step(x + 9, scheduler.timesteps[0], x).denoised, x + 1)


class TestPlace:
    def test_a_timestep_finds_its_place_also_in_float32(self):
        scheduler = EDMConsistencyScheduler()
        scheduler.set_timesteps(4)
        x = torch.zeros(SHAPE)
        scheduler.step(x, scheduler.timesteps[2].float(), x)
        assert scheduler.step_index == 3

    @pytest.mark.parametrize("config", [{}, VP])
    def test_any_input_is_scaled_before_the_first_step(self, config):
        scheduler = EDMConsistencyScheduler(**config)
        size = 1.0 if config else 0.5
        scaled = scheduler.scale_model_input(torch.ones(SHAPE), scheduler.sigma_to_t(0.821).float())
        torch.testing.assert_close(scaled, torch.full(SHAPE, 1 / math.hypot(0.821, size)), rtol=1e-5, atol=0)

    def test_begin_index_wins_over_the_timestep(self):
        scheduler = EDMConsistencyScheduler()
        scheduler.set_timesteps(4)
        assert (scheduler.step_index, scheduler.begin_index) == (None, None)
        scheduler.set_begin_index(2)
        scheduler.step(torch.zeros(SHAPE), scheduler.timesteps[0], torch.zeros(SHAPE))
        assert (scheduler.step_index, scheduler.begin_index) == (3, 2)
        scheduler.set_timesteps(4)
        assert (scheduler.step_index, scheduler.begin_index) == (None, None)

    def test_the_results(self):
        scheduler = EDMConsistencyScheduler()
        scheduler.set_timesteps(1)
        x = torch.zeros(SHAPE)
        result = scheduler.step(x, scheduler.timesteps[0], x)
        assert list(result) == ["prev_sample", "denoised"]
        scheduler.set_timesteps(1)
        assert len(scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)) == 2


def step(scheduler, t):
    scheduler.step(torch.zeros(SHAPE), t, torch.zeros(SHAPE))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sigma_min": 80.0}, r"larger sigma_max and sigma_data must be positive, got 80\.0, 80\.0 and 0\.5"),
        ({"sigma_data": 0.0}, "must be positive"),
        ({"boundary_scalings": "lcm"}, "boundary_scalings must be one of cm, edm; got 'lcm'"),
        ({"noise_conditioning": "log"}, "noise_conditioning must be one of edm, adm, trigflow; got 'log'"),
        ({"network": "flow"}, "network must be one of edm, vp"),
        ({"prediction_type": "x"}, "prediction_type must be one of epsilon, v_prediction, sample"),
        ({"gamma": 1.5}, "gamma must be from 0"),
        ({"network": "vp"}, r"knows sigmas from 0\.02\d+ to 14\.6\d+, but sigma_min is 0.002 and sigma_max 80"),
        ({"recommended_sigmas": [0.8, 80.0]}, "sigmas must be numbers that descend"),
    ],
)
def test_refuses_a_config(config, message):
    with pytest.raises(ValueError, match=message):
        EDMConsistencyScheduler(**config)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "Give exactly one of num_inference_steps, timesteps and sigmas"),
        ({"num_inference_steps": 2, "sigmas": [80.0, 1.0]}, "Give exactly one"),
        ({"num_inference_steps": 0}, "whole number from 1 to the 40 points of the training grid, got 0; for other"),
        ({"num_inference_steps": 41}, "got 41"),
        ({"num_inference_steps": 2.5}, "got 2.5"),
        ({"timesteps": [0, 22]}, "timesteps must descend"),
        ({"timesteps": [40, 0]}, "from 39 down to 0"),
        ({"timesteps": [22.5, 0]}, "whole numbers"),
        ({"sigmas": []}, "must be numbers that descend"),
        ({"sigmas": [0.8, 80.0]}, "must be numbers that descend, from at most 80.0 to at least 0.002; got"),
        ({"sigmas": [81.0]}, "at most 80.0"),
        ({"sigmas": [80.0, 0.0]}, "at least 0.002"),
        ({"sigmas": [math.nan]}, "must be numbers"),
        ({"sigmas": ["a"]}, "must be numbers"),
        ({"num_inference_steps": 2, "gamma": -1}, "gamma must be from 0"),
    ],
)
def test_refuses_a_schedule(asked, message):
    with pytest.raises(ValueError, match=message):
        EDMConsistencyScheduler().set_timesteps(**asked)


def test_refuses_a_step():
    scheduler = EDMConsistencyScheduler()
    scheduler.set_timesteps(1)
    for integer in (0, torch.tensor(0)):
        with pytest.raises(ValueError, match=r"not integer indices; pass entries of scheduler\.timesteps"):
            step(scheduler, integer)
    with pytest.raises(ValueError, match="integer indices"):
        scheduler.add_noise(torch.zeros(SHAPE), torch.zeros(SHAPE), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"Timestep 0 \(sigma 1\) is not in the schedule of sigmas \[80.0\]"):
        step(scheduler, 0.0)
    step(scheduler, scheduler.timesteps[0])
    with pytest.raises(ValueError, match="All 1 steps are done"):
        step(scheduler, scheduler.timesteps[0])


def test_a_diffusion_models_scheduler_gives_its_betas():
    betas = {"beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear"}
    teacher = DDIMScheduler(num_train_timesteps=500, prediction_type="v_prediction", **betas)
    scheduler = EDMConsistencyScheduler.from_config(
        teacher.config, network="vp", num_vp_timesteps=500, num_train_timesteps=18, sigma_min=0.05, sigma_max=8.0
    )
    process = DiscreteVP.from_scheduler(teacher)
    scheduler.set_timesteps(sigmas=[8.0, 0.821])
    logs = torch.tensor([8.0, 0.821], dtype=torch.float64).log()
    torch.testing.assert_close(scheduler.timesteps, process.time_at(-logs), rtol=1e-9, atol=1e-9)
    assert (scheduler.config.prediction_type, len(scheduler)) == ("v_prediction", 18)
