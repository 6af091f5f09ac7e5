"""The noising processes and what `interpret` reads in an output; the oracles themselves are checked here too."""

import math

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SCMScheduler,
    UniPCMultistepScheduler,
)
from oracles import Gaussian, Mixture, as_output
from tiny import tiny_scheduler

from cm_diffusers.diffusion.preconditioning import lcm_scalings
from cm_diffusers.diffusion.process import EDM, DiscreteVP, RectifiedFlow, TrigFlow, append_dims, diffuse, interpret


VP = DiscreteVP.from_scheduler(tiny_scheduler())
TIMES = {  # integer and fractional times of the table; the others end before alpha = 0
    "vp": (VP, [0.0, 1.0, 19.0, 259.0, 500.5, 998.0, 998.7, 999.0]),
    "edm": (EDM(), [0.002, 0.1, 1.0, 80.0]),
    "trig": (TrigFlow(), [0.01, 0.5, 1.0, 1.56]),
    "flow": (RectifiedFlow(), [0.001, 0.3, 0.5, 0.99]),
}
GAUSSIANS = [Gaussian(0.7, 0.5), Gaussian(-1.0, 2.0), Gaussian(0.3, 0.0)]


@pytest.fixture(params=TIMES, ids=TIMES)
def case(request):
    process, times = TIMES[request.param]
    return process, torch.tensor(times, dtype=torch.float64)


@pytest.mark.parametrize(
    ("t", "value"),
    [(0, 0.9991499782), (19, 0.9822439551), (279, 0.625729084), (499, 0.2776694298), (519, 0.2515775263),
     (759, 0.0522128902), (999, 0.0046600951)],
)  # fmt: skip
def test_stable_diffusion_schedule(t, value):
    """beta from .00085 to .012, linear in sqrt(beta), T = 1000; `value` is the product of 1 - beta in float32."""
    betas = [(math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999) ** 2 for i in range(1000)]
    assert float(VP.alphas_cumprod_at(torch.tensor(t))) == pytest.approx(value, rel=3e-7)
    assert math.prod(1 - b for b in betas[: t + 1]) == pytest.approx(value, rel=2e-6)


@pytest.mark.parametrize(("t", "value"), [(0, 0.0291675), (999, 14.6146469)])
def test_noise_to_signal(t, value):
    t = torch.tensor(t)
    assert float(VP.sigma(t) / VP.alpha(t)) == pytest.approx(value, rel=1e-5)
    assert float(torch.exp(-VP.half_log_snr(t))) == pytest.approx(value, rel=1e-5)


def test_integer_times_read_the_table():
    t = torch.arange(1000)
    assert torch.equal(VP.alpha(t), VP.alphas_cumprod.sqrt())
    assert torch.equal(VP.sigma(t), (1 - VP.alphas_cumprod).sqrt())
    torch.testing.assert_close(VP.alphas_cumprod_at(t.double()), VP.alphas_cumprod, rtol=1e-13, atol=0)
    torch.testing.assert_close(VP.alphas_cumprod_at(t.float()), VP.alphas_cumprod, rtol=1e-13, atol=0)
    assert VP.num_train_timesteps == 1000


def test_half_log_snr_is_linear_between_integers():
    ends = VP.half_log_snr(torch.tensor([700, 701]))
    between = VP.half_log_snr(torch.tensor([700.25, 700.5], dtype=torch.float64))
    torch.testing.assert_close(
        between, torch.stack([0.75 * ends[0] + 0.25 * ends[1], ends.mean()]), rtol=1e-12, atol=0
    )


def test_time_at_inverts_half_log_snr(case):
    process, t = case
    torch.testing.assert_close(process.time_at(process.half_log_snr(t)), t, rtol=1e-9, atol=1e-9)


def test_half_log_snr_is_log_alpha_over_sigma_and_falls(case):
    process, t = case
    value = process.half_log_snr(t)
    torch.testing.assert_close(value, torch.log(process.alpha(t) / process.sigma(t)), rtol=1e-9, atol=1e-9)
    assert (value.diff() < 0).all()
    assert value.dtype == process.alpha(t).dtype == process.sigma(t).dtype == torch.float64


@pytest.mark.parametrize("name", ["vp", "trig"])
def test_variance_preserving(name):
    process, times = TIMES[name]
    t = torch.tensor(times, dtype=torch.float64)
    torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t))


def test_rectified_flow_and_edm_rates():
    t = torch.tensor([0.0, 0.25, 1.0])
    assert RectifiedFlow().alpha(t).tolist() == [1.0, 0.75, 0.0]
    assert RectifiedFlow().sigma(t).tolist() == EDM().sigma(t).tolist() == [0.0, 0.25, 1.0]
    assert EDM().alpha(t).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        UniPCMultistepScheduler(use_flow_sigmas=True),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=False),
    ],
)
def test_a_flow_scheduler_has_no_discrete_process(scheduler):
    """Some have `alphas_cumprod`, of a schedule that they do not sample by."""
    with pytest.raises(ValueError, match="is one of flow matching") as error:
        DiscreteVP.from_scheduler(scheduler)
    assert str(error.value) == (
        f"The scheduler {type(scheduler).__name__} is one of flow matching and has no discrete variance-preserving schedule; "
        "see its network as one of RectifiedFlow, or give a Stable Diffusion style teacher (DDIM, DDPM, DPM-Solver, Euler "
        "...)."
    )


def test_the_same_scheduler_without_flow_has_one():
    table = DiscreteVP.from_scheduler(DPMSolverMultistepScheduler()).alphas_cumprod
    assert table.float().equal(DPMSolverMultistepScheduler().alphas_cumprod)
    with pytest.raises(ValueError, match="The teacher's scheduler SCMScheduler has no discrete variance-preserving"):
        DiscreteVP.from_scheduler(SCMScheduler())


def test_append_dims_takes_shape_and_dtype():
    shaped = append_dims(torch.tensor([1.0, 2.0], dtype=torch.float64), torch.zeros(2, 3, 4, 4))
    assert (shaped.shape, shaped.dtype) == ((2, 1, 1, 1), torch.float32)


def test_diffuse_equals_add_noise():
    """With the latents' float32 all the way, as LCMScheduler (and DDIM) do it."""
    t, x0, noise = torch.tensor([0, 499, 999]), torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    expected = tiny_scheduler().add_noise(x0, noise, t)
    torch.testing.assert_close(diffuse(VP, x0, noise, t), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["vp", "trig"])
def test_every_prediction_type_tells_data_and_noise(name, prediction_type):
    process, times = TIMES[name]
    t = torch.tensor(times, dtype=torch.float64)
    x0, noise = torch.randn(2, len(t), 3, dtype=torch.float64)
    x_t = diffuse(process, x0, noise, t)
    output = as_output(process, (x0, noise), x_t, t, prediction_type)
    seen = interpret(process, output, x_t, t, prediction_type)
    torch.testing.assert_close(seen.x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(seen.noise, noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_data_and_noise_make_up_the_sample_under_every_process(case, prediction_type):
    process, t = case
    x_t, output = torch.randn(2, len(t), 3, dtype=torch.float64)
    x0, noise = interpret(process, output, x_t, t, prediction_type)
    torch.testing.assert_close(diffuse(process, x0, noise, t), x_t, rtol=1e-9, atol=1e-9)


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="Unknown prediction_type 'flow'; one of epsilon, v_prediction, sample"):
        interpret(VP, torch.zeros(1), torch.zeros(1), torch.tensor([1]), "flow")


@pytest.mark.parametrize(
    ("t", "c_skip", "c_out"),
    [(0, 1.0, 0.0), (1, 0.0024938, 0.9987524), (19, 6.925e-6, 0.99999654)],  # lcm: 0.25 / (100 t^2 + 0.25) ...
)
def test_lcm_scalings_values(t, c_skip, c_out):
    ours = [float(c) for c in lcm_scalings(torch.tensor([t]))]
    assert ours == pytest.approx([c_skip, c_out], rel=1e-4, abs=0)


@pytest.mark.parametrize("timestep_scaling", [10.0, 3.0])
def test_lcm_scalings_equal_the_scheduler_at_every_time(timestep_scaling):
    scheduler = LCMScheduler(timestep_scaling=timestep_scaling)
    scheduler.set_timesteps(4)
    theirs = [scheduler.get_scalings_for_boundary_condition_discrete(t) for t in range(1000)]
    ours = torch.stack(lcm_scalings(torch.arange(1000), timestep_scaling), dim=1)
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-14, atol=0)
    assert ours[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("data", GAUSSIANS)
def test_gaussian_oracle_is_the_least_squares_denoiser(case, data):
    """Regression of x0 and noise on x_t: slopes Cov / Var, through the means."""
    process, t = case
    alpha, sigma = process.alpha(t), process.sigma(t)
    variance = alpha**2 * data.std**2 + sigma**2
    x0, noise = data.predict(process, torch.stack([alpha * data.mean, alpha * data.mean + 1]).T, t)
    torch.testing.assert_close(x0[:, 0], torch.full_like(t, data.mean))
    torch.testing.assert_close(x0.diff().squeeze(1), alpha * data.std**2 / variance, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(noise.diff().squeeze(1), sigma / variance, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("data", GAUSSIANS)
def test_gaussian_flow_is_its_own_inverse_and_solves_the_ode(case, data):
    process, t = case
    t, s = t[1:-1], t[:-2]
    x_t = torch.randn(len(t), 5, dtype=torch.float64)
    x_s = data.flow(process, x_t, t, s)
    torch.testing.assert_close(data.flow(process, x_s, s, t), x_t)
    numeric = Mixture((1.0,), (data.mean,), (data.std,)).flow(process, x_t, t, s)
    torch.testing.assert_close(numeric, x_s, rtol=1e-6, atol=1e-6)


def test_mixture_flow_keeps_the_cdf(case):
    process, t = case
    t, s = t[1:-1], t[:-2]
    data = Mixture((0.3, 0.7), (-1.0, 0.8), (0.2, 0.4))
    x_t = diffuse(process, *torch.randn(2, len(t), 7, dtype=torch.float64), t)
    x_s = data.flow(process, x_t, t, s)
    torch.testing.assert_close(data.cdf(process, x_s, s), data.cdf(process, x_t, t), rtol=1e-5, atol=1e-6)
