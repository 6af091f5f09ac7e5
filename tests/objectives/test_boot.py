"""BOOT against data whose flow is known exactly, and students that are a line of the noise at every time."""

from itertools import pairwise

import pytest
import torch
from oracles import Gaussian, OracleNet, guided
from tiny import tiny_scheduler
from torch import nn

from cm_diffusers.diffusion.guidance import combine_linear
from cm_diffusers.diffusion.process import EDM, DiscreteVP, Prediction, RectifiedFlow
from cm_diffusers.diffusion.teaching import Guiding, Teaching, flow_teaching, vp_teaching
from cm_diffusers.objectives.boot import TOLD_SPAN, BOOTConfig, BOOTObjective
from cm_diffusers.types import Batch, Networks, Progress


VP, FIRST, LAST = DiscreteVP.from_scheduler(tiny_scheduler()), 0.02, 10.0
PROGRESS = Progress(0, 10)


def unscaled(t):
    return torch.zeros_like(t, dtype=torch.float64), torch.ones_like(t, dtype=torch.float64)


def call(network, x_t, t, cond):
    return network(x_t, t, cond.get("label"))[0]


def edm_teaching(steps):
    """EDM's times (alpha 1, sigma t), evenly from FIRST to LAST."""
    times = torch.linspace(FIRST, LAST, steps + 1, dtype=torch.float64)
    return Teaching(EDM(), "sample", times, times[1:], times[:-1], unscaled, call)


TEACHINGS = {
    "vp": lambda steps: vp_teaching(VP, "sample", None, steps),
    "edm": edm_teaching,
    "flow": lambda steps: flow_teaching(call, 3.0, steps),
}


def boot(kind="edm", steps=20, **settings):
    config = BOOTConfig(**{"w_min": 0.0, "w_max": 0.0, "num_ddim_timesteps": steps} | settings)
    return BOOTObjective(config, TEACHINGS[kind](steps), (4,))


def batch_of(size, label=1.0):
    labels = torch.full((size,), label, dtype=torch.float64)
    return Batch(None, {"label": labels}, {"label": torch.zeros_like(labels)})


@pytest.fixture(autouse=True)
def in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class SignalNet(nn.Module):
    """The signal on the exact way of `data`, from what `beginning` makes of pure noise; at the last time sees noise alone."""

    def __init__(self, objective, data, beginning):
        super().__init__()
        self.teaching, self.data, self.beginning = objective.teaching, data, beginning
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x, told, label=None, timestep_cond=None, return_dict=True):
        process, last = self.teaching.process, self.teaching.grid[-1]
        t = (last - told.double()) / TOLD_SPAN + self.teaching.before[0]
        t = t.round().long() if isinstance(process, DiscreteVP) else t
        end, column = last.expand(len(x)), (slice(None), None)
        noise = x / torch.hypot(process.alpha(last[None]), process.sigma(last[None]))
        from_noise = process.alpha(end)[column] * self.beginning(noise, end) + process.sigma(end)[column] * noise
        x_t = self.data.flow(process, from_noise, end, t)
        y = (x_t - process.sigma(t)[column] * noise) / process.alpha(t)[column]
        y = torch.where((t >= last - 1e-6)[column], self.beginning(noise, end), y)  # there alpha may be 0
        output = x - y if self.teaching.prediction_type == "flow_prediction" else y
        return (self.gain * output,)


def of_teacher(objective, data):
    """Its answer to pure noise."""
    return lambda noise, t: data.predict(objective.teaching.process, objective.start(noise), t).x0


def oracle_loss(objective, data, beginning=None, size=4000):
    student = SignalNet(objective, data, beginning or of_teacher(objective, data))
    teacher = OracleNet(objective.teaching.process, objective.teaching.prediction_type, data)
    torch.manual_seed(0)
    return objective(Networks(student, teacher=teacher), batch_of(size), PROGRESS)


@pytest.mark.parametrize("kind", ["edm", "vp"])
def test_the_signal_of_the_reference_starts_at_zero(kind):
    """y(t) = mu + sqrt((s^2 + t^2) / (s^2 + T^2)) (T e - mu) - t e in EDM's coordinates, and the like of VP."""
    objective, data, noise = boot(kind), Gaussian(0.3, 0.5), torch.randn(7, 4)
    net = SignalNet(objective, data, lambda noise, t: torch.zeros_like(noise))
    process, last = objective.teaching.process, objective.teaching.grid[-1]
    for t in objective.teaching.grid:
        alpha, sigma = (float(rate(t[None])) for rate in (process.alpha, process.sigma))
        a, b = (float(rate(last[None])) for rate in (process.alpha, process.sigma))
        ratio = ((alpha**2 * 0.25 + sigma**2) / (a**2 * 0.25 + b**2)) ** 0.5
        expected = (alpha * 0.3 + ratio * (b * noise - a * 0.3) - sigma * noise) / alpha
        y = objective.signal(net, noise, t.expand(7), {}, torch.zeros(7))
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zero", [False, True], ids=["teacher's answer", "no signal"])
@pytest.mark.parametrize(("solver", "factor"), [("ddim", 4), ("heun", 16)])
@pytest.mark.parametrize("kind", ["edm", "vp"])
def test_the_loss_of_the_exact_way_falls_with_its_order(kind, solver, factor, zero):
    """A step's error is O(delta^2), or O(delta^3) with Heun, and the loss the square of it over delta."""
    beginning = (lambda noise, t: torch.zeros_like(noise)) if zero else None
    counts = (50, 100, 200) if kind == "vp" else (40, 80, 160)
    losses = [
        oracle_loss(boot(kind, n, solver=solver), Gaussian(0.3, 2.0), beginning).logs["way"].item() for n in counts
    ]
    for coarse, fine in pairwise(losses):
        assert 0.8 * factor < coarse / fine < 1.2 * factor


@pytest.mark.parametrize("kind", TEACHINGS)
def test_the_boundary_holds_the_beginning_to_the_teacher_s_answer(kind):
    objective, data = boot(kind), Gaussian(0.3, 0.5)
    assert oracle_loss(objective, data).logs["boundary"] < 1e-9
    away = oracle_loss(objective, data, lambda noise, t: of_teacher(objective, data)(noise, t) + 2)
    assert away.logs["boundary"].item() == pytest.approx(4, rel=1e-4)
    assert away.value.item() == pytest.approx((away.logs["way"] + 4).item(), rel=1e-4)


@pytest.mark.parametrize("kind", TEACHINGS)
def test_a_step_of_ddim_is_the_papers(kind):
    """y_s = (1 - e^(lam_t - lam_s)) D + e^(lam_t - lam_s) y_t: towards the data, and never past it."""
    objective = boot(kind)
    t, s = objective.teaching.grid, objective.teaching.before
    process = objective.teaching.process
    ratio = torch.exp(process.half_log_snr(t) - process.half_log_snr(s))
    assert ((ratio >= 0) & (ratio < 1)).all()
    assert ((ratio[1:-1] > 0) & (process.half_log_snr(s)[1:-1] > process.half_log_snr(t)[1:-1])).all()
    y_t, noise, answer = torch.randn(3, len(t), 4)

    def denoise(x_t, t):
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        torch.testing.assert_close(x_t, alpha * y_t + sigma * noise)
        return Prediction(answer, (x_t - alpha * answer) / sigma)

    expected = (1 - ratio[:, None]) * answer + ratio[:, None] * y_t
    torch.testing.assert_close(objective.along(denoise, y_t, noise, t, s), expected, rtol=1e-6, atol=1e-6)


def test_guidance_is_the_teachers():
    cond, uncond = Gaussian(0.5, 0.5), Gaussian(-0.5, 0.5)
    objective = boot(w_min=3.0, w_max=3.0, steps=80, solver="heun")
    teacher, batch = OracleNet(EDM(), "sample", cond, uncond), batch_of(2000)
    for w, fits in ((3.0, True), (2.0, False)):
        solution = guided(cond, uncond, w)
        student = SignalNet(objective, solution, of_teacher(objective, solution))
        loss = objective(Networks(student, teacher=teacher), batch, PROGRESS).value
        assert (loss < 1e-3) == fits


def test_a_told_student_is_told():
    heard = []
    objective = boot(w_min=2.0, w_max=2.0)
    telling = Guiding(told=lambda cond, w: heard.append(w) or cond, combine=combine_linear)
    objective.teaching = Teaching(**vars(objective.teaching) | {"guiding": telling})
    data = Gaussian(0.3, 0.5)
    oracle = SignalNet(objective, data, of_teacher(objective, data))
    objective(Networks(oracle, teacher=OracleNet(EDM(), "sample", data)), batch_of(8), PROGRESS)
    assert [len(w) for w in heard] == [8, 8, 2]  # at t, at s, and a quarter of them at T
    assert all((w == 2).all() for w in heard)


class Lines(nn.Module):
    """a_t e + b_t of noise e: the shape of every solution where the teacher is linear."""

    def __init__(self, objective, a=0.0, b=0.0):
        super().__init__()
        self.teaching = objective.teaching
        self.lines = nn.Parameter(torch.tensor([[a, b]]).repeat(len(objective.teaching.grid) + 1, 1))
        self.spread = float(objective.start(torch.ones(1, 1)))

    def forward(self, x, told, label=None, timestep_cond=None, return_dict=True):
        share = (self.teaching.grid[-1] - told.double()) / TOLD_SPAN / (LAST - FIRST)
        a, b = self.lines[(share * len(self.teaching.grid)).round().long()].unbind(1)
        return (a[:, None] * x / self.spread + b[:, None],)


def learned(objective, data, b=0.0, steps=600):
    """Gain and offset of the answer at the first time, after training from the offset b."""
    torch.manual_seed(0)
    student, teacher = Lines(objective, b=b), OracleNet(EDM(), "sample", data)
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(Networks(student, teacher=teacher), batch_of(32), PROGRESS).value.backward()
        optimizer.step()
        decay.step()
    return student.lines[0].tolist()


def exact(objective, data, beginning):
    """The same of the flow from noise and what `beginning` makes of it."""
    noise, last = torch.tensor([[0.0], [1.0]]), objective.teaching.grid[-1].expand(2)
    x = beginning(noise, last) + LAST * noise
    first = torch.full((2,), FIRST)
    offset, one = (data.flow(EDM(), x, last, first) - FIRST * noise)[:, 0].tolist()
    return one - offset, offset


def test_a_linear_student_learns_the_map_of_the_flow():
    objective, data = boot(steps=16, solver="heun"), Gaussian(0.7, 2.0)
    assert learned(objective, data) == pytest.approx(exact(objective, data, of_teacher(objective, data)), rel=0.02)


def test_without_the_boundary_any_beginning_survives():
    objective, data = boot(steps=16, solver="heun", boundary_weight=0.0), Gaussian(0.7, 2.0)
    found = learned(objective, data, b=5.0)
    assert found == pytest.approx(exact(objective, data, lambda noise, t: torch.full_like(noise, 5.0)), rel=0.02)
    right = exact(objective, data, of_teacher(objective, data))
    assert abs(found[1] - right[1]) > 0.5


def test_the_target_passes_no_gradient():
    """Where T is never what a step ends at, its line learns from the boundary alone."""
    data = Gaussian(0.3, 0.5)
    for weight in (0.0, 1.0):
        objective = boot(steps=4, boundary_weight=weight)
        student = Lines(objective, b=1.0)
        objective(Networks(student, teacher=OracleNet(EDM(), "sample", data)), batch_of(64), PROGRESS).value.backward()
        assert student.lines.grad[-1].any() == (weight > 0)
        assert student.lines.grad[:-1].any(1).all()


def test_what_is_published_is_told_the_last_time():
    """At t = 0 the network is called exactly as a sampler of one step calls it, in whichever dtype of times."""
    for kind in TEACHINGS:
        objective, heard = boot(kind), []

        def network(x, told, label=None, return_dict=True, heard=heard, **_):
            heard.append((x, told))
            return (x,)

        noise = torch.randn(2, 4)
        objective.signal(network, noise, objective.teaching.before[:1].expand(2), {}, torch.zeros(2))
        ((x, told),) = heard
        assert torch.equal(told.double(), objective.teaching.grid[-1].double().expand(2))
        if kind != "edm":
            assert torch.equal(x, noise)


def zero_snr():
    return DiscreteVP(torch.cat([VP.alphas_cumprod[:-1], torch.zeros(1)]))


@pytest.mark.parametrize(("prediction_type", "solver"), [("epsilon", "ddim"), ("v_prediction", "heun")])
def test_without_signal_at_the_end_what_cannot_be_is_refused(prediction_type, solver):
    config = BOOTConfig(solver=solver)
    with pytest.raises(
        ValueError, match=r"^The teacher has zero terminal SNR: .* needs a v-prediction or sample teacher"
    ):
        BOOTObjective(config, vp_teaching(zero_snr(), prediction_type, None), (4,))


def test_without_signal_at_the_end_a_v_teacher_leads():
    data = Gaussian(0.3, 0.5)
    objective = BOOTObjective(BOOTConfig(w_min=0.0, w_max=0.0), vp_teaching(zero_snr(), "v_prediction", None), (4,))
    student = OracleNet(zero_snr(), "v_prediction", data)
    teacher = OracleNet(zero_snr(), "v_prediction", data)
    assert objective(Networks(student, teacher=teacher), batch_of(8), PROGRESS).value.isfinite()


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"^Unknown --solver 'euler'; one of ddim, heun, dpm_2s\.$"):
        BOOTConfig(solver="euler")
    with pytest.raises(ValueError, match=r"^--w_min 3.0 is above --w_max 2.0; swap them\.$"):
        BOOTConfig(w_min=3.0, w_max=2.0)
    with pytest.raises(ValueError, match=r"^--boundary_weight must be at least 0, but it is -1.0\.$"):
        BOOTConfig(boundary_weight=-1.0)
    assert isinstance(boot("flow").teaching.process, RectifiedFlow)
