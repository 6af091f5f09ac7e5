"""Distribution matching on Gaussians, whose denoisers are known in closed form (2311.18828; as in rCM, 2510.08431)."""

import math
from itertools import pairwise

import pytest
import torch
from oracles import Gaussian

from cm_diffusers.diffusion.distribution_matching import DistributionMatching, matching_gradient
from cm_diffusers.diffusion.process import Prediction, TrigFlow, append_dims, diffuse
from cm_diffusers.diffusion.trigflow import velocity


D = 0.5  # sigma_data
PROCESS = TrigFlow(D)
MATCHING = DistributionMatching(PROCESS, 0.002, 80.0)
DATA = Gaussian(0.3, 0.7)


def denoiser(law):
    return lambda x, t: law.predict(PROCESS, x, t)


def flow(law):
    """The perfect student's jump."""
    return lambda x, t: Prediction(law.consistency(PROCESS, x, t), x)


def renoised(law, t, size=6):
    t = torch.full((size,), t, dtype=torch.float64)
    x0, noise = torch.randn(2, size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0 = law.mean + law.std * x0
    return x0, diffuse(PROCESS, x0, noise, t), t


@pytest.mark.parametrize("t", [0.1, 0.8, 1.5])
def test_the_gradient_vanishes_for_samples_of_the_data_and_their_own_score(t):
    x0, x, t = renoised(DATA, t)
    teacher, fake = DATA.predict(PROCESS, x, t).x0, Gaussian(0.3, 0.7).predict(PROCESS, x, t).x0
    assert matching_gradient(x0, teacher, fake).abs().max() == 0


def test_the_gradient_is_the_difference_of_the_means():
    """Of two laws of one std S the denoisers differ by (mu_fake - mu_data) (1 - cos^2 S^2 / v), v = cos^2 S^2 + sin^2 sigma_data^2."""
    own = Gaussian(1.1, 0.7)
    x0, x, t = renoised(own, 0.8)
    cos, sin = math.cos(0.8), math.sin(0.8)
    v = cos**2 * 0.49 + sin**2 * D**2
    teacher = 0.3 + cos * 0.49 / v * (x - cos * 0.3)
    step = (1.1 - 0.3) * (1 - cos**2 * 0.49 / v) / (x0 - teacher).abs().mean(1)
    found = matching_gradient(x0, DATA.predict(PROCESS, x, t).x0, own.predict(PROCESS, x, t).x0)
    torch.testing.assert_close(found, step[:, None].expand(-1, 4), rtol=1e-12, atol=0)
    assert found.min() > 0.1  # a step against it goes to the data


def test_samples_that_the_teacher_leaves_alone_have_a_finite_gradient():
    x0 = torch.ones(2, 3)
    assert matching_gradient(x0, x0, x0).tolist() == [[0.0] * 3] * 2


def test_an_affine_student_gets_the_data_s_law():
    """x0 = a + b z of pure noise, by the matching loss alone; the fake score is that of N(a, b^2)."""
    torch.manual_seed(0)
    a, b = (torch.tensor(value, requires_grad=True) for value in (-0.5, 0.2))
    steps = 400
    optimizer = torch.optim.Adam([a, b], lr=0.05)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)

    def jump(x, t):
        return Prediction(a + b * x / (D * append_dims(t.sin(), x)), x)

    for _ in range(steps):
        optimizer.zero_grad()
        fake = denoiser(Gaussian(a.item(), b.item()))
        MATCHING.student_loss(jump, denoiser(DATA), fake, torch.zeros(256, 4), 0).mean().backward()
        optimizer.step()
        decay.step()
    assert a.item() == pytest.approx(DATA.mean, rel=0.03)
    assert b.item() == pytest.approx(DATA.std, rel=0.03)


@pytest.mark.parametrize("step", range(5))
def test_a_rollout_of_the_exact_student_has_the_data_s_law(step):
    torch.manual_seed(0)
    x0 = MATCHING.rollout(flow(DATA), torch.zeros(20_000, 2), step)
    assert x0.mean().item() == pytest.approx(DATA.mean, abs=0.02)  # 6 standard errors
    assert x0.std().item() == pytest.approx(DATA.std, abs=0.015)


@pytest.mark.parametrize(("step", "steps"), [(0, 1), (1, 2), (3, 4), (4, 1), (6, 3)])
def test_a_rollout_starts_at_noise_and_learns_in_its_last_step(step, steps):
    seen, gain = [], torch.ones((), requires_grad=True)

    def jump(x, t):
        seen.append((x, t, torch.is_grad_enabled()))
        return Prediction(gain * x, x)

    torch.manual_seed(0)
    x0 = MATCHING.rollout(jump, torch.zeros(2000, 2), step)
    (first, start, _), *_ = seen
    assert [learns for *_, learns in seen] == [False] * (steps - 1) + [True]
    torch.testing.assert_close(start, torch.full_like(start, math.atan(80 / D)))
    assert first.std().item() == pytest.approx(D, rel=0.05)
    assert all((after <= before).all() for (_, before, _), (_, after, _) in pairwise(seen))
    (slope,) = torch.autograd.grad(x0.sum(), gain)
    assert slope.item() == pytest.approx(seen[-1][0].sum().item(), rel=1e-4)


def test_times_are_log_normal_about_the_data_s_scale():
    torch.manual_seed(0)
    sigma = (D * MATCHING.times(20_000).tan() / D).log()
    assert sigma.mean().item() == pytest.approx(0, abs=0.05)
    assert sigma.std().item() == pytest.approx(1.6, abs=0.05)


def test_the_fake_score_s_loss_is_least_for_the_samples_own():
    """That of any denoiser is E |F - v / sigma_data|^2; of the exact one, the variance of v, E[Var(v | x_t)]."""
    losses = []
    for law in (DATA, Gaussian(0.5, 0.7), Gaussian(0.3, 0.4)):
        torch.manual_seed(0)
        losses.append(MATCHING.fake_loss(flow(DATA), denoiser(law), torch.zeros(40_000, 2), 0).mean().item())
    torch.manual_seed(1)
    t = MATCHING.times(40_000)
    v = t.cos() ** 2 * DATA.std**2 + t.sin() ** 2 * D**2
    assert losses[0] == pytest.approx((DATA.std**2 / v).mean().item(), rel=0.03)  # of v / sigma_data, given x_t
    assert losses[0] < min(losses[1:]) - 0.01


def test_the_fake_score_s_loss_is_of_velocities():
    """|v_D - v|^2 / sigma_data^2 = |D - x0|^2 / (sigma_data sin(t))^2, as the published code has it but for sigma_data."""
    x0, x, t = renoised(DATA, 0.8)
    noise = (x - math.cos(0.8) * x0) / (D * math.sin(0.8))
    found = DATA.predict(PROCESS, x, t)
    error = (velocity(found, t, D) - velocity(Prediction(x0, noise), t, D)) / D
    torch.testing.assert_close(error, (x0 - found.x0) / (D * math.sin(0.8)), rtol=1e-9, atol=1e-12)
