"""The consistency scheduler: equal to the stock ones where they are right, and none of their defects."""

import inspect
import math
import warnings
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, TCDScheduler
from diffusers.utils.import_utils import DummyObject
from diffusers.utils.torch_utils import randn_tensor
from oracles import ConsistencyNet, Gaussian, as_output, lcm_scalings

from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.schedulers import ConsistencyScheduler


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SHAPE = (2, 4, 8, 8)
TOLERANCE = {torch.float16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-5}  # stock's tables are float32
TCD = {"boundary_scalings": "none", "set_alpha_to_one": False}


def seeded(seed=0, **kwargs):
    return {"generator": torch.Generator().manual_seed(seed), **kwargs}


def sample(scheduler, network, x, **step):
    for t in scheduler.timesteps:
        x, denoised = scheduler.step(network(x, t), t, x, return_dict=False, **step)
    return x, denoised


def assert_same_steps(stock, ours, dtype=torch.float32, eta=None, generators=lambda: None):
    """Feed both the same samples and outputs, step by step."""
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    g_stock, g_ours, draw = generators(), generators(), torch.Generator().manual_seed(7)
    x = torch.randn(SHAPE, generator=draw).to(dtype)
    for t in stock.timesteps:
        output = torch.randn(SHAPE, generator=draw).to(dtype)
        kwargs = {} if eta is None else {"eta": eta}
        expected = stock.step(output, t, x, generator=g_stock, **kwargs).prev_sample
        actual = ours.step(output, t, x, generator=g_ours).prev_sample
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected.to(dtype), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        x = expected.to(dtype)


def one_generator():
    return torch.Generator().manual_seed(3)


def list_of_generators():
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


class TestEqualsStock:
    @pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8])
    def test_lcm(self, num_steps, dtype, prediction_type):
        stock, ours = (cls(prediction_type=prediction_type) for cls in (LCMScheduler, ConsistencyScheduler))
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        assert_same_steps(stock, ours, dtype, generators=one_generator)

    @pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8])
    @pytest.mark.parametrize("gamma", [0, 0.3, 0.7, 1])
    def test_tcd(self, gamma, num_steps, dtype, prediction_type):
        stock = TCDScheduler(prediction_type=prediction_type)
        ours = ConsistencyScheduler(prediction_type=prediction_type, gamma=gamma, **TCD)
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        assert_same_steps(stock, ours, dtype, eta=gamma, generators=one_generator)

    @pytest.mark.parametrize("gamma", [0.3, 1.0])
    def test_with_a_generator_per_image(self, gamma):
        stock = LCMScheduler() if gamma == 1 else TCDScheduler()
        ours = ConsistencyScheduler(gamma=gamma, **({} if gamma == 1 else TCD))
        stock.set_timesteps(4)
        ours.set_timesteps(4)
        assert_same_steps(stock, ours, eta=None if gamma == 1 else gamma, generators=list_of_generators)

    @pytest.mark.parametrize("config", [{"clip_sample": True, "clip_sample_range": 0.7}, {"thresholding": True}])
    def test_lcm_with_bounds(self, config):
        stock, ours = (cls(sample_max_value=2.0, **config) for cls in (LCMScheduler, ConsistencyScheduler))
        stock.set_timesteps(4)
        ours.set_timesteps(4)
        assert_same_steps(stock, ours, generators=one_generator)

    @pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
    def test_lcm_with_zero_terminal_snr(self, beta_schedule):
        config = {"beta_schedule": beta_schedule, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
        stock, ours = LCMScheduler(**config), ConsistencyScheduler(**config)
        assert ours.alphas_cumprod[-1] == 0
        stock.set_timesteps(4)
        ours.set_timesteps(4)
        assert_same_steps(stock, ours, generators=one_generator)

    @pytest.mark.parametrize("num_steps", [1, 3, 4, 7, 26, 50])
    @pytest.mark.parametrize("strength", [1.0, 0.7, 0.55])
    @pytest.mark.parametrize("original", [None, 30, 100])
    def test_grid_of_lcm(self, original, strength, num_steps):
        stock, ours = LCMScheduler(), ConsistencyScheduler(gamma=0.3)  # gamma must not change the grid
        try:
            stock.set_timesteps(num_steps, original_inference_steps=original, strength=strength)
        except ValueError:
            with pytest.raises(ValueError, match="fewer steps"):
                ours.set_timesteps(num_steps, original_inference_steps=original, strength=strength)
            return
        ours.set_timesteps(num_steps, original_inference_steps=original, strength=strength)
        assert ours.timesteps.tolist() == stock.timesteps.tolist()
        assert ours.num_inference_steps == num_steps

    def test_grid_of_the_paper(self):
        scheduler = ConsistencyScheduler()
        for count, expected in [(1, [999]), (2, [999, 499]), (4, [999, 759, 499, 259])]:
            scheduler.set_timesteps(count)
            assert scheduler.timesteps.tolist() == expected

    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_forward_process(self, dtype):
        stock = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        ours = ConsistencyScheduler()
        x, noise = (torch.randn(SHAPE, **seeded(i)).to(dtype) for i in range(2))
        t = torch.tensor([19, 999])
        for method in ("add_noise", "get_velocity"):
            expected, actual = (getattr(s, method)(x, noise, t) for s in (stock, ours))
            torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert ours.scale_model_input(x, 0) is x
        assert (ours.init_noise_sigma, ours.order, len(ours)) == (1.0, 1, 1000)


class TestScalings:
    @pytest.mark.parametrize("t", [0, 1, 19, 999])
    @pytest.mark.parametrize("constants", [(10.0, 0.5), (0.1, 2.0)])
    def test_trainer_and_scheduler_agree(self, t, constants):
        timestep_scaling, sigma_data = constants
        scheduler = ConsistencyScheduler(
            prediction_type="sample", timestep_scaling=timestep_scaling, sigma_data=sigma_data
        )
        scheduler.set_timesteps(timesteps=[t])
        x, x0 = (torch.randn(SHAPE, dtype=torch.float64, **seeded(i)) for i in range(2))
        c_skip, c_out = lcm_scalings(torch.tensor(t), timestep_scaling, sigma_data)
        assert torch.equal(scheduler.step(x0, t, x).denoised, c_skip * x + c_out * x0)

    def test_boundary_is_exact(self):
        scheduler = ConsistencyScheduler()
        scheduler.set_timesteps(timesteps=[0])
        x = torch.randn(SHAPE, **seeded())
        assert torch.equal(scheduler.step(torch.full_like(x, 1e3), 0, x).prev_sample, x)

    def test_no_scalings_means_the_prediction_itself(self):
        scheduler = ConsistencyScheduler(prediction_type="sample", boundary_scalings="none")
        scheduler.set_timesteps(timesteps=[0])
        x = torch.randn(SHAPE, **seeded())
        assert torch.equal(scheduler.step(x + 1, 0, x).denoised, x + 1)


class TestOracle:
    """The exact consistency function of N(0.3, 0.5^2) is f = m + g (x - alpha m), so that a step is linear."""

    data = Gaussian(0.3, 0.5)

    @pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
    @pytest.mark.parametrize(("gamma", "num_steps"), [(1, 1), (1, 8), (0, 1), (0, 4), (0.3, 8)])
    def test_variance(self, gamma, num_steps, prediction_type):
        scheduler = ConsistencyScheduler(gamma=gamma, prediction_type=prediction_type)
        process = DiscreteVP.from_scheduler(scheduler)
        scheduler.set_timesteps(num_steps)
        network, x = ConsistencyNet(process, prediction_type, self.data), data_at(self.data, process, 999, 20_000)
        with torch.no_grad():
            result, _ = sample(scheduler, lambda x, t: network(x, t.expand(len(x)))[0], x, **seeded(1))
        assert result.mean().item() == pytest.approx(self.data.mean, abs=0.02)
        expected = expected_std(self.data, process, scheduler.timesteps, gamma)
        assert result.std().item() == pytest.approx(expected, rel=0.02)

    def test_fresh_noise_keeps_the_variance_and_reused_noise_does_not(self):
        """The noise that x and f imply depends on f, so that below gamma = 1 the variance grows with the steps."""
        scheduler = ConsistencyScheduler()
        process = DiscreteVP.from_scheduler(scheduler)
        for num_steps, reused in [(1, 0.5), (2, 0.61), (4, 0.73)]:
            scheduler.set_timesteps(num_steps)
            assert expected_std(self.data, process, scheduler.timesteps, 1) == pytest.approx(0.5, abs=0.001)
            assert expected_std(self.data, process, scheduler.timesteps, 0) == pytest.approx(reused, abs=0.005)

    def test_deterministic_steps_follow_the_flow(self):
        """A denoiser makes gamma = 0 DDIM, which needs many steps to reach the flow's end."""
        data = self.data
        scheduler = ConsistencyScheduler(gamma=0, original_inference_steps=1000, **TCD)
        process = DiscreteVP.from_scheduler(scheduler)
        scheduler.set_timesteps(1000)
        x = data_at(data, process, 999, 8)

        def network(x, t):
            return as_output(process, data.predict(process, x, t.expand(len(x))), x, t.expand(len(x)), "epsilon")

        expected = data.consistency(process, x, torch.full((8,), 999))
        torch.testing.assert_close(sample(scheduler, network, x)[0], expected, atol=5e-3, rtol=0)


def data_at(data, process, t, count):
    """Samples `(count, 1)` of the data's law at time t."""
    t = torch.tensor(t)
    noise = torch.randn(count, 1, dtype=torch.float64, **seeded())
    return process.alpha(t) * data.mean + (process.alpha(t) ** 2 * data.std**2 + process.sigma(t) ** 2).sqrt() * noise


def expected_std(data, process, timesteps, gamma):
    """Of multistep sampling with the exact consistency function to time 0; ends there, or at clean data below gamma 1."""
    rates = {t: (process.alpha(torch.tensor(t)).item(), process.sigma(torch.tensor(t)).item()) for t in range(1000)}
    std_at = {t: math.hypot(alpha * data.std, sigma) for t, (alpha, sigma) in rates.items()}
    times, std = timesteps.tolist(), std_at[999]
    for t, following in pairwise(times):
        gain, (alpha, sigma) = std_at[0] / std_at[t], rates[t]
        s = math.floor(round((1 - gamma) * following, 6))
        alpha_s, sigma_s = (1, 0) if gamma == 1 else rates[s]
        ratio = rates[following][0] / alpha_s
        std = math.hypot(ratio * std * (alpha_s * gain + sigma_s / sigma * (1 - alpha * gain)), (1 - ratio**2) ** 0.5)
    return std * std_at[0] / std_at[times[-1]]


class TestStockDefects:
    """Each of these is wrong in a stock scheduler of diffusers 0.42."""

    @pytest.mark.parametrize("gamma", [0.3, 1])
    def test_custom_timesteps_with_strength_end_without_noise(self, gamma):
        """LCMScheduler keeps the untruncated count and adds noise after the last step."""
        scheduler = ConsistencyScheduler(gamma=gamma, prediction_type="sample")
        scheduler.set_timesteps(timesteps=[999, 759, 499, 259], strength=0.5)
        assert scheduler.timesteps.tolist() == [499, 259]
        assert scheduler.num_inference_steps == 2
        result, _ = sample(scheduler, lambda x, t: torch.zeros_like(x), torch.randn(SHAPE, **seeded()), **seeded())
        assert result.abs().max() < 1e-4

    @pytest.mark.parametrize("gamma", [0, 0.3, 1])
    @pytest.mark.parametrize("bound", [{"clip_sample": True}, {"thresholding": True}])
    def test_bounds_hold_for_every_gamma(self, gamma, bound):
        """TCDScheduler ignores clip_sample and thresholding."""
        scheduler = ConsistencyScheduler(gamma=gamma, prediction_type="sample", **bound)
        scheduler.set_timesteps(2)
        result, _ = sample(scheduler, lambda x, t: 100 * x, torch.randn(SHAPE, **seeded()), **seeded())
        assert 0.9 < result.abs().max() <= 1.0001

    def test_the_last_step_honours_set_alpha_to_one(self):
        """TCDScheduler always ends at timestep 0, whose alphas_cumprod is 0.99915."""
        x, output = (torch.randn(SHAPE, dtype=torch.float64, **seeded(i)) for i in range(2))
        clean, noisy = (ConsistencyScheduler(**{**TCD, "set_alpha_to_one": one}, gamma=0) for one in (True, False))
        for scheduler in (clean, noisy):
            scheduler.set_timesteps(1)
        result, x0 = clean.step(output, 999, x, return_dict=False)
        assert torch.equal(result, x0)
        expected = 0.9991499782**0.5 * x0 + (1 - 0.9991499782) ** 0.5 * output
        torch.testing.assert_close(noisy.step(output, 999, x).prev_sample, expected, rtol=1e-6, atol=1e-6)

    def test_original_inference_steps_are_honoured_below_gamma_one(self):
        """TCDScheduler takes any value to mean all timesteps: [999, 749, 499, 249]."""
        scheduler = ConsistencyScheduler(gamma=0.3)
        scheduler.set_timesteps(4, original_inference_steps=10)
        assert scheduler.timesteps.tolist() == [999, 799, 499, 299]

    @pytest.mark.parametrize("config", [{"rescale_betas_zero_snr": True}, {"trained_betas": [0.1, 1.0]}])
    def test_zero_terminal_snr_needs_another_prediction(self, config):
        """LCMScheduler answers infinity."""
        scheduler = ConsistencyScheduler(**config, original_inference_steps=1)
        scheduler.set_timesteps(1)
        x = torch.zeros(SHAPE)
        with pytest.raises(ValueError, match=r"pure noise .* where prediction_type 'epsilon' says nothing"):
            scheduler.step(x, scheduler.timesteps[0], x)

    @pytest.mark.parametrize("gamma", [0, 0.3, 1])
    @pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
    def test_zero_terminal_snr_is_finite(self, gamma, prediction_type):
        scheduler = ConsistencyScheduler(gamma=gamma, prediction_type=prediction_type, rescale_betas_zero_snr=True)
        scheduler.set_timesteps(4)
        result, _ = sample(scheduler, lambda x, t: x, torch.randn(SHAPE, **seeded()), **seeded())
        assert result.isfinite().all()

    def test_no_eta_that_pipelines_could_override(self):
        """StableDiffusionPipeline passes its own eta = 0 to every step that takes one."""
        parameters = inspect.signature(ConsistencyScheduler.step).parameters
        assert list(parameters)[1:] == ["model_output", "timestep", "sample", "generator", "return_dict"]

    def test_custom_timesteps_are_forgotten(self):
        """LCMScheduler says custom_timesteps for ever after."""
        scheduler = ConsistencyScheduler()
        scheduler.set_timesteps(timesteps=[999])
        assert scheduler.custom_timesteps
        scheduler.set_timesteps(1)
        assert not scheduler.custom_timesteps

    def test_every_timestep_off_the_grid_is_named(self, caplog, diffusers_logs):
        """LCMScheduler never looks at the first."""
        ConsistencyScheduler().set_timesteps(timesteps=[998, 499, 250])
        assert "[998, 250] are not on the distillation grid" in caplog.text

    def test_half_precision_is_computed_in_float32(self):
        """LCMScheduler divides by sqrt(0.00466) in float16."""
        x, output = (torch.randn(SHAPE, **seeded(i)).half() for i in range(2))
        half, full = ConsistencyScheduler(), ConsistencyScheduler()
        half.set_timesteps(1)
        full.set_timesteps(1)
        expected = full.step(output.float(), 999, x.float()).denoised
        assert torch.equal(half.step(output, 999, x).denoised, expected.half())

    def test_a_finished_schedule_is_not_continued(self):
        """LCMScheduler goes on, with noise that belongs to no timestep."""
        scheduler = ConsistencyScheduler()
        scheduler.set_timesteps(2)
        x = torch.zeros(SHAPE)
        sample(scheduler, lambda x, t: x, x)
        with pytest.raises(ValueError, match="All 2 steps are done; call set_timesteps"):
            scheduler.step(x, 499, x)


@pytest.fixture
def diffusers_logs():
    """diffusers keeps its log records from the root logger, where caplog listens."""
    from diffusers.utils import logging

    logging.enable_propagation()
    yield
    logging.disable_propagation()


class TestNoise:
    def test_deterministic_sampling_draws_nothing(self):
        scheduler = ConsistencyScheduler(gamma=0)
        scheduler.set_timesteps(4)
        generator = torch.Generator().manual_seed(0)
        before = generator.get_state()
        sample(scheduler, lambda x, t: x, torch.randn(SHAPE, **seeded()), generator=generator)
        assert torch.equal(generator.get_state(), before)

    def test_one_step_draws_nothing(self):
        scheduler = ConsistencyScheduler()
        scheduler.set_timesteps(1)
        generator = torch.Generator().manual_seed(0)
        before = generator.get_state()
        sample(scheduler, lambda x, t: x, torch.zeros(SHAPE), generator=generator)
        assert torch.equal(generator.get_state(), before)

    @pytest.mark.parametrize("gamma", [0.3, 1])
    def test_frames_can_share_it(self, gamma):
        drawn = []

        def shared(shape, *where):
            drawn.append(randn_tensor((*shape[:2], 1, *shape[3:]), *where).expand(shape))
            return drawn[-1]

        scheduler = ConsistencyScheduler(gamma=gamma)
        scheduler.noise_sampler = shared
        scheduler.set_timesteps(4)
        frames = torch.randn(2, 4, 1, 8, 8, **seeded()).repeat(1, 1, 3, 1, 1)
        result, _ = sample(scheduler, lambda x, t: x, frames, **seeded())
        assert len(drawn) == 3
        assert not torch.equal(drawn[0], drawn[1])
        assert torch.equal(result, result[:, :, :1].expand_as(result))

    def test_it_has_the_shape_of_the_sample(self):
        scheduler = ConsistencyScheduler()
        scheduler.noise_sampler = lambda shape, *_: torch.zeros(shape[1:])
        scheduler.set_timesteps(2)
        with pytest.raises(ValueError, match=r"noise of \(2, 4, 8, 8\), got \(4, 8, 8\)"):
            scheduler.step(torch.zeros(SHAPE), 999, torch.zeros(SHAPE))

    def test_recommended_timesteps(self):
        """As many steps as they are take them; others, or another grid, do not."""
        scheduler = ConsistencyScheduler(recommended_timesteps=[999, 739, 499, 239])
        for steps, expected in ((4, [999, 739, 499, 239]), (2, [999, 499])):
            scheduler.set_timesteps(steps)
            assert scheduler.timesteps.tolist() == expected
        scheduler.set_timesteps(4, original_inference_steps=40)
        assert scheduler.timesteps.tolist() == [999, 749, 499, 249]

    def test_gamma_of_one_run(self):
        scheduler = ConsistencyScheduler(gamma=0.3)
        scheduler.set_timesteps(2, gamma=1.0)
        assert scheduler.gamma == 1.0
        scheduler.set_timesteps(2)
        assert scheduler.gamma == 0.3


class TestPlace:
    def test_begin_index_wins_over_the_timestep(self):
        scheduler = ConsistencyScheduler()
        scheduler.set_timesteps(4)
        assert (scheduler.step_index, scheduler.begin_index) == (None, None)
        scheduler.set_begin_index(2)
        scheduler.step(torch.zeros(SHAPE), scheduler.timesteps[2], torch.zeros(SHAPE))
        assert (scheduler.step_index, scheduler.begin_index) == (3, 2)
        scheduler.set_timesteps(4)
        assert (scheduler.step_index, scheduler.begin_index) == (None, None)

    def test_a_timestep_finds_its_place(self):
        scheduler = ConsistencyScheduler()
        scheduler.set_timesteps(4)
        scheduler.step(torch.zeros(SHAPE), 499, torch.zeros(SHAPE))
        assert scheduler.step_index == 3

    def test_a_timestep_from_elsewhere(self):
        scheduler = ConsistencyScheduler()
        scheduler.set_timesteps(2)
        with pytest.raises(ValueError, match=r"Timestep 7 is not in the schedule \[999, 499\]"):
            scheduler.step(torch.zeros(SHAPE), 7, torch.zeros(SHAPE))

    def test_no_schedule(self):
        with pytest.raises(ValueError, match="call set_timesteps before step"):
            ConsistencyScheduler().step(torch.zeros(SHAPE), 999, torch.zeros(SHAPE))


@pytest.mark.parametrize(
    ("strength", "points", "first", "stock_too"),
    [(0.58, 50, 579, False), (0.29, 50, 279, True), (0.29, 100, 289, False), (0.5, 50, 499, True)],
)
def test_strength_is_not_cut_by_floating_point(strength: float, points: int, first: int, stock_too: bool) -> None:
    """50 * 0.58 is 28.999...96, of which stock makes 28."""
    ours, stock = ConsistencyScheduler(), LCMScheduler()
    for scheduler in (ours, stock):
        scheduler.set_timesteps(2, strength=strength, original_inference_steps=points, device="cpu")
    assert ours.timesteps[0] == first
    assert bool(stock.timesteps[0] == first) == stock_too
    ours.set_timesteps(timesteps=list(range(990, -10, -10)), strength=0.29)
    assert ours.num_inference_steps == 29


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "exactly one of num_inference_steps and timesteps"),
        ({"num_inference_steps": 2, "timesteps": [999]}, "exactly one of num_inference_steps and timesteps"),
        ({"num_inference_steps": 0}, "whole number of at least 1, got 0"),
        ({"num_inference_steps": -1}, "whole number of at least 1, got -1"),
        ({"num_inference_steps": 2.5}, "whole number of at least 1, got 2.5"),
        ({"num_inference_steps": 51}, "leaves 50 of the 50 timesteps"),
        ({"num_inference_steps": 4, "strength": 0.05}, "leaves 2 of the 50 timesteps"),
        ({"num_inference_steps": 4, "strength": 0}, "strength must be above 0 and at most 1, got 0"),
        ({"timesteps": [999], "strength": 1.5}, "strength must be above 0 and at most 1, got 1.5"),
        ({"timesteps": [999, 499], "strength": 0.2}, "strength of 0.2 leaves none of the 2 timesteps"),
        ({"num_inference_steps": 4, "original_inference_steps": 0}, "has 0 steps"),
        ({"num_inference_steps": 4, "original_inference_steps": 1001}, "choose between 1 and 1000"),
        (
            {"num_inference_steps": 4, "original_inference_steps": 2.5},
            "original_inference_steps must be a whole .* 2.5",
        ),
        ({"num_inference_steps": 1, "strength": 0.01}, "take a strength of at least 0.02 or more original"),
        ({"num_inference_steps": 51}, "take fewer steps or more original"),
        ({"num_inference_steps": 4, "strength": "0.5"}, "strength must be above 0 and at most 1, got '0.5'"),
        ({"num_inference_steps": "4"}, "whole number of at least 1, got '4'"),
        ({"timesteps": 5}, "timesteps must be a list of whole numbers, got 5"),
        ({"timesteps": [float("inf")]}, r"whole numbers, got \[inf\]"),
        ({"timesteps": [float("nan")]}, r"whole numbers, got \[nan\]"),
        ({"timesteps": ["a"]}, r"whole numbers, got \['a'\]"),
        ({"timesteps": []}, r"from 999 down to 0, got \[\]"),
        ({"timesteps": [1000, 499]}, r"from 999 down to 0, got \[1000, 499\]"),
        ({"timesteps": [499, -1]}, r"from 999 down to 0, got \[499, -1\]"),
        ({"timesteps": [499, 999]}, r"must descend without repetition, got \[499, 999\]"),
        ({"timesteps": [999, 499, 499]}, "must descend without repetition"),
        ({"timesteps": [999.5]}, r"whole numbers, got \[999.5\]"),
        ({"num_inference_steps": 4, "gamma": 1.1}, "gamma must be from 0 .* got 1.1"),
    ],
)
def test_a_wrong_schedule_gets_one_sentence(arguments, sentence):
    scheduler = ConsistencyScheduler()
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=sentence):
        scheduler.set_timesteps(**arguments)
    assert scheduler.timesteps.tolist() == [999, 679, 339]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"gamma": -0.1}, "gamma must be from 0 .* got -0.1"),
        ({"beta_schedule": "cosine"}, "beta_schedule must be one of linear, .* got 'cosine'"),
        ({"prediction_type": "flow"}, "prediction_type must be one of epsilon, .* got 'flow'"),
        ({"boundary_scalings": "edm"}, "boundary_scalings must be one of lcm, none; got 'edm'"),
    ],
)
def test_a_wrong_config_gets_one_sentence(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        ConsistencyScheduler(**config)


class TestConfig:
    def test_round_trip(self, tmp_path):
        original = ConsistencyScheduler(gamma=0.3, sigma_data=0.7, boundary_scalings="none", timestep_scaling=3.0)
        original.save_pretrained(tmp_path)
        config = ConsistencyScheduler.from_pretrained(tmp_path).config
        assert {key: config[key] for key in original.config if not key.startswith("_")} == {
            key: value for key, value in original.config.items() if not key.startswith("_")
        }

    @pytest.mark.parametrize("stock", [LCMScheduler, TCDScheduler, DDIMScheduler, EulerDiscreteScheduler])
    def test_a_stock_config_goes_in_and_out(self, stock, caplog, diffusers_logs, tmp_path):
        changed = {"beta_start": 0.002, "prediction_type": "v_prediction", "steps_offset": 1}
        stock(**changed, timestep_spacing="trailing").save_pretrained(tmp_path)
        ours = ConsistencyScheduler.from_pretrained(tmp_path)
        assert (ours.config.beta_start, ours.config.prediction_type) == (0.002, "v_prediction")
        ours = ConsistencyScheduler.from_config(stock(**changed).config, gamma=0.3)
        back = stock.from_config(ConsistencyScheduler.from_pretrained(tmp_path).config)
        assert {key: back.config[key] for key in changed} == changed
        assert back.config.timestep_spacing == "trailing"
        assert ours.config.gamma == 0.3
        assert "not expected" not in caplog.text

    def test_compatible_with_itself_unregistered(self):
        compatibles = ConsistencyScheduler().compatibles
        assert compatibles.count(ConsistencyScheduler) == 1
        assert {LCMScheduler, TCDScheduler, DDIMScheduler} <= set(compatibles)
        assert not any(isinstance(cls, DummyObject) for cls in compatibles)  # which stand for missing dependencies

    def test_attributes_are_no_config(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler = ConsistencyScheduler()
            assert "noise_sampler" not in scheduler.config
            assert len(scheduler) == 1000
