"""The law of a step: mean + std noise is what the real scheduler returns for that noise, and densities are exact."""

import math
import sys

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SCMScheduler,
    TCDScheduler,
)
from oracles import as_output

from cm_diffusers.diffusion.process import DiscreteVP, Prediction, diffuse
from cm_diffusers.policy.transitions import LAWS, LAWS_WITH_ETA, Transition, draw, kl_divergence, log_prob, transition
from cm_diffusers.schedulers import (
    ConsistencyScheduler,
    EDMConsistencyScheduler,
    FlowConsistencyScheduler,
    TrigFlowConsistencyScheduler,
)


SHAPE = (2, 3, 4, 4)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
CLIP = {"clip_sample": True, "clip_sample_range": 0.8}
THRESHOLD = {"thresholding": True, "sample_max_value": 2.0}
VP = {"network": "vp", "sigma_min": 0.03, "sigma_max": 14.0, "clip_denoised": False}
TRIGFLOW_VP = {"network": "vp", "prediction_type": "sample", "sigma_max": 14.0}
SD_DDIM = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False, "beta_schedule": "scaled_linear"}


def vp_cases():
    """(class, config, eta) of the schedulers on Stable Diffusion's process."""
    for kind in PREDICTION_TYPES:
        config = {"prediction_type": kind}
        yield from ((LCMScheduler, {**config, **extra}, 0.0) for extra in ({}, CLIP, THRESHOLD))
        yield LCMScheduler, {**config, "timestep_scaling": 0.01}, 0.0
        yield from ((TCDScheduler, {**config, **extra}, eta) for extra, eta in (({}, 0.3), ({}, 1.0), (CLIP, 0.7)))
        yield from ((ConsistencyScheduler, {**config, "gamma": gamma}, 0.0) for gamma in (0.2, 1.0))
        yield ConsistencyScheduler, {**config, **CLIP, "gamma": 0.5, "boundary_scalings": "none"}, 0.0
        yield ConsistencyScheduler, {**config, **THRESHOLD, "gamma": 0.5, "set_alpha_to_one": False}, 0.0
        yield from ((DDIMScheduler, {**config, **extra}, 1.0) for extra in ({}, CLIP, THRESHOLD, SD_DDIM))
        yield from (
            (DDIMScheduler, {**config, **SD_DDIM, "timestep_spacing": spacing}, 0.4)
            for spacing in ("trailing", "linspace")
        )
    for cls, eta in ((LCMScheduler, 0.0), (TCDScheduler, 0.5), (ConsistencyScheduler, 0.0), (DDIMScheduler, 1.0)):
        yield cls, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, eta


def sigma_cases():
    for config in ({}, {"clip_denoised": False, "s_noise": 1.007}, {"sigma_min": 0.03, "sigma_data": 0.7, "rho": 5.0}):
        yield CMStochasticIterativeScheduler, config, 0.0
        yield from ((EDMConsistencyScheduler, {**config, "gamma": gamma}, 0.0) for gamma in (0.3, 1.0))
    for kind in PREDICTION_TYPES:
        yield from ((EDMConsistencyScheduler, {**VP, "prediction_type": kind, "gamma": g}, 0.0) for g in (0.5, 1.0))
    yield EDMConsistencyScheduler, {"boundary_scalings": "edm", "prediction_type": "v_prediction", "gamma": 0.5}, 0.0
    for config in ({}, {"network": "edm", "sigma_max": 80.0, "clip_denoised": True}, TRIGFLOW_VP):
        yield from ((TrigFlowConsistencyScheduler, {**config, "gamma": gamma}, 0.0) for gamma in (0.3, 1.0))
    yield from ((FlowConsistencyScheduler, {"shift": 3.0, "gamma": gamma}, 0.0) for gamma in (0.3, 1.0))
    yield from ((FlowMatchLCMScheduler, config, 0.0) for config in ({}, {"shift": 3.0}))
    yield from ((SCMScheduler, config, 0.0) for config in ({}, {"sigma_data": 1.0}))


CASES = [*vp_cases(), *sigma_cases()]
ONE_OF_EACH = [
    (LCMScheduler, {}, 0.0),
    (TCDScheduler, {}, 0.3),
    (DDIMScheduler, {"clip_sample": False}, 1.0),
    (ConsistencyScheduler, {"gamma": 0.3}, 0.0),
    (EDMConsistencyScheduler, {"gamma": 0.3, "clip_denoised": False}, 0.0),
    (CMStochasticIterativeScheduler, {"clip_denoised": False}, 0.0),
    (FlowMatchLCMScheduler, {}, 0.0),
    (SCMScheduler, {}, 0.0),
    (TrigFlowConsistencyScheduler, {"gamma": 0.3}, 0.0),
    (FlowConsistencyScheduler, {"shift": 3.0, "gamma": 0.3}, 0.0),
]


def named(value):
    if isinstance(value, tuple):
        return "-".join(map(named, value))
    return getattr(value, "__name__", str(value)).replace(" ", "")


def normal(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ready(cls, config=None, **schedule):
    scheduler = cls(**(config or {}))
    schedule = schedule or {"num_inference_steps": 4}
    if cls is SCMScheduler and schedule["num_inference_steps"] != 2:
        schedule["intermediate_timesteps"] = None
    scheduler.set_timesteps(**schedule)
    return scheduler


def in_float64(scheduler):
    """With its tables in float64, so that the rounding of its own arithmetic does not count."""
    for name in ("alphas_cumprod", "final_alpha_cumprod", "sigmas"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def state(scheduler):
    return {k: v.tolist() if torch.is_tensor(v) else repr(v) for k, v in vars(scheduler).items()}


def take_step(scheduler, index, output, x, eta, noise, monkeypatch):
    """What the real `step` returns when it draws this noise."""
    modules = (sys.modules[kind.__module__] for kind in type(scheduler).__mro__)
    draws = next(module for module in modules if hasattr(module, "randn_tensor"))
    monkeypatch.setattr(draws, "randn_tensor", lambda *_, **__: noise)
    arguments = {"eta": eta} if type(scheduler) in LAWS_WITH_ETA else {}
    return scheduler.step(output, scheduler.timesteps[index], x, **arguments)


def walk(scheduler, eta, monkeypatch, dtype=torch.float64):
    """(law, noise, result of the real step) at every index of one run."""
    x = (normal(0) * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(dtype)
    with_end = isinstance(scheduler, SCMScheduler) or scheduler.config.get("network", "") is None
    for index in range(len(scheduler.timesteps) - with_end):
        output, noise = normal(3 * index + 1).to(dtype), normal(3 * index + 2).to(dtype)
        law = transition(scheduler, index, output, x, eta)
        result = take_step(scheduler, index, output, x, eta, noise, monkeypatch)
        yield law, noise, result
        x = result.prev_sample


def assert_same(law, noise, result, tolerance=1e-6):
    assert {part.dtype for part in law} == {torch.float32}
    assert law.std.shape == ()
    close = {"rtol": tolerance, "atol": tolerance * max(1.0, float(law.std))}
    torch.testing.assert_close(draw(law, noise).double(), result.prev_sample.double(), **close)
    for name in ("denoised", "pred_original_sample"):  # of LCM and ours; of DDIM and SCM
        if hasattr(result, name):
            torch.testing.assert_close(law.denoised.double(), getattr(result, name).double(), **close)


class TestEqualsStep:
    @pytest.mark.parametrize("case", CASES, ids=named)
    @pytest.mark.parametrize("steps", [1, 2, 5])
    def test_at_every_index(self, case, steps, monkeypatch):
        cls, config, eta = case
        scheduler = in_float64(ready(cls, config, num_inference_steps=steps))
        # float32(0.002)^2 - 0.002^2 is not 0: stock adds that much noise to its result
        tolerance = 4e-6 if cls is CMStochasticIterativeScheduler and not config.get("sigma_min") else 1e-6
        laws = list(walk(scheduler, eta, monkeypatch))
        assert len(laws) == steps
        assert all(law.std > 0 for law, *_ in laws[:-1])
        for law, noise, result in laws:
            assert_same(law, noise, result, tolerance)

    @pytest.mark.parametrize("case", ONE_OF_EACH, ids=named)
    def test_as_it_is_used_in_float32(self, case, monkeypatch):
        cls, config, eta = case
        for law, noise, result in walk(ready(cls, config), eta, monkeypatch, torch.float32):
            assert_same(law, noise, result, 1e-5)

    @pytest.mark.parametrize(
        ("cls", "schedule", "config", "eta"),
        [
            (LCMScheduler, {"timesteps": [999, 719, 359, 19]}, {}, 0.0),
            (LCMScheduler, {"timesteps": [999, 719, 359, 19], "strength": 0.5}, {}, 0.0),  # ends with noise
            (LCMScheduler, {"num_inference_steps": 4, "strength": 0.6}, {}, 0.0),
            (TCDScheduler, {"timesteps": [999, 719, 359, 19]}, {}, 0.3),
            (TCDScheduler, {"timesteps": [999, 719, 359, 19], "strength": 0.5}, {}, 0.3),
            (ConsistencyScheduler, {"timesteps": [999, 719, 359, 19], "gamma": 0.4}, {}, 0.0),
            (ConsistencyScheduler, {"num_inference_steps": 3, "strength": 0.5}, {}, 0.0),
            (CMStochasticIterativeScheduler, {"timesteps": [22, 0]}, {"sigma_min": 0.01}, 0.0),
            (CMStochasticIterativeScheduler, {"num_inference_steps": 40}, {"sigma_min": 0.01}, 0.0),
            (EDMConsistencyScheduler, {"num_inference_steps": 40, "gamma": 0.4}, {}, 0.0),
            (EDMConsistencyScheduler, {"sigmas": [80.0, 0.821], "gamma": 0.4}, {}, 0.0),
            (FlowMatchLCMScheduler, {"sigmas": [1.0, 0.7, 0.2]}, {}, 0.0),
            (FlowMatchLCMScheduler, {"num_inference_steps": 4}, {"shift_terminal": 0.1}, 0.0),
            (FlowMatchLCMScheduler, {"num_inference_steps": 4}, {"invert_sigmas": True}, 0.0),
            (
                SCMScheduler,
                {"num_inference_steps": 3, "timesteps": [1.5, 1.1, 0.6, 0.1], "max_timesteps": None},
                {},
                0.0,
            ),
            (DDIMScheduler, {"num_inference_steps": 50}, SD_DDIM, 1.0),
            (DDIMScheduler, {"num_inference_steps": 7}, {}, 0.2),
        ],
        ids=named,
    )
    def test_on_other_schedules(self, cls, schedule, config, eta, monkeypatch):
        for found in walk(in_float64(ready(cls, config, **schedule)), eta, monkeypatch):
            assert_same(*found)

    def test_the_injected_noise_is_recovered_from_a_recorded_run(self):
        scheduler, generator = ready(LCMScheduler), torch.Generator().manual_seed(3)
        x, output = normal(0).float(), normal(1).float()
        law = transition(scheduler, 0, output, x)
        taken = scheduler.step(output, scheduler.timesteps[0], x, generator=generator).prev_sample
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close((taken - law.mean) / law.std, noise, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("shape", [(2, 4, 3, 2, 2), (3, 6, 5)])
    def test_other_shapes(self, shape):
        scheduler = ready(LCMScheduler, THRESHOLD)
        x, output = normal(0, shape), normal(1, shape)
        law = transition(scheduler, 0, output, x)
        torch.testing.assert_close(
            law.denoised.double(), scheduler.step(output, 999, x).denoised, rtol=1e-6, atol=1e-6
        )


class TestLastStep:
    @pytest.mark.parametrize("case", [case for case in CASES if case[0] is not DDIMScheduler], ids=named)
    def test_is_the_result_without_noise(self, case):
        cls, config, eta = case
        law = transition(ready(cls, config), 3, normal(0), normal(1), eta)
        assert law.std == 0
        if config.get("set_alpha_to_one", cls is not TCDScheduler):  # else it ends at the noise of timestep 0
            assert torch.equal(law.mean, law.denoised)

    @pytest.mark.parametrize("sigma_min", [0.002, 0.1, 0.35])
    def test_has_none_of_the_noise_that_stock_rounds_to(self, sigma_min):
        """`CMStochasticIterativeScheduler` adds 7e-7, 3e-5 and NaN, at both places of the full grid that end there."""
        scheduler = ready(CMStochasticIterativeScheduler, {"sigma_min": sigma_min}, num_inference_steps=40)
        assert [float(transition(scheduler, i, normal(0), normal(1)).std) for i in (38, 39)] == [0, 0]
        assert transition(scheduler, 37, normal(0), normal(1)).std > sigma_min / 10

    def test_of_ddim_has_noise_where_stable_diffusion_ends_at_timestep_0(self):
        noisy, clean = (ready(DDIMScheduler, {**SD_DDIM, "set_alpha_to_one": one}) for one in (False, True))
        assert 0 < transition(noisy, 3, normal(0), normal(1), eta=1.0).std < 0.03
        law = transition(clean, 3, normal(0), normal(1), eta=1.0)
        assert law.std == 0
        assert torch.equal(law.mean, law.denoised)


class TestLaw:
    @pytest.mark.parametrize("kind", PREDICTION_TYPES)
    @pytest.mark.parametrize("case", ONE_OF_EACH[:4], ids=named)
    def test_denoised_is_the_clean_data_of_an_exact_output(self, case, kind):
        cls, config, eta = case
        scheduler = ready(cls, {**config, "prediction_type": kind})
        process, x0, noise = DiscreteVP.from_scheduler(scheduler), normal(0), normal(1)
        for index, t in enumerate(scheduler.timesteps):
            x = diffuse(process, x0, noise, t.expand(2))
            output = as_output(process, Prediction(x0, noise), x, t.expand(2), kind)
            denoised = transition(scheduler, index, output, x, eta).denoised.double()
            assert (denoised - x0).abs().max() < 2e-4  # c_skip x of the boundary condition, 2.5e-9 to 7e-6 of x

    @pytest.mark.parametrize("case", ONE_OF_EACH, ids=named)
    def test_each_sample_by_itself(self, case):
        cls, config, eta = case
        scheduler, x, output = ready(cls, config), normal(0, (5, 3, 4, 4)), normal(1, (5, 3, 4, 4))
        for index in range(4):
            together = transition(scheduler, index, output, x, eta)
            for i in range(5):
                alone = transition(scheduler, index, output[i : i + 1], x[i : i + 1], eta)
                assert torch.equal(alone.mean[0], together.mean[i])
                assert torch.equal(alone.std, together.std)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("case", ONE_OF_EACH, ids=named)
    def test_half_precision_is_computed_in_full(self, case, dtype):
        cls, config, eta = case
        scheduler, x, output = ready(cls, config), normal(0).to(dtype), normal(1).to(dtype)
        low, full = (transition(scheduler, 1, *pair, eta) for pair in ((output, x), (output.double(), x.double())))
        assert all(torch.equal(a, b) for a, b in zip(low, full, strict=True))

    @pytest.mark.parametrize("case", ONE_OF_EACH, ids=named)
    def test_no_scheduler_changes(self, case):
        cls, config, eta = case
        scheduler = ready(cls, config)
        before = state(scheduler)
        for index in (2, 0, 3):
            transition(scheduler, index, normal(0), normal(1), eta)
        assert state(scheduler) == before

    @pytest.mark.parametrize("case", [*ONE_OF_EACH, (LCMScheduler, CLIP, 0.0), (DDIMScheduler, CLIP, 1.0)], ids=named)
    @pytest.mark.parametrize("wanted", ["output", "sample"])
    def test_gradients_are_those_of_the_step(self, wanted, case, monkeypatch):
        cls, config, eta = case
        tensors, weights, noise = {"output": normal(0), "sample": normal(1)}, normal(2), normal(3)
        x = tensors[wanted].requires_grad_()
        for index in range(4):
            law = transition(ready(cls, config), index, *tensors.values(), eta)
            assert not law.std.requires_grad
            ours = torch.autograd.grad((law.mean * weights).sum(), x)[0]
            scheduler = in_float64(ready(cls, config))
            result = take_step(scheduler, index, *tensors.values(), eta, noise, monkeypatch).prev_sample
            theirs = torch.autograd.grad((result * weights).sum(), x)[0]
            assert theirs.abs().max() > 0
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def law_of(mean, std):
    return Transition(mean.float(), torch.tensor(std), mean.float())


class TestDensities:
    @pytest.mark.parametrize("std", [0.01, 0.7, 20.0])
    def test_log_prob_is_that_of_a_normal_distribution(self, std):
        law = law_of(normal(0), std)
        action = draw(law, normal(1))
        each = torch.distributions.Normal(law.mean.double(), float(law.std)).log_prob(action.double()).flatten(1)
        for reduction, expected in (("sum", each.sum(1)), ("mean", each.mean(1))):
            found = log_prob(law, action, reduction)
            assert found.shape == (2,)
            assert found.dtype == torch.float64
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(log_prob(law, action), log_prob(law, action, "sum"))

    def test_draws_have_the_moments_of_the_law(self):
        law = law_of(torch.tensor([[2.0, -1.0]]).expand(100_000, 2), 0.5)
        action = draw(law, normal(0, (100_000, 2)))
        torch.testing.assert_close(action.mean(0), torch.tensor([2.0, -1.0]), rtol=0, atol=0.008)
        torch.testing.assert_close(action.std(0), torch.tensor([0.5, 0.5]), rtol=0, atol=0.006)

    def test_kl_is_the_mean_log_ratio(self):
        size, std = 50_000, 0.7
        one, other = (law_of(normal(seed, (1, 6)).expand(size, 6), std) for seed in (0, 1))
        action = draw(one, normal(2, (size, 6)))
        ratio = log_prob(one, action).double() - log_prob(other, action).double()
        exact = kl_divergence(one, other)
        assert exact.shape == (size,)
        assert float(exact[0]) == pytest.approx(float((normal(0, (1, 6)) - normal(1, (1, 6))).square().sum() / 0.98))
        assert float(ratio.mean()) == pytest.approx(float(exact[0]), abs=4 * math.sqrt(2 * float(exact[0]) / size))
        torch.testing.assert_close(kl_divergence(one, other, "mean") * 6, exact)
        assert kl_divergence(one, one).abs().max() == 0

    def test_the_score_of_a_step_pulls_the_mean_to_the_action(self):
        scheduler, output, x = ready(LCMScheduler), normal(0).requires_grad_(), normal(1)
        law = transition(scheduler, 1, output, x)
        action = draw(law, normal(2)).detach()
        score = torch.autograd.grad(log_prob(law, action).sum(), output)[0]
        process, (t, following) = DiscreteVP.from_scheduler(scheduler), scheduler.timesteps[1:3]
        slope = -process.alpha(following) * process.sigma(t) / process.alpha(t)  # of the mean, c_out being 1 to 1e-9
        torch.testing.assert_close(score, slope * normal(2) / process.sigma(following), rtol=1e-4, atol=1e-5)


def stepped(scheduler, index=0, eta=0.0):
    return transition(scheduler, index, normal(0), normal(1), eta)


class TestBadInput:
    @pytest.mark.parametrize(
        ("call", "sentence"),
        [
            (
                lambda: stepped(EulerDiscreteScheduler()),
                "in a step of EulerDiscreteScheduler is not known; take one of",
            ),
            (lambda: stepped(ready(TCDScheduler)), "TCDScheduler is a policy with an eta above 0"),
            (lambda: stepped(ready(DDIMScheduler), eta=1.5), "at most 1; got 1.5"),
            (lambda: stepped(ready(ConsistencyScheduler, {"gamma": 0.0})), "deterministic with gamma 0"),
            (lambda: stepped(ready(EDMConsistencyScheduler, {"gamma": 0.0})), "deterministic with gamma 0"),
            (lambda: stepped(LCMScheduler()), "call set_timesteps"),
            (lambda: stepped(FlowMatchLCMScheduler()), "call set_timesteps"),
            (lambda: stepped(ready(LCMScheduler), index=4), "index must be from 0 to 3, as there are 4 steps; got 4"),
            (lambda: stepped(ready(LCMScheduler), index=-1), "got -1"),
            (lambda: stepped(ready(SCMScheduler), index=4), "from 0 to 3"),
            (lambda: stepped(ready(SCMScheduler, {"prediction_type": "epsilon"})), "knows 'trigflow'"),
            (lambda: stepped(ready(LCMScheduler, {"rescale_betas_zero_snr": True})), "Timestep 999 is pure noise"),
            (lambda: stepped(ready(FlowMatchLCMScheduler, {"scale_factors": [0.5, 1, 1, 1]})), "set_scale_factors"),
            (lambda: transition(ready(LCMScheduler), 0, normal(0), normal(1, (1, 3, 4, 4))), "model_output must have"),
            (lambda: log_prob(stepped(ready(LCMScheduler), 3), normal(0)), "adds no noise"),
            (lambda: kl_divergence(*[stepped(ready(LCMScheduler), 3)] * 2), "adds no noise"),
            (lambda: kl_divergence(*(stepped(ready(LCMScheduler), i) for i in (0, 1))), "take the same scheduler"),
            (lambda: log_prob(stepped(ready(LCMScheduler)), normal(0)[:1]), "action must have the shape"),
            (lambda: log_prob(stepped(ready(LCMScheduler)), normal(0), "total"), "'sum' or 'mean', got 'total'"),
            (lambda: draw(stepped(ready(LCMScheduler)), normal(0)[:1]), "noise must have the shape"),
        ],
    )
    def test_gets_a_sentence(self, call, sentence):
        with pytest.raises(ValueError, match=sentence):
            call()

    @pytest.mark.parametrize("cls", [ConsistencyScheduler, EDMConsistencyScheduler])
    def test_noise_of_another_law(self, cls):
        scheduler = ready(cls)
        scheduler.noise_sampler = lambda shape, *where: torch.zeros(shape)
        with pytest.raises(ValueError, match="noise_sampler is not known"):
            stepped(scheduler)

    def test_every_law_is_tested(self):
        assert {cls for cls, *_ in CASES} == {cls for cls, *_ in ONE_OF_EACH} == {*LAWS, *LAWS_WITH_ETA}
