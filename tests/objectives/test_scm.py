"""sCM on data whose flow, consistency function and tangents are known in closed form (2410.11081)."""

import math

import pytest
import torch
from oracles import Gaussian, Mixture
from torch import nn

from cm_diffusers.diffusion.guidance import guidance_embedding
from cm_diffusers.diffusion.process import DiscreteVP, Prediction, TrigFlow, append_dims, diffuse
from cm_diffusers.diffusion.teaching import Guiding, embedded_in_time
from cm_diffusers.diffusion.trigflow import TrigFlowView, velocity
from cm_diffusers.errors import UserError
from cm_diffusers.models.time_weight import WithTimeWeight
from cm_diffusers.objectives.scm import NORMALIZATIONS, SCMConfig, SCMObjective
from cm_diffusers.types import Batch, Networks, Progress


D = 0.5  # sigma_data
TIMES = torch.tensor([0.02, 0.4, 0.8, 1.2, 1.5], dtype=torch.float64)
DATA = {
    "gaussian": Gaussian(0.3, 0.7),
    "as_assumed": Gaussian(0.0, D),
    "mixture": Mixture((0.3, 0.7), (-0.8, 0.5), (0.2, 0.3)),
}


class TrigNet(nn.Module):
    """A network of TrigFlow's own kind, called as (x / sigma_data, t): `answer` is its F."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, shown, told, return_dict=True):
        return (self.answer(shown * D, told).to(shown.dtype),)


def jump_to(data, border=0.0):
    """F of the perfect student: cos(u) x - sin(u) sigma_data F is where the flow is at `border`, u = t - border."""

    def answer(x, t):
        u = append_dims(t - border, x)
        there = data.flow(TrigFlow(D), x, t, torch.full_like(t, border))
        return (torch.cos(u) * x - there) / (D * torch.sin(u))

    return TrigNet(answer)


def denoising(data):
    """F of the perfect diffusion model."""
    return TrigNet(lambda x, t: velocity(data.predict(TrigFlow(D), x, t), t, D) / D)


def objective(**settings):
    settings = {"tangent_warmup_steps": 0, "learned_weight": False} | settings
    return SCMObjective(SCMConfig(**settings), TrigFlowView(D))


def samples(data, size=5, seed=0):
    """Samples `(5, size)` at `TIMES`, and dx / dt of the flow there."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, len(TIMES), size, dtype=torch.float64, generator=generator)
    x = diffuse(TrigFlow(D), x0 * 0.6 + 0.1, noise, TIMES)
    return x, velocity(data.predict(TrigFlow(D), x, TIMES), TIMES, D)


def tangent(student, x, dx, r=1.0, **settings):
    return objective(**settings).tangent(student, {}, x, TIMES, dx, r)


# ---- closed forms


@pytest.mark.parametrize("name", DATA)
def test_the_tangent_of_the_exact_student_vanishes(name):
    x, dx = samples(DATA[name])
    g = tangent(jump_to(DATA[name]), x, dx)
    assert g.abs().max() < (1e-10 if name != "mixture" else 1e-6)
    assert tangent(denoising(DATA[name]), x, dx).abs().max() > 0.01  # another student's does not


def test_the_tangent_of_the_teacher_itself():
    """Of a student that starts as the denoiser: -cos(t) S^2 sigma_data^2 sin(t) / v^2 (x - cos(t) mu), v = cos^2 S^2 + sin^2 sigma_data^2.

    Times cos(t), as in Algorithm 1.
    """
    data = DATA["gaussian"]
    x, dx = samples(data)
    cos, sin = torch.cos(TIMES)[:, None], torch.sin(TIMES)[:, None]
    v = cos**2 * data.std**2 + sin**2 * D**2
    slope = -(data.std**2 * D**2 * sin / v**2) * (x - cos * data.mean)
    torch.testing.assert_close(tangent(denoising(data), x, dx), cos * slope, rtol=1e-9, atol=1e-12)


def test_a_student_that_answers_zero():
    """Of data as assumed the velocity is 0 and the map the identity: g = -cos(t) sin(t) x."""
    x, dx = samples(DATA["as_assumed"])
    assert dx.abs().max() < 1e-14
    wanted = -(torch.cos(TIMES) * torch.sin(TIMES))[:, None] * x
    zero = TrigNet(lambda x, t: torch.zeros_like(x))
    torch.testing.assert_close(tangent(zero, x, dx), wanted, rtol=1e-13, atol=0)
    exact = jump_to(DATA["as_assumed"])(x / D, TIMES)[0]
    torch.testing.assert_close(exact, -torch.tan(TIMES / 2)[:, None] * x / D, rtol=1e-9, atol=1e-12)


def test_what_warms_up():
    """r scales the derivative and x alone: at 0 what is left pulls towards diffusion."""
    x, dx = samples(DATA["gaussian"])
    student = TrigNet(lambda x, t: torch.sin(3 * x) * torch.cos(t)[:, None])
    none, half, whole = (tangent(student, x, dx, r) for r in (0.0, 0.5, 1.0))
    output = student(x / D, TIMES)[0]
    torch.testing.assert_close(none, -(torch.cos(TIMES) ** 2)[:, None] * (D * output - dx), rtol=1e-13, atol=0)
    torch.testing.assert_close(half, (none + whole) / 2, rtol=1e-12, atol=1e-15)
    warming = objective(tangent_warmup_steps=40)
    assert [warming.warmup(Progress(step, 100)) for step in (0, 10, 40, 99)] == [0, 0.25, 1, 1]


@pytest.mark.parametrize("kind", ["jvp", "central", "one_sided", "semi"])
def test_every_kind_of_tangent_is_the_naive_one(kind):
    """cos(t) df / dt, differentiated by torch in reverse along the flow, whatever has been rearranged."""
    x, dx = samples(DATA["gaussian"])
    student = TrigNet(lambda x, t: torch.sin(3 * x) * torch.cos(2 * t)[:, None])

    def f(step):
        moved, t = x + step * dx, TIMES + step
        cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
        return cos * moved - sin * D * student(moved / D, t)[0]

    naive = torch.cos(TIMES)[:, None] * torch.func.jacrev(f)(torch.zeros((), dtype=torch.float64))
    bound = {"jvp": 1e-12, "central": 1e-5, "one_sided": 2e-3, "semi": 1e-5}[kind]
    found = tangent(student, x, dx, tangent=kind, tangent_step=None if kind == "jvp" else 1e-3)
    torch.testing.assert_close(found, naive, rtol=0, atol=bound)


class HalfNet(nn.Module):
    """In float16, told ln(sigma) 250-fold as UNets are: its answer turns once where that has moved by 100."""

    def forward(self, shown, told, return_dict=True):
        shown, told = shown.half(), told.half()
        return (shown * torch.cos(told[:, None] / 16) + torch.sin(told[:, None] / 16),)


def test_the_rearranged_tangent_is_finite_where_the_naive_one_overflows():
    view, student = TrigFlowView(D, "edm", "adm"), HalfNet()
    t = torch.tensor([0.004, 0.8, 1.5645], dtype=torch.float64)
    x, dx = torch.full((3, 4), 0.4), torch.full((3, 4), 0.3)
    g = SCMObjective(SCMConfig(), view).tangent(student, {}, x, t, dx, 1.0)
    assert g.isfinite().all()
    told = torch.func.jvp(view.told, (t,), (torch.ones_like(t),))[1].half()  # d told / dt
    naive = torch.func.jvp(lambda told: student(x / D, told)[0], (view.told(t).float(),), (told.float() * 16,))[1]
    assert told.max() > 4e4  # a factor of 2 below the largest number
    assert not naive.half().isfinite().all()


@pytest.mark.parametrize("kind", ["central", "one_sided", "semi"])
@pytest.mark.parametrize("conditioning", ["own", "adm"])
def test_no_step_of_a_difference_leaves_the_times(kind, conditioning):
    """Many units are wider than all that is left beside little noise or much, beyond which there is no sigma."""
    vp = DiscreteVP(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64))
    view = TrigFlowView(D, "edm", conditioning, vp if conditioning == "own" else None)
    student, t = TrigNet(lambda x, told: x * told[:, None] / 1000), torch.tensor([0.07, 1.2], dtype=torch.float64)
    x, dx = torch.full((2, 4), 0.4), torch.full((2, 4), 0.3)
    method = SCMObjective(SCMConfig(sigma_min=0.04, sigma_max=9.0, tangent=kind, tangent_step=300.0), view)
    g, exact = (
        one.tangent(student, {}, x, t, dx, 1.0)
        for one in (method, SCMObjective(SCMConfig(sigma_min=0.04, sigma_max=9.0), view))
    )
    assert g.isfinite().all()
    assert (g - exact).abs().max() < 0.3 * exact.abs().max()


def test_data_tells_on_average_what_the_teacher_does():
    """E[g of sCT | x_t] = g of sCD, before it is normalised, for any student."""
    data, n = DATA["gaussian"], 200_000
    process, t = TrigFlow(D), torch.tensor([0.9], dtype=torch.float64)
    cos, sin = math.cos(0.9), math.sin(0.9)
    x = torch.tensor([[0.7]], dtype=torch.float64)
    precision = 1 / data.std**2 + (cos / (D * sin)) ** 2
    mean = data.predict(process, x, t).x0
    generator = torch.Generator().manual_seed(0)
    x0 = mean + torch.randn(n, 1, dtype=torch.float64, generator=generator) / precision**0.5
    times, repeated = t.repeat(n), x.repeat(n, 1)
    dx = velocity(Prediction(x0, (repeated - cos * x0) / (D * sin)), times, D)
    student = TrigNet(lambda x, t: torch.sin(3 * x) * torch.cos(2 * t)[:, None])
    of_data = objective().tangent(student, {}, repeated, times, dx, 1.0)
    of_teacher = objective().tangent(student, {}, x, t, velocity(data.predict(process, x, t), t, D), 1.0)
    error = of_data.std().item() / n**0.5
    assert of_data.mean().item() == pytest.approx(of_teacher.item(), abs=4 * error)
    assert error < 0.05 * abs(of_teacher.item())


@pytest.mark.parametrize("segments", [2, 4])
def test_a_multistep_student_is_exact_in_its_segment(segments):
    data = DATA["gaussian"]
    x, dx = samples(data)
    method = objective(segments=segments)
    borders = method.lower(TIMES)
    assert borders.unique().tolist() == pytest.approx([method.t_max * k / segments for k in range(segments)])

    def answer(x, t):
        u = append_dims(t - borders, x)
        return (torch.cos(u) * x - data.flow(TrigFlow(D), x, t, borders)) / (D * torch.sin(u))

    assert method.tangent(TrigNet(answer), {}, x, TIMES, dx, 1.0).abs().max() < 1e-10
    assert method.tangent(jump_to(data), {}, x, TIMES, dx, 1.0).abs().max() > 0.01


# ---- the loss


class Affine(nn.Module):
    """F = slope(t) x / sigma_data, where the slope is tan(t / 2) times a line in t."""

    def __init__(self):
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(2))

    def slope(self, t):
        return torch.tan(t / 2) * sum(a * t**k for k, a in enumerate(self.coefficients))

    def forward(self, shown, told, return_dict=True):
        return (self.slope(told)[:, None] * shown,)


@pytest.mark.parametrize(("kind", "size"), [("scd", 64), ("sct", 2048)])
def test_an_affine_student_learns_the_exact_slope(kind, size):
    """F = -tan(t / 2) x / sigma_data of data as assumed, within one per cent."""
    torch.manual_seed(0)
    student, steps = Affine(), 300
    nets = Networks(student, teacher=denoising(DATA["as_assumed"]) if kind == "scd" else None)
    method = objective(
        tangent_warmup_steps=50, tangent_normalization="l2" if kind == "scd" else "none", p_mean=-0.4, p_std=1.0
    )
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for step in range(steps):
        optimizer.zero_grad()
        method(nets, Batch(D * torch.randn(size, 4)), Progress(step, steps)).value.backward()
        optimizer.step()
        decay.step()
    t = torch.tensor([0.3, 0.6, 1.0, 1.4])
    torch.testing.assert_close(student.slope(t), -torch.tan(t / 2), rtol=0.01, atol=0)


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_normalization(kind):
    g = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.3, -0.4, 0.0, 0.0]])
    factors = {"l2": [1 / 5.1, 1 / 0.6], "rms": [1 / 2.6, 1 / 0.35], "none": [1, 1]}
    wanted = g * torch.tensor(factors[kind])[:, None] if kind in factors else g.clamp(-1, 1)
    torch.testing.assert_close(NORMALIZATIONS[kind](g, 0.1), wanted)


def test_the_gradient_is_that_of_the_normalised_tangent():
    """d / dF of ||F - sg(F) - g||^2 / D is -2 g / D, by sample."""
    x, dx = samples(DATA["gaussian"], size=4)
    method = objective()
    student = Affine().double()
    student.coefficients.data.fill_(0.3)
    batch = Batch(x.float())
    torch.manual_seed(3)
    loss = method(Networks(student), batch, Progress(5, 10))
    loss.value.backward()
    torch.manual_seed(3)
    t, noise = method.times(5), torch.randn_like(batch.x0)
    x_t = diffuse(TrigFlow(D), batch.x0, noise, t)
    g = method.tangent(student, {}, x_t, t, velocity(Prediction(batch.x0, noise), t, D), 1.0)
    g = g / (g.norm(dim=1, keepdim=True) + 0.1)
    assert loss.value.item() == pytest.approx(g.square().mean(1).mean().item(), rel=1e-5)
    basis = torch.tan(t / 2)[:, None] * t[:, None] ** torch.arange(2)
    wanted = -(2 / 20) * ((g * x_t / D).sum(1)[:, None] * basis).sum(0)
    torch.testing.assert_close(student.coefficients.grad, wanted, rtol=1e-4, atol=1e-6)


def test_the_prior_weight_is_of_sigma():
    method, weighted = objective(), objective(prior_weight=True)
    values = []
    for one in (method, weighted):
        torch.manual_seed(3)
        values.append(one(Networks(Affine()), Batch(torch.full((1, 4), 0.4)), Progress(5, 10)).value.item())
    torch.manual_seed(3)
    sigma = D * method.times(1).tan().item()
    assert values[1] == pytest.approx(values[0] / sigma, rel=1e-5)
    assert not 0.8 < sigma < 1.25


def test_times_are_log_normal_between_the_ends():
    method = objective(p_mean=-0.7, p_std=0.6)
    logs = (D * method.times(20_000).tan()).log()
    assert (logs.mean().item(), logs.std().item()) == (pytest.approx(-0.7, abs=0.02), pytest.approx(0.6, abs=0.02))
    sigma = D * objective(sigma_min=0.3, sigma_max=0.5).times(1000).tan()
    assert sigma.aminmax() == (pytest.approx(0.3, abs=2e-3), pytest.approx(0.5, abs=2e-3))


class Poisoned(Affine):
    """NaN has got into the derivative of the second sample."""

    def forward(self, shown, told, return_dict=True):
        output = super().forward(shown, told)[0]
        bad = torch.arange(len(output))[:, None] == 1
        return (output + torch.where(bad, ((told - told.detach()).abs().sqrt())[:, None], 0),)


def test_a_sample_that_is_not_finite_is_left_out():
    student = Poisoned()
    loss = objective()(Networks(student), Batch(torch.randn(4, 3)), Progress(5, 10))
    loss.value.backward()
    assert loss.logs["left_out"].item() == 0.25
    assert loss.value.isfinite()
    assert student.coefficients.grad.isfinite().all()


def test_the_learned_weight_makes_all_times_count_alike():
    """At the optimum of exp(w) e - w the weighted residual is 1 at every time; w starts at 0."""
    torch.manual_seed(0)
    student = WithTimeWeight(TrigNet(lambda x, t: torch.zeros_like(x) + 0 * t[:, None]))
    method = objective(learned_weight=True, tangent_normalization="none")
    assert student(torch.zeros(2, 3), torch.rand(2))[1].tolist() == [0, 0]
    optimizer = torch.optim.Adam(student.head.parameters(), lr=0.05)
    for step in range(300):
        optimizer.zero_grad()
        loss = method(Networks(student), Batch(D * torch.randn(256, 8)), Progress(step, 300))
        loss.value.backward()
        optimizer.step()
    many = method(Networks(student), Batch(D * torch.randn(20_000, 8)), Progress(300, 300)).logs
    assert many["residual_low"].item() == pytest.approx(1, abs=0.15)
    assert many["residual_high"].item() == pytest.approx(1, abs=0.15)


def test_dropout_masks_are_those_of_the_tangent():
    """Without a change of masks F - sg(F) is 0 but for g: the loss is g's mean square though dropout is on."""

    class Dropped(Affine):
        seen = []

        def forward(self, shown, told, return_dict=True):
            mask = nn.functional.dropout(torch.ones_like(shown), 0.5)
            self.seen.append(mask if not hasattr(mask, "value") else mask.value)
            return (super().forward(shown * mask, told)[0],)

    student = Dropped()
    objective(tangent="central")(Networks(student), Batch(torch.randn(4, 3)), Progress(5, 10))
    first, *others = student.seen
    assert len(others) == 3
    assert all(torch.equal(first, other) for other in others)


class Told(nn.Module):
    """F is what it is told, and what it was told is kept."""

    def forward(self, shown, told, level, timestep_cond=None, return_dict=True):
        self.guidance = timestep_cond
        return (level[:, None].expand_as(shown),)


def test_the_student_is_told_the_guidance_that_its_teacher_gives():
    """F of the teacher is F(c) + w (F(c) - F(empty)), with a w of its own for each sample."""
    torch.manual_seed(0)
    method = SCMObjective(SCMConfig(), TrigFlowView(D), (1.0, 3.0), Guiding(told=embedded_in_time(16)))
    batch = Batch(torch.zeros(500, 2), {"level": torch.full((500,), 0.7)}, {"level": torch.full((500,), 0.2)})
    cond, teach = method.guided(batch, Networks(Told(), teacher=Told()))
    t = torch.full((500,), 0.8, dtype=torch.float64)
    w = (velocity(teach(batch.x0, t), t, D)[:, 0] / D - 0.7) / 0.5
    torch.testing.assert_close(cond["timestep_cond"], guidance_embedding(w, 16), rtol=0, atol=5e-3)
    assert w.aminmax() == (pytest.approx(1, abs=0.05), pytest.approx(3, abs=0.05))
    assert torch.equal(cond["level"], batch.cond["level"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tangent_step": 0.1}, "--tangent_step has no effect with --tangent jvp"),
        (
            {"tangent_normalization": "clip", "tangent_c": 1.0},
            "--tangent_c has no effect with --tangent_normalization clip",
        ),
        (
            {"segments": 5, "sigma_min": 0.2},
            r"--segments 5 would have some below --sigma_min 0\.2, .* give at most 4\.",
        ),
    ],
)
def test_what_has_no_effect_is_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        objective(**settings)
    objective(**settings | {"tangent": "central", "tangent_normalization": "l2", "segments": 4})


def test_guidance_needs_a_null_condition():
    method = SCMObjective(SCMConfig(learned_weight=False), TrigFlowView(D), (2.0, 2.0))
    with pytest.raises(UserError, match="null condition"):
        method(Networks(Affine(), teacher=Affine()), Batch(torch.randn(4, 3)), Progress(0, 10))


# ---- training


class Small(nn.Module):
    """A network of one dimension, smooth in x and t."""

    def __init__(self, width=64):
        super().__init__()
        layers = [
            nn.Linear(4, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
        ]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, shown, told, return_dict=True):
        t = told.to(shown)[:, None]
        return (self.layers(torch.cat([shown, t, torch.sin(t), torch.cos(t)], dim=1)),)


def wasserstein(samples, data, count):
    """W2 to a one-dimensional mixture, by quantiles."""
    grid = torch.linspace(-3, 3, 20_001, dtype=torch.float64)
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    cdf = data.cdf(TrigFlow(D), grid, torch.zeros(1, dtype=torch.float64))
    quantiles = grid[torch.searchsorted(cdf, levels)]
    return (samples.flatten().sort().values.double() - quantiles).square().mean().sqrt().item()


def sampled(student, times, count):
    """Multistep consistency sampling with fresh noise."""
    x0, process = torch.zeros(count, 1), TrigFlow(D)
    for t in times:
        at = torch.full((count,), t, dtype=torch.float64)
        x = diffuse(process, x0, torch.randn(count, 1), at)
        x0 = math.cos(t) * x - math.sin(t) * D * student(x / D, at)[0].detach()
    return x0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scd", "sct"])
def test_samples_of_a_mixture(kind):
    """Distilled with the closed-form teacher, or from data, one and two steps come near the data, the teacher's do not."""
    torch.manual_seed(0)
    data, count, steps = DATA["mixture"], 4096, 3000
    student, teacher = Small(), denoising(data)
    nets = Networks(student, teacher=teacher if kind == "scd" else None)
    kind_of = "l2" if kind == "scd" else "none"  # a normalised tangent of data points to a median, not to the mean
    method = objective(tangent_warmup_steps=500, p_mean=-0.6, p_std=1.4, tangent_normalization=kind_of)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    means, stds = torch.tensor(data.means), torch.tensor(data.stds)
    for step in range(steps):
        which = torch.multinomial(torch.tensor(data.weights), 512, replacement=True)
        batch = Batch((means[which] + stds[which] * torch.randn(512))[:, None])
        optimizer.zero_grad()
        method(nets, batch, Progress(step, steps)).value.backward()
        optimizer.step()
        decay.step()
    t_max = math.atan(80 / D)
    own = wasserstein(sampled(teacher, [t_max], count), data, count)
    one, two = (wasserstein(sampled(student, times, count), data, count) for times in ([t_max], [t_max, 1.1]))
    assert own > 0.5
    assert one < (0.05 if kind == "scd" else 0.1)
    assert two < (0.05 if kind == "scd" else 0.1)
