"""LCM against data whose consistency function is known exactly."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import LCMScheduler
from latent_objectives import lcm_of
from oracles import ConsistencyNet, Gaussian, OracleNet, guided
from tiny import tiny_scheduler, tiny_unet
from torch import nn

from cm_diffusers.diffusion.process import DiscreteVP, diffuse
from cm_diffusers.engine.averages import ema_update
from cm_diffusers.models.students import frozen_copy
from cm_diffusers.objectives.lcm import LCMConfig
from cm_diffusers.types import Batch, Networks, Progress


VP = DiscreteVP.from_scheduler(tiny_scheduler())
PROGRESS = Progress(0, 10)
TYPES = ["epsilon", "v_prediction", "sample"]


def lcm(prediction_type="epsilon", dim=None, process=VP, **settings):
    settings = {"w_min": 0.0, "w_max": 0.0, "loss_type": "l2", "time_power": 0.0} | settings
    return lcm_of(LCMConfig(**settings), process, prediction_type, dim)


def draw(data, *shape):
    return data.mean + data.std * torch.randn(shape, dtype=torch.float64)


def oracle_loss(objective, data, uncond=None, batch=None, solution=None):
    """The loss of the exact consistency function of `solution` (or `data`) with the exact teacher of `data`."""
    student = ConsistencyNet(VP, objective.teaching.prediction_type, solution or data)
    teacher = OracleNet(VP, objective.teaching.prediction_type, data, uncond)
    batch = batch or Batch(draw(data, 20_000, 16))
    return objective(Networks(student, teacher=teacher), batch, PROGRESS).value.item()


def test_boundary_is_exact_for_any_network():
    objective, x = lcm(dim=16), torch.randn(3, 4, 8, 8)
    cond = {"encoder_hidden_states": torch.randn(3, 5, 32)}
    with torch.no_grad():
        f = objective.teaching.jump(
            tiny_unet(time_cond_proj_dim=16), x, torch.zeros(3, dtype=torch.long), cond, torch.ones(3)
        )
    assert torch.equal(f, x)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_student_oracle_is_the_consistency_function(prediction_type):
    data, t = Gaussian(0.4, 0.5), torch.tensor([0, 1, 19, 499, 999])
    x_t = torch.randn(5, 3, dtype=torch.float64)
    f = lcm(prediction_type).teaching.jump(ConsistencyNet(VP, prediction_type, data), x_t, t, {}, torch.zeros(5))
    torch.testing.assert_close(f, data.consistency(VP, x_t, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_loss_on_the_oracle_falls_with_the_fourth_power_of_the_grid(prediction_type):
    """DDIM's local error is O(h^2) and the loss its square: 16 times less per halving."""
    losses = [oracle_loss(lcm(prediction_type, num_ddim_timesteps=n), Gaussian(0.3, 2.0)) for n in (25, 50, 100, 200)]
    for coarse, fine in pairwise(losses):
        assert 14 < coarse / fine < 18


@pytest.mark.parametrize("num_steps", [25, 100])
def test_loss_on_the_oracle_has_the_predicted_value(num_steps):
    """Mean over the grid of (DDIM gain - exact gain)^2 times the gain to 0 and the variance of x_t, in closed form."""
    v, expected = 0.25, 0.0
    skip = 1000 // num_steps
    for t in range(skip - 1, 1000, skip):
        a_t, a_s, a_0 = (float(VP.alphas_cumprod[i]) for i in (t, max(t - skip, 0), 0))
        var_t, var_s, var_0 = (a * v + 1 - a for a in (a_t, a_s, a_0))
        ddim = ((a_t * a_s) ** 0.5 * v + ((1 - a_t) * (1 - a_s)) ** 0.5) / var_t
        expected += (ddim - (var_s / var_t) ** 0.5) ** 2 * var_0 / var_s * var_t / num_steps
    assert oracle_loss(lcm(num_ddim_timesteps=num_steps), Gaussian(0.3, 0.5)) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("solver", ["heun", "dpm_2s"])
def test_second_order_solvers_leave_less(solver):
    first, second = (oracle_loss(lcm(solver=name), Gaussian(0.3, 2.0)) for name in ("ddim", solver))
    assert second < first / 30


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm_2s"])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_no_loss_on_a_point_mass(solver, prediction_type):
    """Every solver is exact there, so the exact student is the fixed point; another one is not."""
    objective, data = lcm(prediction_type, solver=solver), Gaussian(0.7, 0.0)
    assert oracle_loss(objective, data, batch=Batch(draw(data, 500, 4))) < 1e-10
    assert oracle_loss(objective, data, batch=Batch(draw(data, 500, 4)), solution=Gaussian(0.7, 0.5)) > 1e-4


@pytest.mark.parametrize("w", [0.0, -1.0, 4.0])
def test_the_solution_is_that_of_the_guided_teacher(w):
    """Fixed w: the target follows (1 + w) cond - w uncond, so its consistency function has (almost) no loss."""
    cond, uncond = Gaussian(0.5, 2.0), Gaussian(-0.5, 2.0)
    labels = torch.ones(2000)
    batch = Batch(draw(cond, 2000, 16), {"label": labels}, {"label": torch.zeros_like(labels)})
    objective = lcm(w_min=w, w_max=w, num_ddim_timesteps=100)
    assert oracle_loss(objective, cond, uncond, batch, guided(cond, uncond, w)) < 5e-6
    assert oracle_loss(objective, cond, uncond, batch, guided(cond, uncond, w + 1)) > 5e-5


def test_prediction_types_give_the_same_loss():
    def loss(prediction_type):
        torch.manual_seed(1)
        return oracle_loss(lcm(prediction_type), Gaussian(0.3, 0.5), batch=Batch(draw(Gaussian(0.3, 0.5), 2000, 8)))

    losses = [loss(name) for name in TYPES]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-3)


class Recorder(OracleNet):
    """Keeps the arguments of every call, and a random number drawn in it."""

    def forward(self, x_t, t, **cond):
        self.calls.append({"x": x_t, "t": t, "draw": torch.rand(1)} | cond)
        return (self.gain * x_t,)


def recorded(objective, batch, target=False):
    student, teacher = (
        Recorder(VP, "epsilon", Gaussian(0, 1)),
        OracleNet(VP, objective.teaching.prediction_type, Gaussian(0, 1)),
    )
    nets = Networks(student, target=Recorder(VP, "epsilon", Gaussian(0, 1)) if target else None, teacher=teacher)
    loss = objective(nets, batch, PROGRESS)
    offline, online = student.calls if not target else (*nets.target.calls, *student.calls)
    return loss, online, offline, teacher


def test_target_at_the_first_time_is_x_s():
    """With one grid time every pair is (t, 0), where f(x_s, 0) = x_s whatever the network says."""
    objective, batch = lcm("sample", num_ddim_timesteps=50), Batch(torch.randn(64, 8, dtype=torch.float64))
    objective.teaching = replace(objective.teaching, grid=objective.teaching.grid[:1])
    loss, online, offline, _ = recorded(objective, batch)
    assert set(online["t"].tolist()) == {19}
    assert set(offline["t"].tolist()) == {0}
    f = objective.teaching.jump(lambda x, t, **_: (x,), online["x"], online["t"], {}, torch.zeros(64))
    assert loss.value.item() == pytest.approx((f - offline["x"]).square().mean().item(), rel=1e-12)


@pytest.mark.parametrize("target", [True, False])
def test_student_and_target_see_the_same_random_state_and_guidance(target):
    batch = Batch(torch.randn(8, 4), {"label": torch.ones(8)}, {"label": torch.zeros(8)})
    loss, online, offline, teacher = recorded(lcm(dim=16, w_min=2.0, w_max=14.0), batch, target)
    assert torch.equal(online["draw"], offline["draw"])
    assert torch.equal(online["timestep_cond"], offline["timestep_cond"])
    assert torch.equal(online["label"], batch.cond["label"])
    assert torch.equal(offline["label"], batch.cond["label"])
    assert 2 < loss.logs["w"] < 14
    assert teacher.calls == [16]  # both branches, one call


def test_the_student_is_told_the_strength_that_guides_the_teacher():
    """With data 1 in the condition and 0 without, the guided data is 1 + w, which x_s shows."""
    student, teacher = Recorder(VP, "epsilon", Gaussian(0, 1)), OracleNet(VP, "sample", Gaussian(1, 0), Gaussian(0, 0))
    batch = Batch(torch.randn(64, 4, dtype=torch.float64), {"label": torch.ones(64)}, {"label": torch.zeros(64)})
    loss = lcm("sample", dim=16, w_min=2.0, w_max=14.0)(Networks(student, teacher=teacher), batch, PROGRESS)
    offline, online = student.calls
    (a_t, b_t), (a_s, b_s) = ((VP.alpha(c["t"])[:, None], VP.sigma(c["t"])[:, None]) for c in (online, offline))
    data = (offline["x"] - b_s / b_t * online["x"]) / (a_s - a_t * b_s / b_t)  # DDIM (2010.02502, Eq. 12), solved
    told = 10 * online["timestep_cond"][:, 7].asin().double()  # the slowest wave is sin(1000 w / 10000)
    torch.testing.assert_close(told[:, None].expand(64, 4) + 1, data, rtol=1e-4, atol=1e-4)
    assert told.max() - told.min() > 6
    assert loss.logs["w"].item() == pytest.approx(told.mean().item(), rel=1e-4)


def test_without_an_embedding_the_network_gets_none():
    _, online, _, _ = recorded(lcm(), Batch(torch.randn(2, 4)))
    assert "timestep_cond" not in online


class Affine(nn.Module):
    """x0 = gain[t] x + bias[t]: every time has its own student."""

    def __init__(self):
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(1000, 1)), nn.Parameter(torch.zeros(1000, 1))

    def forward(self, x_t, t, return_dict=True):
        return (self.gain[t] * x_t + self.bias[t],)


def test_training_converges_to_the_product_of_solver_steps():
    """f(x_t) = DDIM from grid time to grid time down to 0: affine for a Gaussian, known in closed form."""
    data, objective = Gaussian(0.5, 0.5), lcm("sample", num_ddim_timesteps=4)
    student = Affine()
    nets = Networks(student, target=frozen_copy(student), teacher=OracleNet(VP, "sample", data))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for step in range(600):
        optimizer.zero_grad()
        objective(nets, Batch(draw(data, 256, 2).float()), Progress(step, 600)).value.backward()
        optimizer.step()
        decay.step()
        ema_update(nets.target, student, 0.9)
    gain, mean = 1.0, data.mean * float(VP.alphas_cumprod[0]) ** 0.5
    for t, s in ((249, 0), (499, 249), (749, 499), (999, 749)):
        a_t, a_s = (float(VP.alphas_cumprod[i]) for i in (t, s))
        gain *= ((a_t * a_s) ** 0.5 * 0.25 + ((1 - a_t) * (1 - a_s)) ** 0.5) / (a_t * 0.25 + 1 - a_t)
        assert student.gain[t].item() == pytest.approx(gain, abs=2e-3)
        assert student.bias[t].item() == pytest.approx(mean - gain * a_t**0.5 * data.mean, abs=2e-3)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_sampling_loop_equals_the_scheduler(n, prediction_type):
    """What a student is trained with is what it is sampled with: f, then noise at the next time, none after the last."""
    scheduler = LCMScheduler.from_config(tiny_scheduler(prediction_type).config, original_inference_steps=50)
    scheduler.set_timesteps(n)
    net, objective = OracleNet(VP, prediction_type, Gaussian(0.4, 0.5)).requires_grad_(False), lcm(prediction_type)
    ours = theirs = torch.randn(2, 4, 8, 8)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    times = scheduler.timesteps.tolist()
    for i, t in enumerate(times):
        time = torch.tensor([t, t])
        ours = objective.teaching.jump(net, ours, time, {}, torch.zeros(2))
        if i + 1 < n:
            noise = torch.randn(ours.shape, generator=generators[0], dtype=ours.dtype)
            ours = diffuse(VP, ours, noise, torch.tensor([times[i + 1]] * 2))
        output = net(theirs, time, return_dict=False)[0].float()
        theirs = scheduler.step(output, t, theirs, generator=generators[1], return_dict=False)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(*[g.get_state() for g in generators])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"w_min": 5.0, "w_max": 2.0}, "--w_min 5.0 is above --w_max 2.0; swap them."),
        ({"solver": "euler"}, "Unknown --solver 'euler'; one of ddim, heun, dpm_2s."),
        ({"loss_type": "l1"}, "Unknown --loss_type 'l1'; one of l2, huber."),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared
        lcm(**settings)
    assert str(error.value) == message


def zero_snr():
    return DiscreteVP.from_scheduler(
        type(tiny_scheduler()).from_config(tiny_scheduler().config, rescale_betas_zero_snr=True)
    )


def test_epsilon_needs_a_signal_at_the_last_time():
    with pytest.raises(ValueError, match="zero terminal SNR: its last timestep holds no signal"):
        lcm(process=zero_snr())


@pytest.mark.parametrize("solver", ["heun", "dpm_2s"])
def test_second_order_solvers_need_a_signal_too(solver):
    with pytest.raises(ValueError, match="zero terminal SNR"):
        lcm("v_prediction", process=zero_snr(), solver=solver)


def test_ddim_distils_zero_snr_teachers():
    process = zero_snr()
    assert process.alphas_cumprod[-1] == 0
    objective, data = lcm("v_prediction", process=process), Gaussian(0.3, 0.5)
    net = OracleNet(process, "v_prediction", data)
    loss = objective(Networks(net, teacher=net), Batch(draw(data, 500, 4)), PROGRESS).value
    assert loss.isfinite()
