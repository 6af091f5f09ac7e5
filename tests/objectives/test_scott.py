"""SCott against data whose solution is known exactly, and the play of student and critic."""

import math
import re
from itertools import count, pairwise, product
from types import SimpleNamespace

import pytest
import torch
from latent_objectives import scott_of
from oracles import Gaussian, Mixture, OracleNet, lcm_scalings
from tiny import tiny_scheduler, tiny_unet
from torch import nn
from toys import assert_same, forget_accelerate, tensors, toy_trainer, weights

from cm_diffusers.diffusion.process import DiscreteVP, diffuse
from cm_diffusers.diffusion.solvers import ddim_noise, sub_times
from cm_diffusers.engine.averages import ema_update
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.models.critics import CriticConfig, unused_flags
from cm_diffusers.models.students import frozen_copy
from cm_diffusers.objectives.scott import SCottConfig
from cm_diffusers.tasks.text_to_image import critic_optim
from cm_diffusers.types import Batch, Networks, Progress


VP = DiscreteVP.from_scheduler(tiny_scheduler())
TYPES = ["epsilon", "v_prediction", "sample"]
NOISES = {"eta": {"sde": "ddim", "eta": 0.3}, "sde_5": {}, "sde": {"noise_scale": "sde", "solver_order": 1}}


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


def scott(prediction_type="sample", dim=None, critic=True, process=VP, **settings):
    settings = {"w_min": 0.0, "w_max": 0.0, "adversarial_start": 0, "adversarial_ramp": 0} | settings
    return scott_of(SCottConfig(**settings), process, prediction_type, dim, critic)


def draw(data, *shape):
    return data.mean + data.std * torch.randn(shape, dtype=torch.float64)


class Linear(nn.Module):
    """The student f(x, t) = gain[t] x + bias[t]: every time has its own."""

    def __init__(self, gain=None):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1000) if gain is None else gain)
        self.bias = nn.Parameter(torch.zeros(1000))

    def forward(self, x_t, t, label=None, return_dict=True):
        c_skip, c_out = (c.to(x_t.dtype)[:, None] for c in lcm_scalings(t))
        f = self.gain[t][:, None] * x_t + self.bias[t][:, None]
        return (torch.where(c_out == 0, x_t, (f - c_skip * x_t) / c_out.clamp(min=1e-9)),)


class Recorder(nn.Module):
    """A critic of numbers that keeps what it is shown."""

    def __init__(self, answer=lambda x, t: x.flatten(1)):
        super().__init__()
        self.scale, self.answer, self.calls = nn.Parameter(torch.ones(())), answer, []

    def forward(self, x, t, cond):
        self.calls.append((x.detach(), t, cond))
        return self.scale * self.answer(x, t)


# ---- distillation


def test_boundary_is_exact_for_any_network():
    x, cond = torch.randn(3, 4, 8, 8), {"encoder_hidden_states": torch.randn(3, 5, 32)}
    with torch.no_grad():
        time, w = torch.zeros(3, dtype=torch.long), torch.ones(3)
        f = scott("epsilon", dim=16).teaching.jump(tiny_unet(time_cond_proj_dim=16), x, time, cond, w)
    assert torch.equal(f, x)


def test_every_time_but_zero_is_trained_at():
    objective, batch = scott(), Batch(torch.ones(200_000, 1))
    x_t, t, _ = objective.draw(batch)
    counts = torch.bincount(t, minlength=1000)
    assert (counts[0], t.max()) == (0, 999)
    assert 140 < counts[1:].min() <= counts.max() < 270
    assert x_t[t == 500].mean().item() == pytest.approx(float(VP.alpha(torch.tensor(500))), abs=0.3)


def mean_gains(step_gain, interval):
    """g(t) = g(s) m(t) from g(0) = 1: the student that equals the mean of its targets."""
    gains = [1.0]
    for t in range(1, 1000):
        gains.append(gains[max(t - interval, 0)] * step_gain[t])
    return torch.tensor(gains, dtype=torch.float64)


def moments(t, s, settings, variance):
    """Gain of x `(T,)` and variance of the noise `(T,)` from t to s, for N(0, variance): all steps are affine."""
    gain, spread, steps = torch.ones(len(t)).double(), torch.zeros(len(t)).double(), settings["solver_steps"]
    for now, end in pairwise([(t + (s - t) * k / steps).round().long() for k in range(steps + 1)]):
        (a, b), (a_end, b_end) = ((VP.alpha(time), VP.sigma(time)) for time in (now, end))
        x0 = a * variance / (a**2 * variance + b**2)
        if settings["sde"] == "ddim":
            std = ddim_noise(VP, now, end, settings["eta"])
            move = a_end * x0 + (b_end**2 - std**2).sqrt() * (1 - a * x0) / b
        else:
            lam, lam_end = b / a, b_end / a_end
            ratio = lam_end * (torch.exp(lam_end**0.3) + 10) / (lam * (torch.exp(lam**0.3) + 10))
            std = a_end * (lam_end**2 - (lam * ratio) ** 2).clamp(min=0).sqrt()
            move = a_end / a * ratio + a_end * (1 - ratio) * x0
        move, std = torch.where(now == end, 1.0, move), torch.where(now == end, 0.0, std)
        gain, spread = gain * move, spread * move**2 + std**2
    return gain, spread


FLOORS = [{"sde": "ddim", "eta": eta, "solver_steps": h} for eta, h in ((0.0, 1), (0.3, 1), (1.0, 1), (0.3, 3))]
FLOORS += [{"sde": "er_sde", "noise_scale": "sde_5", "solver_order": 1, "solver_steps": 3}]


@pytest.mark.parametrize("settings", FLOORS, ids=lambda s: "-".join(map(str, s.values())))
def test_the_floor_is_the_variance_of_the_noise(settings):
    """E ||f(x_t) - f(x_s)||^2 = g(s)^2 std^2 per dimension where f is the mean, and more elsewhere."""
    t = torch.arange(1000)
    s = (t - 24).clamp(min=0)
    step_gain, variance = moments(t, s, settings, 0.25)
    student = Linear(mean_gains(step_gain, 24)).double()
    floor = (student.gain[s].square() * variance)[1:].mean().item()

    def loss(network):
        torch.manual_seed(3)
        nets = Networks(network, target=student, teacher=OracleNet(VP, "sample", Gaussian(0.0, 0.5)))
        objective = scott(critic=False, **settings)
        return objective(nets, Batch(draw(Gaussian(0.0, 0.5), 40_000, 8)), Progress(0, 1)).value.item()

    assert loss(student) == pytest.approx(floor, rel=0.02, abs=1e-12)
    assert loss(Linear(student.gain.detach() * 1.1).double()) > loss(student) + 1e-4


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_no_loss_on_a_point_mass(prediction_type, noise):
    """There the consistency function forgets all noise, whatever there is of it, but for sigma(0) where s = 0."""
    data = Gaussian(0.7, 0.0)
    teacher = OracleNet(VP, prediction_type, data)
    nets = Networks(teacher, teacher=teacher)  # f = c_skip x + c_out 0.7
    value = scott(prediction_type, critic=False, **NOISES[noise])(
        nets, Batch(draw(data, 500, 4)), Progress(0, 1)
    ).value
    assert value.item() < 24 / 999 * float(1 - VP.alphas_cumprod[0]) + 2e-5
    other = Networks(OracleNet(VP, prediction_type, Gaussian(0.7, 0.5)), teacher=teacher)
    value = scott(prediction_type, critic=False, **NOISES[noise])(
        other, Batch(draw(data, 500, 4)), Progress(0, 1)
    ).value
    assert value.item() > 5e-4


def at(*times):
    return torch.tensor(times)


def ode_gain(t):
    """Of two DDIM steps on N(0, 1): the cosines of their angles."""
    product = 1.0
    for now, end in pairwise(sub_times(at(t), at(t - 333), 2)):
        angle = torch.acos(VP.alpha(end)) - torch.acos(VP.alpha(now))
        product *= float(angle.cos())
    return product


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_training_converges_to_the_product_of_means(eta):
    """With full noise that is the posterior mean, exactly, at any step size: 0.07 of the variance's root at t = 999."""
    data, student, times = Gaussian(0.0, 1.0), Linear(), at(333, 666, 999)
    objective = scott(critic=False, sde="ddim", eta=eta, solver_interval=333, solver_steps=2)
    nets = Networks(student, target=frozen_copy(student), teacher=OracleNet(VP, "sample", data))

    def draw_three(batch):
        t = times[torch.randint(3, (len(batch.x0),))]
        return diffuse(VP, batch.x0, torch.randn_like(batch.x0), t), t, torch.zeros(len(t))

    objective.draw = draw_three
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for step in range(400):
        optimizer.zero_grad()
        objective(nets, Batch(draw(data, 1024, 4).float()), Progress(step, 400)).value.backward()
        optimizer.step()
        decay.step()
        ema_update(nets.target, student, 0.8)
    if eta == 1:
        expected = [float((VP.alphas_cumprod[t] / VP.alphas_cumprod[0]).sqrt()) for t in (333, 666, 999)]
        assert expected[2] == pytest.approx(0.0682939, abs=1e-7)
    else:
        one, two, three = (ode_gain(t) for t in (333, 666, 999))
        expected = [one, one * two, one * two * three]
    assert student.gain[times].tolist() == pytest.approx(expected, abs=0.01)
    assert student.bias[times].tolist() == pytest.approx([0] * 3, abs=0.02)


COND, UNCOND = Gaussian(0.7, 0.5), Gaussian(-0.4, 0.5)
LABELS = {"label": torch.ones(64)}, {"label": torch.zeros(64)}


def way_by_hand(sde, x, t, s, w):
    """Three guided steps over whole times, in the words of the papers; and the noise of torch's generator."""
    times = [t + (s - t) * k / 3 for k in range(4)]
    times, before = [time.round().long() for time in times], None
    for now, end in pairwise(times):
        (a, b), (a_end, b_end) = ((VP.alpha(time)[:, None], VP.sigma(time)[:, None]) for time in (now, end))
        cond, uncond = (data.predict(VP, x, now) for data in (COND, UNCOND))
        x0 = (1 + w[:, None]) * cond.x0 - w[:, None] * uncond.x0
        if sde == "ddim":  # 2010.02502, Eq. 12 and 16
            std = 0.3 * b_end / b * (1 - (a / a_end) ** 2).sqrt()
            x = a_end * x0 + (b_end**2 - std**2).sqrt() * (x - a * x0) / b + std * torch.randn_like(x)
            continue
        lam, lam_end = b / a, b_end / a_end  # 2309.06169, Alg. 2
        phi = (lambda v: v**2) if sde == "sde" else (lambda v: v * (torch.exp(v**0.3) + 10))
        ratio = phi(lam_end) / phi(lam)
        y = a_end / a * ratio * x + a_end * (1 - ratio) * x0
        if before is not None and sde == "sde_5":
            grid = lam_end + (lam - lam_end) * torch.linspace(0, 1, 4001)
            integral = torch.trapezoid(1 / phi(grid), grid, dim=1)[:, None]
            y = y + a_end * (lam_end - lam + phi(lam_end) * integral) * (x0 - before[0]) / (lam - before[1])
        x, before = y + a_end * (lam_end**2 - (lam * ratio) ** 2).sqrt() * torch.randn_like(x), (x0, lam)
    return x


@pytest.mark.parametrize("sde", ["ddim", "sde", "sde_5"])
def test_the_target_is_where_three_guided_noisy_steps_get(sde):
    """Every sample with a strength of its own; the target network sees the condition, and no guidance in it."""
    flags = {"ddim": {"sde": "ddim", "eta": 0.3}, "sde": {"noise_scale": "sde", "solver_order": 1}, "sde_5": {}}
    objective = scott(critic=False, timestep_scaling_factor=0.01, **flags[sde])
    target = OracleNet(VP, "sample", Gaussian(2.0, 0.1), Gaussian(-2.0, 0.1))
    nets = Networks(Linear(), target=target, teacher=OracleNet(VP, "sample", COND, UNCOND))
    x_t, t, w = draw(Gaussian(0.0, 1.0), 64, 4), torch.randint(24, 1000, (64,)), torch.linspace(0.0, 6.0, 64).double()
    torch.manual_seed(5)
    found = objective.target(nets, Batch(x_t, *LABELS), x_t, t, w)
    torch.manual_seed(5)
    x_s, s = way_by_hand(sde, x_t, t, t - 24, w), t - 24
    c_skip, c_out = (c[:, None] for c in lcm_scalings(s, 0.01))
    torch.testing.assert_close(
        found, c_skip * x_s + c_out * Gaussian(2.0, 0.1).predict(VP, x_s, s).x0, rtol=1e-5, atol=1e-6
    )


class Witness(nn.Module):
    """Answers 0, and keeps what it was asked and a number that it drew, as dropout would."""

    def __init__(self):
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.zeros(())), []

    def forward(self, x_t, t, label=None, timestep_cond=None, return_dict=True):
        self.calls.append((x_t, t, label, timestep_cond, torch.rand(1)))
        return (self.scale * x_t,)


@pytest.mark.parametrize(("loss_type", "averaged"), [("l2", True), ("huber", True), ("l2", False)])
def test_the_student_is_told_text_and_strength_and_compared_as_asked(loss_type, averaged):
    settings = {"w_min": 1.0, "w_max": 5.0, "timestep_scaling_factor": 0.02, "loss_type": loss_type}
    objective, student, target = scott(critic=False, dim=16, **settings), Witness(), Witness()
    teacher = OracleNet(VP, "sample", COND, UNCOND).float()
    nets = Networks(student, target=target if averaged else None, teacher=teacher)
    batch = Batch(draw(COND, 64, 4).float(), *LABELS)
    loss = objective(nets, batch, Progress(0, 1))
    (x_s, s, label_s, strength_s, before), (x_t, t, label, strength, after) = target.calls + student.calls
    assert (label == 1).all()
    assert (label_s == 1).all()
    assert torch.equal(before, after)  # the same dropout masks
    assert torch.equal(strength, strength_s)
    assert torch.equal((t - s).clamp(max=24), t.clamp(max=24))
    w = 10 * strength[:, 7].asin()  # the slowest wave is sin(1000 w / 10000)
    assert w.min() >= 1.0
    assert w.max() <= 5.0
    assert w.max() - w.min() > 3
    assert loss.logs["w"].item() == pytest.approx(w.mean().item(), abs=1e-3)
    skip_t, skip_s = (lcm_scalings(time, 0.02)[0][:, None] for time in (t, s))
    gap = skip_t * x_t - skip_s * x_s
    by_hand = {"l2": gap.square().mean(), "huber": ((gap.square() + 1e-6).sqrt() - 1e-3).mean()}
    assert loss.value.item() == pytest.approx(by_hand[loss_type].item(), rel=1e-5)


# ---- the critic


def test_every_sample_is_judged_with_its_own_text():
    size = 1000
    signs = torch.where(torch.arange(size) % 3 == 0, -1.0, 1.0)
    batch = Batch(1e6 * signs[:, None], {"label": signs}, {"label": torch.full((size,), 7.0)})
    nets = Networks(
        Linear(), target=Linear(), teacher=OracleNet(VP, "sample", COND, UNCOND).float(), critic=Recorder()
    )
    objective = scott(critic_inputs="clean", r1_weight=1.0)
    for player in ("critic", "student"):
        objective.players[player](nets, batch, Progress(0, 1))
    (judged, _, texts), (persuading, _, text) = nets.critic.calls
    assert (len(judged), len(persuading)) == (3 * size, size)
    assert torch.equal(judged[:, 0].sign(), texts["label"])
    assert torch.equal(persuading[:, 0].sign(), text["label"])


def test_r1_disturbs_what_is_real():
    """A critic that changes near the real 2 alone pays; one that changes near the fake 0 does not."""
    nets, objective = Networks(Linear(torch.zeros(1000))), scott(critic_inputs="clean", r1_weight=100.0)
    found = []
    for where in (2.0, 0.0):
        nets.critic = Recorder(lambda x, t, where=where: torch.where((x - where).abs() < 0.7, x - where + 0.5, -0.5))
        found.append(objective.judge(nets, Batch(torch.full((4000, 1), 2.0)), Progress(0, 1)).value.item())
    # hinge losses of 0.5 twice and of 1.5 twice; a disturbance of 0.1 makes 100 * 0.1^2
    assert found == [pytest.approx(1.0 + 1.0, rel=0.1), pytest.approx(3.0, abs=1e-3)]


def test_least_squares_has_its_own_boundary():
    nets = Networks(Linear(torch.zeros(1000)), teacher=OracleNet(VP, "sample", Gaussian(0, 1)).float())
    nets.critic = Recorder(lambda x, t: torch.where(x > 1, 0.8, 0.3))  # real are 2, fake 0
    objective, batch = scott(critic_inputs="clean", adversarial_loss="lsgan"), Batch(torch.full((50, 1), 2.0))
    judged = objective.judge(nets, batch, Progress(0, 1))
    assert judged.logs["critic/accuracy"] == 1
    assert judged.value.item() == pytest.approx((0.2**2 + 0.3**2) / 2)
    nets.critic = Recorder(lambda x, t: 0 * x + 0.3)
    persuaded = objective(nets, batch, Progress(0, 1))
    assert persuaded.logs["adversarial"].item() == pytest.approx(0.7**2 / 2)


def shown(objective, nets=None, x0=None, player="critic"):
    """What a recording critic sees in one turn."""
    x0 = torch.full((4000, 1), 2.0) if x0 is None else x0
    teacher = OracleNet(VP, "sample", Gaussian(0.0, 1.0)).float()
    nets = nets or Networks(Linear(), target=Linear(), teacher=teacher)
    nets.critic = Recorder()
    batch = Batch(x0, {"label": torch.ones(len(x0))}, {"label": torch.ones(len(x0))})
    loss = objective.players[player](nets, batch, Progress(0, 1))
    (call,) = nets.critic.calls
    return loss, *call


def test_real_and_fake_get_the_same_noise_and_time():
    """x_s = alpha_s z + sigma_s noise from t = 0: the difference of the pair is alpha_s times that of the clean ones."""
    _, x, t, cond = shown(
        scott(), Networks(Linear(torch.zeros(1000)), teacher=OracleNet(VP, "sample", Gaussian(0, 1)))
    )
    (real, fake), (t_real, t_fake) = x.chunk(2), t.chunk(2)
    assert torch.equal(t_real, t_fake)
    assert t.min() < 10
    assert t.max() > 990
    assert len(cond["label"]) == 8000
    torch.testing.assert_close(real - fake, 2.0 * VP.alpha(t_real)[:, None].float(), rtol=1e-4, atol=1e-5)
    noise = fake[:, 0] / VP.sigma(t_fake)
    assert float(noise.mean()) == pytest.approx(0, abs=0.08)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)


def test_the_letter_of_the_paper():
    """Real data at t = 0, the student's jumps at the times they came from."""
    _, x, t, _ = shown(scott(critic_inputs="clean"), Networks(Linear(torch.full((1000,), 0.0))))
    (real, fake), (t_real, t_fake) = x.chunk(2), t.chunk(2)
    assert (real == 2.0).all()
    assert (t_real == 0).all()
    assert (fake == 0.0).all()
    assert t_fake.min() >= 1
    assert t_fake.float().mean() == pytest.approx(500, abs=20)


def test_the_student_s_turn_shows_only_fakes():
    loss, x, t, cond = shown(scott(critic_inputs="clean"), player="student")
    assert (len(x), len(t), len(cond["label"])) == (4000, 4000, 4000)
    assert t.min() >= 1
    assert loss.logs["adversarial"].item() == pytest.approx(-x.mean().item(), abs=1e-5)
    assert loss.value.item() == pytest.approx((loss.logs["consistency"] + 0.1 * loss.logs["adversarial"]).item())


def test_a_balanced_weight_counts_gradients_and_gets_none():
    """At a weight of 0.5 the critic then pulls half as much as the distillation holds, however steep it is."""
    nets = Networks(Linear(torch.full((1000,), 0.4)), teacher=OracleNet(VP, "sample", Gaussian(0, 1)))
    batch, losses = Batch(torch.randn(500, 1)), {}
    for slope in (1.0, 10.0, 1e9):
        nets.critic = Recorder(lambda x, t, slope=slope: slope * x.tanh())
        torch.manual_seed(0)
        losses[slope] = scott(adversarial_balance="adaptive", adversarial_weight=0.5)(nets, batch, Progress(0, 1))
    ratios = {slope: loss.logs["gradient_ratio"].item() for slope, loss in losses.items()}
    assert [ratios[1.0], ratios[10.0]] == pytest.approx([0.5, 0.5], rel=1e-4)
    assert ratios[1e9] > 1e4  # no less than 0.01 of the weight
    assert losses[1e9].logs["adversarial_weight"].item() == pytest.approx(0.005)
    weights = [losses[slope].logs["adversarial_weight"].item() for slope in (1.0, 10.0)]
    assert weights[0] == pytest.approx(10 * weights[1], rel=1e-4)
    assert not losses[1.0].logs["adversarial_weight"].requires_grad


def test_noise_stays_below_what_is_asked_for():
    nets = Networks(Linear(torch.zeros(1000)), critic=Recorder())
    scott(renoise_below=40).judge(nets, Batch(torch.randn(4000, 1)), Progress(0, 1))
    ((_, times, _),) = nets.critic.calls
    assert (times.min(), times.max()) == (0, 39)
    with pytest.raises(ValueError, match=r"--renoise_below is 1001, but the teacher has 1000 timesteps\."):
        scott(renoise_below=1001)


def test_the_target_may_be_what_is_real():
    """With a target network that answers 5 everywhere but at t = 0."""
    gain = Linear(torch.zeros(1000))
    nn.init.constant_(gain.bias, 5.0)
    nets = Networks(Linear(torch.zeros(1000)), target=gain, teacher=OracleNet(VP, "sample", Gaussian(0, 1)))
    _, x, _, _ = shown(scott(critic_inputs="clean", real_source="target"), nets)
    real, fake = x.chunk(2)
    assert (fake == 0).all()
    assert (real == 5).float().mean() > 0.95


@pytest.mark.parametrize(("inputs", "right"), [("renoised", 0.5), ("clean", 1.0)])
def test_time_tells_nothing_unless_the_paper_is_followed(inputs, right):
    """A critic that sees the time alone stays at 50 percent; with the paper's inputs it needs nothing else."""
    table = nn.Embedding(1000, 1)
    nn.init.zeros_(table.weight)
    critic = Recorder(lambda x, t: table(t))
    nets = Networks(Linear(torch.zeros(1000)), teacher=None, critic=critic)
    objective, optimizer = scott(critic_inputs=inputs), torch.optim.Adam(table.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss = objective.judge(nets, Batch(torch.randn(2000, 1)), Progress(0, 1))
        loss.value.backward()
        optimizer.step()
    assert loss.logs["critic/accuracy"].item() == right


def test_r1_is_for_critics_that_change():
    quiet, loud = (scott(critic_inputs="clean", r1_weight=weight) for weight in (0.0, 100.0))
    batch, nets = Batch(torch.zeros(20_000, 1)), Networks(Linear(torch.zeros(1000)))

    def loss(objective, answer):
        nets.critic = Recorder(answer)
        return objective.judge(nets, batch, Progress(0, 1)).value.item()

    constant = lambda x, t: torch.full_like(x, 0.3)  # noqa: E731
    assert loss(loud, constant) == loss(quiet, constant) == pytest.approx(2.0)
    slope = lambda x, t: 3 * x  # noqa: E731
    assert loss(loud, slope) - loss(quiet, slope) == pytest.approx(100 * (3 * 0.1) ** 2, rel=0.03)


def test_the_weight_follows_progress_alone():
    objective = scott(adversarial_start=10, adversarial_ramp=4, adversarial_weight=0.4)
    weights = [objective.adversary.weight(Progress(step, 100)) for step in (0, 9, 10, 11, 14, 99)]
    assert weights == pytest.approx([0, 0, 0, 0.1, 0.4, 0.4])
    assert scott(adversarial_weight=0.4).adversary.weight(Progress(0, 1)) == 0.4
    assert scott(critic=False).adversary.weight(Progress(50, 100)) == 0
    assert set(scott(critic=False).players) == {"student"}


# ---- the play, in the package's loop


class Timed(nn.Module):
    """A small network of x `(B, 2)` and time, zero at first."""

    def __init__(self, outputs):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(9, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, outputs))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x, t, cond=None, return_dict=True):
        u = t.float()[:, None] / 1000
        waves = [wave(math.pi * k * u) for k in (1, 2, 4) for wave in (torch.sin, torch.cos)]
        found = self.net(torch.cat([x, u, *waves], dim=1))
        return found if cond is not None else (found,)


def corners(start):
    """Four small clouds at (+-1, +-1)."""
    for k in count(start):
        noise = torch.randn(2, 256, 2, generator=torch.Generator().manual_seed(k))
        yield Batch(noise[0].sign() + 0.1 * noise[1])


def play(folder, critic=True, eta=1.0, max_train_steps=300, **config):
    torch.manual_seed(0)
    student, teacher = Timed(2), OracleNet(VP, "sample", Mixture((0.5, 0.5), (-1.0, 1.0), (0.1, 0.1)))
    nets = Networks(student, frozen_copy(student), teacher.requires_grad_(False), Timed(1) if critic else None)
    objective = scott(
        critic=critic,
        sde="ddim",
        eta=eta,
        solver_interval=333,
        solver_steps=6,
        adversarial_weight=4.0,
        renoise_below=500,
        adversarial_start=3 if max_train_steps < 10 else 100,
        adversarial_ramp=2 if max_train_steps < 10 else 100,
    )
    optims = {"student": OptimConfig(learning_rate=2e-3), "critic": OptimConfig(learning_rate=5e-3, adam_beta1=0.0)}
    return toy_trainer(folder, nets, objective, optims, max_train_steps=max_train_steps, ema_decay=0.9, **config)


def one_step_samples(trainer):
    """What the trained student makes of noise `(4000, 2)` in one step."""
    steps, stream = trainer.config.max_train_steps, corners(0)
    for _ in range(steps):
        trainer.training_step(stream)
    with torch.no_grad():
        t = torch.full((4000,), 999)
        return trainer.objective.teaching.jump(trainer.student, torch.randn(4000, 2), t, {}, torch.zeros(4000))


def shares(samples):
    """Of samples near each of the four clouds."""
    near = [(samples - torch.tensor(corner)).norm(dim=1) < 0.7 for corner in product((-1.0, 1.0), repeat=2)]
    return [share.float().mean().item() for share in near]


def test_noise_collapses_the_student_and_the_critic_restores_it(tmp_path):
    """The reason for the critic: with full noise and no critic the one-step samples are the mean of the four clouds."""
    ode, collapsed, restored = (
        one_step_samples(play(tmp_path / name, critic, eta))
        for name, critic, eta in (("ode", False, 0.0), ("sde", False, 1.0), ("scott", True, 1.0))
    )
    assert ode.std(dim=0).min() > 0.8
    assert min(shares(ode)) > 0.12  # a quarter each, less what lies between the clouds
    assert collapsed.std(dim=0).max() < 0.15
    assert max(shares(collapsed)) < 0.01
    assert restored.std(dim=0).min() > 0.4
    assert sum(shares(restored)) > 0.2


def test_before_its_time_the_critic_rests(tmp_path):
    trainer = play(tmp_path, max_train_steps=6)
    stream, seen = corners(0), []
    trainer.nets.critic.register_forward_hook(lambda *_: seen.append(trainer.step))
    before, logs = weights(trainer.nets.critic), []
    for step in range(6):
        logs.append(trainer.training_step(stream)[0].logs)
        assert all(map(torch.equal, weights(trainer.nets.critic), before)) == (step < 3)
    assert seen == [3, 4, 4, 5, 5]  # at 3 its weight is still 0
    assert ["critic/accuracy" in log for log in logs] == [False] * 3 + [True] * 3
    assert ["gradient_ratio" in log for log in logs] == [False] * 4 + [True] * 2
    assert logs[3]["critic/loss"] == 2
    assert logs[3]["critic/accuracy"] == 0.5
    assert {"critic/real", "critic/fake", "critic/grad_norm", "critic/learning_rate"} <= set(logs[5])


def test_the_bar_shows_the_loss_of_every_player(tmp_path):
    trainer, shown = play(tmp_path, max_train_steps=6), []
    bar = SimpleNamespace(set_postfix_str=lambda text, _: shown.append(text))
    stream, looks = corners(0), trainer.looks
    for _ in range(5):
        with looks.measured():
            loss, looks.images = trainer.training_step(stream)
        looks.show(trainer.step, looks.values(loss), bar)
    assert "critic" not in shown[0]
    assert re.fullmatch(r"loss [\d.e-]+, critic [\d.e-]+, [\d.]+ images/s", shown[4])


def test_each_turn_leaves_the_other_s_gradients_alone(tmp_path):
    trainer = play(tmp_path, max_train_steps=6)
    nets, grads = trainer.nets, []
    for player, other in zip(trainer.players, (nets.critic, nets.student), strict=True):
        see = lambda *_, other=other: grads.append([p.grad for p in other.parameters()])  # noqa: E731
        player.optimizer.optimizer.register_step_pre_hook(see)
    stream = corners(0)
    for _ in range(6):
        trainer.training_step(stream)
    assert grads == [[None] * 6] * 9
    assert all(p.grad is None for p in (*nets.target.parameters(), *nets.teacher.parameters()))


@pytest.mark.parametrize("checkpoint", [2, 4])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_resume_is_bit_exact(tmp_path, micro_batches, checkpoint):
    """From before the critic moves, and after."""
    shared = {"max_train_steps": 6, "checkpointing_steps": 2, "gradient_accumulation_steps": micro_batches}
    play(tmp_path / "whole", **shared).fit(corners)
    start = str(tmp_path / "whole" / f"checkpoint-{checkpoint}")
    play(tmp_path / "resumed", **shared, resume_from_checkpoint=start).fit(corners)
    expected = tensors(tmp_path / "whole" / "checkpoint-6")
    assert {"student", "target", "critic", "optimizer-student", "optimizer-critic"} == {
        n.split("/")[0] for n in expected
    }
    assert_same(tensors(tmp_path / "resumed" / "checkpoint-6"), expected)


# ---- wrong settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": 1.5}, "--eta must be at least 0 and at most 1, but it is 1.5."),
        ({"eta": -0.1}, "--eta must be at least 0 and at most 1, but it is -0.1."),
        ({"solver_steps": 0}, "--solver_steps must be at least 1, but it is 0."),
        ({"solver_interval": 0}, "--solver_interval must be at least 1, but it is 0."),
        ({"adversarial_weight": -1.0}, "--adversarial_weight must be above 0, but it is -1.0."),
        ({"adversarial_weight": math.nan}, "--adversarial_weight must be above 0, but it is nan."),
        ({"timestep_scaling_factor": 0.0}, "--timestep_scaling_factor must be above 0, but it is 0.0."),
        ({"r1_weight": -5.0}, "--r1_weight must be at least 0, but it is -5.0."),
        ({"w_min": -9.0}, "--w_min must be at least -1, but it is -9.0."),
        ({"w_min": math.nan}, "--w_min must be at least -1, but it is nan."),
        ({"renoise_below": 0}, "--renoise_below must be at least 1, but it is 0."),
        ({"adversarial_balance": "none"}, "Unknown --adversarial_balance 'none'; one of fixed, adaptive."),
        ({"adversarial_start": -1}, "--adversarial_start must be at least 0, but it is -1."),
        ({"noise_scale": "sde_6"}, "Unknown --noise_scale 'sde_6'; one of ode, sde, sde_5."),
        ({"sde": "euler"}, "Unknown --sde 'euler'; one of er_sde, ddim."),
        ({"solver_order": 3}, "Unknown --solver_order 3; one of 1, 2."),
        ({"loss_type": "l1"}, "Unknown --loss_type 'l1'; one of l2, huber."),
        ({"adversarial_loss": "wgan"}, "Unknown --adversarial_loss 'wgan'; one of hinge, lsgan."),
        ({"critic_inputs": "noisy"}, "Unknown --critic_inputs 'noisy'; one of renoised, clean."),
        ({"real_source": "fake"}, "Unknown --real_source 'fake'; one of data, target."),
        ({"w_min": 5.0, "w_max": 2.0}, "--w_min 5.0 is above --w_max 2.0; swap them."),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared
        scott(**settings)
    assert str(error.value) == message


def test_the_grid_of_the_sampler_must_exist():
    with pytest.raises(ValueError, match="The grid has 5000 steps"):
        scott(num_ddim_timesteps=5000)


def test_zero_terminal_snr_needs_ddim_and_no_epsilon():
    config = tiny_scheduler().config
    process = DiscreteVP.from_scheduler(type(tiny_scheduler()).from_config(config, rescale_betas_zero_snr=True))
    for prediction_type, sde in (("epsilon", "ddim"), ("v_prediction", "er_sde")):
        with pytest.raises(ValueError, match=f"zero terminal SNR.*this is {prediction_type} with {sde}"):
            scott(prediction_type, process=process, sde=sde)
    teacher = OracleNet(process, "v_prediction", Gaussian(0.3, 0.5))
    objective = scott("v_prediction", critic=False, process=process, sde="ddim", eta=0.5)
    batch = Batch(draw(Gaussian(0.3, 0.5), 5000, 4))
    assert objective(Networks(teacher, teacher=teacher), batch, Progress(0, 1)).value.isfinite()


def test_the_critic_learns_by_its_own_settings():
    student = OptimConfig(learning_rate=1e-3, lr_scheduler="wsd", lr_cooldown_steps=5, optimizer="radam")
    optim = critic_optim(CriticConfig(critic_learning_rate=2e-5), student)
    assert (optim.learning_rate, optim.adam_beta1, optim.adam_beta2) == (2e-5, 0.0, 0.99)
    assert (optim.optimizer, optim.lr_scheduler, optim.lr_cooldown_steps) == ("radam", "constant", 0)
    assert unused_flags(CriticConfig("heads")) == "critic_lora_rank critic_backbone"
    assert unused_flags(CriticConfig("lora_decoder")) == "critic_channels critic_backbone"
    assert "critic_learning_rate" in unused_flags(CriticConfig("none"))
