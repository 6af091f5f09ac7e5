"""PCM and TCD: their limits, and data whose flow is known exactly."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from oracles import Gaussian, OracleNet, as_output, rates
from tiny import tiny_scheduler, tiny_unet
from torch import nn

from cm_diffusers.diffusion.guidance import target_embedding
from cm_diffusers.diffusion.process import DiscreteVP, Prediction, RectifiedFlow, diffuse, diffuse_further
from cm_diffusers.diffusion.solvers import ddim_step, dpm_2s_step, heun_step
from cm_diffusers.diffusion.teaching import Guiding, embedded_in_time, flow_teaching, vp_teaching
from cm_diffusers.diffusion.times import Phases, phase_edges
from cm_diffusers.models.students import frozen_copy
from cm_diffusers.objectives.lcm import LCMConfig, LCMObjective
from cm_diffusers.objectives.pcm import PCMConfig, PCMObjective
from cm_diffusers.objectives.tcd import TCDConfig, TCDObjective
from cm_diffusers.schedulers import ConsistencyScheduler, FlowConsistencyScheduler
from cm_diffusers.types import Batch, Networks, Progress


VP, FLOW, PROGRESS = DiscreteVP.from_scheduler(tiny_scheduler()), RectifiedFlow(), Progress(0, 10)
TYPES = ["epsilon", "v_prediction", "sample"]
TARGET = 16


def call(network, x_t, t, cond):
    return network(x_t, t, **cond)[0]


def vp(prediction_type="epsilon", points=50, target_dim=None):
    return replace(vp_teaching(VP, prediction_type, None, points, None), target_dim=target_dim)


def flow(points=50, shift=3.0, target_dim=None):
    return replace(flow_teaching(call, shift, points, Guiding("none")), target_dim=target_dim)


def pcm(teaching, phases, critic=False, **settings):
    settings = {"w_min": 0.0, "w_max": 0.0, "loss_type": "l2"} | settings
    return PCMObjective(PCMConfig(phases=phases, num_ddim_timesteps=len(teaching.grid), **settings), teaching, critic)


def tcd(teaching, **settings):
    settings = {"w_min": 0.0, "w_max": 0.0, "loss_type": "l2"} | settings
    return TCDObjective(TCDConfig(num_ddim_timesteps=len(teaching.grid), **settings), teaching)


def draw(data, *shape):
    return data.mean + data.std * torch.randn(shape, dtype=torch.float64)


def loss(objective, nets, batch, seed=0):
    torch.manual_seed(seed)
    return objective(nets, batch, PROGRESS).value


class Exact(nn.Module):
    """A student whose DDIM jump to s is the flow of `data`; `ends(t)` says to where, or the network is told."""

    def __init__(self, process, prediction_type, data, ends=None):
        super().__init__()
        self.process, self.prediction_type, self.data, self.ends = process, prediction_type, data, ends
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x_t, t, timestep_cond=None, return_dict=True):
        s = self.ends(t) if timestep_cond is None else target_of(timestep_cond)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = rates(self.process, x_t, t), rates(self.process, x_t, s)
        x_s, sigma_t = self.data.flow(self.process, x_t, t, s), sigma_t.clamp(min=1e-30)
        moves = alpha_s - alpha_t * sigma_s / sigma_t
        still = moves.abs() < 1e-12
        x0 = torch.where(still, x_t, (x_s - sigma_s / sigma_t * x_t) / torch.where(still, 1, moves))
        prediction = Prediction(x0, (x_t - alpha_t * x0) / sigma_t)
        return (self.gain * as_output(self.process, prediction, x_t, t, self.prediction_type),)


def target_of(embedding):
    """The whole number s that an embedding tells: sin and cos of its two slowest waves."""
    slow = embedding.shape[1] // 2 - 1
    return (10_000 * torch.atan2(embedding[:, slow], embedding[:, -1])).round().long()


def test_edges_are_those_of_the_published_code():
    """Of a grid of 50: floor(linspace(0, 50, M, endpoint=False))."""
    assert phase_edges(50, 4).tolist() == [0, 12, 25, 37]
    assert phase_edges(50, 8).tolist() == [0, 6, 12, 18, 25, 31, 37, 43]
    assert phase_edges(50, 50).tolist() == list(range(50))
    teaching = vp()
    phases = Phases.of(teaching.grid, teaching.before, 4)
    assert phases.starts.tolist() == [239, 499, 739, 999]
    assert phases.end[[0, 11, 12, 24, 25, 36, 37, 49]].tolist() == [0, 0, 239, 239, 499, 499, 739, 739]
    assert phases.start[[0, 11, 12, 49]].tolist() == [239, 239, 499, 999]
    with pytest.raises(ValueError, match="--phases 51 do not fit on 50 points"):
        phase_edges(50, 51)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm_2s"])
def test_a_jump_to_where_it_starts_is_exactly_none(prediction_type, solver):
    x = torch.randn(3, 4, 8, 8)
    t, cond = torch.tensor([0, 499, 999]), {"encoder_hidden_states": torch.randn(3, 5, 32)}
    unet = tiny_unet(time_cond_proj_dim=16 + TARGET)
    teaching = replace(vp_teaching(VP, prediction_type, 16, 50, None), target_dim=TARGET)
    with torch.no_grad():
        assert torch.equal(teaching.jump_to(unet, x, t, t, cond, torch.ones(3), solver), x)
        assert not torch.equal(teaching.jump_to(unet, x, t, t // 2, cond, torch.ones(3), solver)[1:], x[1:])


@pytest.mark.parametrize(("solver", "step"), [("ddim", ddim_step), ("heun", heun_step), ("dpm_2s", dpm_2s_step)])
@pytest.mark.parametrize("teaching", [vp(), vp("v_prediction"), vp("sample"), flow()], ids=[*TYPES, "flow"])
def test_a_jump_is_a_step_of_the_network_itself(teaching, solver, step):
    net = OracleNet(teaching.process, teaching.prediction_type, Gaussian(0.4, 0.5))
    x, t, s = torch.randn(3, 5, dtype=torch.float64), teaching.grid[[9, 30, 40]], teaching.grid[[3, 29, 20]]
    expected = step(lambda x, t: teaching.denoiser(net)(x, t, {}), teaching.process, x, t, s)
    assert torch.equal(teaching.jump_to(net, x, t, s, {}, None, solver), expected)


def test_a_told_student_is_told_guidance_and_target():
    teaching = replace(vp_teaching(VP, "epsilon", 16, 50, None), target_dim=TARGET)
    net = OracleNet(VP, "epsilon", Gaussian(0.0, 1.0))
    seen = []
    net.register_forward_pre_hook(lambda module, args, given: seen.append(given["timestep_cond"]), with_kwargs=True)
    w, s = torch.tensor([1.0, 3.0]), torch.tensor([17, 480])
    teaching.jump_to(net, torch.randn(2, 4), torch.tensor([499, 999]), s, {}, w, "dpm_2s")
    told = torch.cat([embedded_in_time(16)({}, w)["timestep_cond"], target_embedding(s, TARGET).float()], 1)
    assert len(seen) == 2
    assert all(torch.equal(one, told) for one in seen)
    assert target_of(told[:, 16:].double()).tolist() == [17, 480]


def test_one_phase_is_lcm_bit_for_bit():
    """With scalings of the jump that DDIM makes to 0: of a flow (0, 1); every draw of chance is the same."""
    teaching, data = flow(), Gaussian(0.3, 0.5)
    nets = Networks(
        Exact(FLOW, "flow_prediction", data, torch.zeros_like), teacher=OracleNet(FLOW, "flow_prediction", data)
    )
    lcm = LCMObjective(LCMConfig(w_min=0.0, w_max=0.0, loss_type="l2", time_power=0.0), teaching)
    batch = Batch(draw(Gaussian(0.1, 1.0), 200, 8))
    expected = loss(lcm, nets, batch)
    assert expected > 1e-9
    assert torch.equal(loss(pcm(teaching, 1), nets, batch), expected)
    assert torch.equal(loss(tcd(teaching, phases=1), nets, batch), expected)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_one_phase_is_lcm_with_the_scalings_of_ddim(prediction_type):
    teaching = vp(prediction_type)

    def scalings(t):
        zero = torch.zeros_like(t)
        c_skip = VP.sigma(zero) / VP.sigma(t)
        return c_skip, VP.alpha(zero) - c_skip * VP.alpha(t)

    net = OracleNet(VP, prediction_type, Gaussian(0.3, 2.0))
    lcm = LCMObjective(
        LCMConfig(w_min=0.0, w_max=0.0, loss_type="l2", time_power=0.0), replace(teaching, scalings=scalings)
    )
    batch = Batch(draw(Gaussian(0.1, 1.0), 200, 8))
    expected = loss(lcm, Networks(net, teacher=net), batch)
    found = [loss(one, Networks(net, teacher=net), batch) for one in (pcm(teaching, 1), tcd(teaching, phases=1))]
    assert expected > 1e-6
    torch.testing.assert_close(torch.stack(found), torch.stack([expected] * 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("teaching", [vp(), vp("v_prediction", 20), flow(20)], ids=["epsilon", "v", "flow"])
def test_as_many_phases_as_points_are_the_teachers_ddim(teaching):
    """The target is the guided teacher's own step, bit for bit, whatever the student is; the teacher is the solution."""
    objective = pcm(teaching, len(teaching.grid))
    teacher = OracleNet(teaching.process, teaching.prediction_type, Gaussian(0.4, 0.5))
    nets, batch = Networks(nn.Bilinear(1, 1, 1), teacher=teacher), Batch(draw(Gaussian(0.4, 0.5), 50, 6))
    drawn = objective.draw(batch)
    nets.student = OracleNet(teaching.process, teaching.prediction_type, Gaussian(-3.0, 0.1))
    step = ddim_step(lambda x, t: teaching.denoiser(teacher)(x, t, {}), teaching.process, drawn.x_t, drawn.t, drawn.s)
    assert torch.equal(objective.target(nets, batch, drawn), step)
    assert loss(objective, nets, batch) > 1e-3
    nets.student = teacher
    assert loss(objective, nets, batch) == 0


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("phases", [2, 4])
def test_tcd_with_phases_is_pcm_at_the_first_order(phases, order):
    teaching, data = vp(), Gaussian(0.3, 2.0)
    net = OracleNet(VP, "epsilon", data)
    nets, batch = Networks(net, teacher=net), Batch(draw(data, 100, 8))
    same = torch.equal(
        loss(tcd(teaching, phases=phases, order=order), nets, batch), loss(pcm(teaching, phases), nets, batch)
    )
    assert same == (order == 1)


@pytest.mark.parametrize("phases", [1, 4])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_loss_on_the_exact_student_falls_with_the_fourth_power_of_the_grid(prediction_type, phases):
    """The teacher's DDIM errs by O(h^2) a step and the loss is its square: 16 times less per halving."""
    data, losses = Gaussian(0.3, 2.0), []
    for points in (40, 80):
        teaching = vp(prediction_type, points)
        objective = pcm(teaching, phases)

        def ends(t, teaching=teaching, end=objective.phases.end):
            return end[torch.searchsorted(teaching.grid, t).clamp(max=len(end) - 1)]

        student = Exact(VP, prediction_type, data, ends)
        nets = Networks(student, teacher=OracleNet(VP, prediction_type, data))
        losses.append(loss(objective, nets, Batch(draw(data, 10_000, 4))).item())
    for coarse, fine in pairwise(losses):
        assert 12 < coarse / fine < 21


@pytest.mark.parametrize("solver", ["heun", "dpm_2s"])
def test_a_second_order_teacher_leaves_less(solver):
    data, teaching = Gaussian(0.3, 2.0), vp(points=40, target_dim=TARGET)
    nets = Networks(Exact(VP, "epsilon", data), teacher=OracleNet(VP, "epsilon", data))
    first, second = (loss(tcd(teaching, solver=name), nets, Batch(draw(data, 5000, 8))) for name in ("ddim", solver))
    assert second < first / 20


def test_a_told_student_learns_every_jump():
    """The exact one has a loss of the teacher's step alone, 16 times less per halving; one with another law has more."""
    data, losses = Gaussian(0.3, 2.0), []
    for points in (40, 80):
        nets = Networks(Exact(VP, "epsilon", data), teacher=OracleNet(VP, "epsilon", data))
        losses.append(loss(tcd(vp(points=points, target_dim=TARGET)), nets, Batch(draw(data, 10_000, 4))).item())
    for coarse, fine in pairwise(losses):
        assert 11 < coarse / fine < 22
    nets.student = Exact(VP, "epsilon", Gaussian(0.3, 1.5))
    assert loss(tcd(vp(points=80, target_dim=TARGET)), nets, Batch(draw(data, 10_000, 4))) > 100 * losses[-1]


@pytest.mark.parametrize("teaching", [vp(points=20), flow(20)], ids=["vp", "flow"])
@pytest.mark.parametrize("order", [1, 2])
def test_jumps_end_anywhere_below_the_teachers_step(teaching, order):
    objective = tcd(teaching, order=order)
    number = torch.arange(20).repeat_interleave(2000)
    s, before = objective.ends(number), teaching.before[number]
    assert (s >= 0).all()
    assert (s <= before).all()
    mean = s.double().reshape(20, -1).mean(1)
    torch.testing.assert_close(mean, teaching.before.double() / 2, rtol=0.06, atol=1e-9)
    if not s.is_floating_point():
        assert set(s[number == 1].tolist()) == set(range(50))  # both ends belong to it
    net = OracleNet(teaching.process, teaching.prediction_type, Gaussian(0.3, 0.5))
    result = objective(Networks(net, teacher=net), Batch(draw(Gaussian(0.3, 0.5), 100, 4)), PROGRESS)
    assert 0 < result.value < 1
    assert result.logs["s"] < teaching.grid[-1]


def test_the_second_order_of_the_function_errs_less():
    """A student that is the teacher: its jump at the second order is nearer to the flow."""
    data = Gaussian(0.3, 2.0)
    for teaching, name in ((vp(), "dpm_2s"), (flow(), "heun")):
        assert tcd(teaching, order=2).step == name
        net = OracleNet(teaching.process, teaching.prediction_type, data)
        x, t, s = draw(data, 200, 4), teaching.grid[[40] * 200], teaching.grid[[30] * 200]
        exact = data.flow(teaching.process, x, t, s)
        first, second = ((teaching.jump_to(net, x, t, s, {}, None, n) - exact).square().mean() for n in ("ddim", name))
        assert second < first / 20


class Trainable(nn.Module):
    """x0 = gain[t] x + bias[t]."""

    def __init__(self):
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(1000, 1)), nn.Parameter(torch.zeros(1000, 1))

    def forward(self, x_t, t, return_dict=True):
        return (self.gain[t] * x_t + self.bias[t],)


def test_training_of_two_phases_converges_to_the_products_of_solver_steps():
    """The jump from 999 ends at 499: two DDIM steps, whose product is known; so is that of 499 to 0."""
    data, objective = Gaussian(0.5, 0.5), pcm(vp("sample", 4), 2)
    student = Trainable()
    nets = Networks(student, target=frozen_copy(student), teacher=OracleNet(VP, "sample", data))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for step in range(500):
        optimizer.zero_grad()
        objective(nets, Batch(draw(data, 256, 2).float()), Progress(step, 500)).value.backward()
        optimizer.step()
        decay.step()
        nets.target.load_state_dict(student.state_dict())
    for start, middle, end in ((999, 749, 499), (499, 249, 0)):
        gain = 1.0
        for t, s in ((start, middle), (middle, end)):
            a_t, a_s = (float(VP.alphas_cumprod[i]) for i in (t, s))
            gain *= ((a_t * a_s) ** 0.5 * 0.25 + ((1 - a_t) * (1 - a_s)) ** 0.5) / (a_t * 0.25 + 1 - a_t)
        times = torch.tensor([start, start]), torch.tensor([end, end])
        with torch.no_grad():
            f = objective.teaching.jump_to(student, torch.tensor([[0.0], [1.0]]), *times, {}, None)
        assert (f[1] - f[0]).item() == pytest.approx(gain, abs=3e-3)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_gamma_sampling_keeps_mean_and_variance(gamma, steps):
    """With the exact trajectory, told where the scheduler goes: after every number of steps the law at timestep 0."""
    data, student = Gaussian(0.4, 0.6), Exact(VP, "epsilon", Gaussian(0.4, 0.6))
    scheduler = ConsistencyScheduler(gamma=gamma, boundary_scalings="none", set_alpha_to_one=False)
    scheduler.set_timesteps(steps)
    alpha, sigma = (float(of(torch.tensor([999]))) for of in (VP.alpha, VP.sigma))
    x = alpha * draw(data, 40_000, 1) + sigma * torch.randn(40_000, 1, dtype=torch.float64)
    for t in scheduler.timesteps:
        s = scheduler.target_timestep(t)
        told = target_embedding(torch.tensor([s]), TARGET).expand(len(x), TARGET)
        x = scheduler.step(student(x, t.expand(len(x)), told)[0].detach(), t, x).prev_sample
    alpha, sigma = (float(of(torch.tensor([0]))) for of in (VP.alpha, VP.sigma))
    assert x.mean().item() == pytest.approx(alpha * 0.4, abs=0.012)
    assert x.std().item() == pytest.approx((alpha**2 * 0.36 + sigma**2) ** 0.5, rel=0.015)


def test_where_a_step_goes_is_what_the_scheduler_does():
    """floor((1 - gamma) t'), and 0 at the last step."""
    scheduler = ConsistencyScheduler(gamma=0.3, boundary_scalings="none")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 759, 499, 259]
    found = []
    for t in scheduler.timesteps:
        found.append(scheduler.target_timestep(t))
        scheduler.step(torch.zeros(1, 2), t, torch.zeros(1, 2))
    assert found == [531, 349, 181, 0]


@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_phases_sample_deterministically(kind):
    """M exact jumps from start to start, by the schedulers of the records: the flow itself, without noise."""
    data = Gaussian(0.4, 0.6)
    teaching, process = (vp(), VP) if kind == "vp" else (flow(), FLOW)
    phases = Phases.of(teaching.grid, teaching.before, 4)
    starts = phases.starts.flip(0)
    if kind == "vp":
        known = {"boundary_scalings": "none", "set_alpha_to_one": False, "recommended_timesteps": starts.tolist()}
        scheduler = ConsistencyScheduler(gamma=0.0, **known)
    else:
        u = [1.0, 37 / 50, 25 / 50, 12 / 50]
        scheduler = FlowConsistencyScheduler(shift=3.0, gamma=0.0, recommended_sigmas=u)
    scheduler.set_timesteps(4)
    levels = scheduler.timesteps.double() / (1 if kind == "vp" else 1000)
    torch.testing.assert_close(levels, starts.double(), rtol=5e-3, atol=0)
    ends = dict(zip(starts.tolist(), [*starts.tolist()[1:], 0], strict=True))
    student = Exact(process, teaching.prediction_type, data, lambda t: torch.tensor([ends[i] for i in t.tolist()]))
    x = start = torch.randn(50, 3, dtype=torch.float64)
    for t, told in zip(starts, scheduler.timesteps, strict=True):
        x = scheduler.step(student(x, t.expand(50))[0].detach(), told, x).prev_sample
    end = data.flow(process, start, starts[:1].expand(50), torch.zeros_like(starts[:1]).expand(50))
    torch.testing.assert_close(x, end, rtol=0, atol=1e-5 if kind == "vp" else 0.02)


class Recorder(nn.Module):
    """A critic that keeps what it is shown."""

    def __init__(self):
        super().__init__()
        self.slope, self.seen = nn.Parameter(torch.ones(())), []

    def forward(self, x, t, cond):
        self.seen.append((x.detach(), t))
        return self.slope * x.flatten(1)[:, :1]


@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_the_critic_sees_both_at_one_time_of_the_phase(kind):
    teaching = vp() if kind == "vp" else flow()
    objective = pcm(teaching, 4, critic=True, adversarial_start=0, adversarial_ramp=0)
    net = OracleNet(teaching.process, teaching.prediction_type, Gaussian(0.4, 0.5))
    nets = Networks(net, teacher=net, critic=Recorder())
    batch = Batch(draw(Gaussian(0.4, 0.5), 5000, 2))
    torch.manual_seed(1)
    result = objective.judge(nets, batch, PROGRESS)
    assert set(result.logs) == {"critic/loss", "critic/accuracy", "critic/real", "critic/fake"}
    torch.manual_seed(1)
    number = objective.draw(batch).number
    ((_, told),) = nets.critic.seen
    assert torch.equal(told[:5000], told[5000:])
    end, start = objective.phases.end[number], objective.phases.start[number]
    slack = 0 if kind == "vp" else 2e-3  # the grid is rounded
    assert (told[:5000] >= end).all()
    assert (told[:5000] <= start + slack).all()
    assert told.double().mean().item() == pytest.approx((end + start).double().mean().item() / 2, rel=0.03)


def test_the_critic_finds_nothing_where_consistency_holds():
    """As many phases as points, and the teacher as the student: real and fake are the same, shown with the same noise."""
    objective = pcm(vp(), 50, critic=True, adversarial_start=0)
    net = OracleNet(VP, "epsilon", Gaussian(0.4, 0.5))
    nets = Networks(net, teacher=net, critic=Recorder())
    objective.judge(nets, Batch(draw(Gaussian(0.4, 0.5), 100, 2)), PROGRESS)
    ((x, _),) = nets.critic.seen
    assert torch.equal(x[:100], x[100:])


def test_the_critic_pulls_with_its_weight():
    """Its slope is 1, so by hinge the student's loss falls by weight times the mean of what is shown."""
    net = OracleNet(VP, "epsilon", Gaussian(0.4, 0.5))
    nets, batch = Networks(net, teacher=net, critic=Recorder()), Batch(draw(Gaussian(0.4, 0.5), 100, 2))
    known = {"adversarial_start": 10, "adversarial_ramp": 0, "adversarial_weight": 0.5}
    objective = pcm(vp(), 4, critic=True, **known)
    torch.manual_seed(0)
    late = objective(nets, batch, Progress(10, 20))
    plain = loss(pcm(vp(), 4), nets, batch)
    shown = nets.critic.seen[0][0][:, 0].mean()
    assert torch.equal(loss(objective, nets, batch), plain)
    assert late.value.item() == pytest.approx((plain - 0.5 * shown).item(), rel=1e-6)
    assert objective.judge(nets, batch, Progress(9, 20)) is None


def test_fresh_noise_adds_to_the_law_of_the_process():
    for process, times in ((VP, torch.tensor([99, 599])), (FLOW, torch.tensor([0.2, 0.7], dtype=torch.float64))):
        s, t = (time.expand(200_000) for time in times)
        x_s = diffuse(process, draw(Gaussian(0.4, 0.6), 200_000, 1), torch.randn(200_000, 1).double(), s)
        x_t = diffuse_further(process, x_s, torch.randn(200_000, 1).double(), s, t)
        alpha, sigma = process.alpha(t)[0], process.sigma(t)[0]
        assert x_t.mean().item() == pytest.approx(0.4 * alpha.item(), abs=6e-3)
        assert x_t.var().item() == pytest.approx((0.36 * alpha**2 + sigma**2).item(), rel=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PCMConfig(loss_type="l1"), "Unknown --loss_type 'l1'; one of l2, huber."),
        (lambda: PCMConfig(adversarial_loss="wgan"), "Unknown --adversarial_loss 'wgan'; one of hinge, lsgan."),
        (lambda: TCDConfig(order=3), "Unknown --order 3; one of 1, 2."),
        (lambda: TCDConfig(target_time="told"), "Unknown --target_time 'told'; one of none, embedded."),
        (lambda: TCDConfig(w_min=3.0, w_max=2.0), "--w_min 3.0 is above --w_max 2.0; swap them."),
        (lambda: pcm(vp(points=20), 21), "--phases 21 do not fit on 20 points (--num_ddim_timesteps): give 1 to 20."),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared
        make()
    assert str(error.value) == message
