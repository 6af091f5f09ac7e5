"""Networks of rectified flow in EDM's and TrigFlow's coordinates: conversions, and objectives that know neither."""

import copy
import math

import pytest
import torch
from diffusers import SD3Transformer2DModel
from oracles import Gaussian, OracleNet, edm_student, edm_teacher
from tiny import tiny_scheduler
from torch import nn

from cm_diffusers.diffusion.preconditioning import edm_scalings
from cm_diffusers.diffusion.process import EDM, DiscreteVP, RectifiedFlow, TrigFlow, append_dims, diffuse, interpret
from cm_diffusers.diffusion.trigflow import TrigFlowView, trigflow_denoiser, velocity
from cm_diffusers.diffusion.views import EDMView, FlowView, check_sigmas, edm_denoiser
from cm_diffusers.models.time_weight import WithTimeWeight
from cm_diffusers.objectives.cd import CDConfig, CDObjective
from cm_diffusers.objectives.ct import CTConfig, CTObjective
from cm_diffusers.objectives.ect import ECTConfig, ECTObjective
from cm_diffusers.objectives.edm import EDMConfig, EDMObjective
from cm_diffusers.objectives.ict import ICTConfig, ICTObjective
from cm_diffusers.objectives.scm import SCMConfig, SCMObjective
from cm_diffusers.objectives.slct import SLCTConfig, SLCTObjective
from cm_diffusers.types import Batch, Networks, Progress


RF, DATA, PROGRESS = RectifiedFlow(), Gaussian(0.3, 1.3), Progress(3, 10)
SIGMAS = [0.002, 0.3, 1.0, 9.0, 80.0]


def at(*values):
    return torch.tensor(values, dtype=torch.float64)


def call(network, x_t, t, cond):
    """A network that is told 1000 t, by names of its own."""
    return network(noisy=x_t, timestep=1000 * t, **cond)[0]


class Oracle(nn.Module):
    """Answers with the velocity of an `OracleNet` for what it is told, in that many thousandths."""

    def __init__(self, answer=None):
        super().__init__()
        self.answer, self.seen = answer or OracleNet(RF, "flow_prediction", DATA), []

    def forward(self, noisy, timestep, label=None):
        self.seen.append((noisy, timestep, label))
        return self.answer(noisy, timestep / 1000)


class Constant(nn.Module):
    """Answers with the same velocity, whatever it is shown."""

    def __init__(self, v):
        super().__init__()
        self.v = v

    def forward(self, noisy, timestep):
        return (self.v,)


# ---- conversions


@pytest.mark.parametrize(
    ("t", "sigma", "q", "angle", "angle_of_half", "index"),
    [
        (0.75, 3.0, 0.7905694150, 1.2490457724, 1.4056476494, 673),
        (0.9, 9.0, None, 1.4601391056, 1.5152978215, 914),
        (0.25, 1 / 3, None, None, None, 95),
        (0.5, 1.0, math.sqrt(0.5), math.pi / 4, None, 354),
    ],
)
def test_times_of_the_same_signal_to_noise_ratio(t, sigma, q, angle, angle_of_half, index):
    half = RF.half_log_snr(at(t))
    vp = DiscreteVP.from_scheduler(tiny_scheduler())
    assert EDM().time_at(half).item() == pytest.approx(sigma, rel=1e-12)
    assert FlowView(1.0, call).told(at(sigma)).item() == pytest.approx(t, rel=1e-12)
    assert vp.time_at(half).item() == pytest.approx(index, abs=0.6)
    for d, expected in ((1.0, angle), (0.5, angle_of_half)):
        found = TrigFlow(d).time_at(half)
        assert TrigFlowView.of(FlowView(d, call)).told(found).item() == pytest.approx(t, rel=1e-12)
        assert expected is None or found.item() == pytest.approx(expected, abs=1e-10)
        assert found.item() == pytest.approx(math.atan2(t, d * (1 - t)), rel=1e-12)
    if q is not None:
        assert math.hypot(t, 1 - t) == pytest.approx(q, abs=1e-10)
        assert TrigFlow(1.0).alpha(TrigFlow(1.0).time_at(half)).item() == pytest.approx((1 - t) / q, rel=1e-9)
        assert ((1 - t) / q) ** 2 == pytest.approx(0.1 if t == 0.75 else 0.5, abs=1e-9)


@pytest.mark.parametrize("d", [0.5, 1.0, 1.3])
def test_a_velocity_in_edm_s_coordinates(d):
    """F = (sigma - d^2) / (d r (1 + sigma)) x - r / (d (1 + sigma)) v, and D = x / (1 + sigma) - t v."""
    sigma, x, v = at(*SIGMAS)[:, None], *torch.randn(2, 5, 4, dtype=torch.float64)
    x = x * (d**2 + sigma**2).sqrt()
    view, r = FlowView(d, call), (sigma**2 + d**2).sqrt()
    F = view(Constant(v), x, sigma.flatten(), {}).double()
    expected = (sigma - d**2) / (d * r * (1 + sigma)) * x - r / (d * (1 + sigma)) * v
    torch.testing.assert_close(F, expected, rtol=1e-6, atol=1e-6)
    c_skip, c_out = (c[:, None] for c in edm_scalings(sigma.flatten(), d))
    t = sigma / (1 + sigma)
    torch.testing.assert_close(c_skip * x + c_out * F, x / (1 + sigma) - t * v, rtol=1e-5, atol=1e-5)
    found = edm_denoiser(view, Constant(v))(x, sigma.flatten(), {})
    own = interpret(RF, v, x / (1 + sigma), t.flatten(), "flow_prediction")
    for ours, theirs in zip(found, own, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("d", [0.5, 1.0, 1.3])
def test_a_velocity_in_trigflow_s_coordinates(d):
    """F = (cos x - D) / (d sin) is minus EDM's; x_rf = x / (cos + d sin), also at pure noise."""
    t = at(0.002, 0.25, 0.75, 0.9, 1.0)
    theta = torch.atan2(t, d * (1 - t))
    x, v = torch.randn(2, 5, 4, dtype=torch.float64)
    cos, sin, time = (value[:, None] for value in (theta.cos(), theta.sin(), t))
    c = ((1 - time) ** 2 + time**2 / d**2).sqrt()
    torch.testing.assert_close(c, 1 / (cos + d * sin))
    network, view = Oracle(lambda *_: (v,)), TrigFlowView.of(FlowView(d, call))
    F = view(network, x, theta, {})
    ((noisy, told, _),) = network.seen
    torch.testing.assert_close(noisy, c * x)
    torch.testing.assert_close(told, 1000 * t, rtol=1e-12, atol=0)
    torch.testing.assert_close(d * sin * F, cos * x - (c * x - time * v))
    assert F.dtype == torch.float64
    edm = FlowView(d, call)(Constant(v[:-1]), (x / cos)[:-1], d * theta.tan()[:-1], {}).double()
    torch.testing.assert_close(edm, -F[:-1], rtol=1e-5, atol=1e-5)


def test_with_unit_variance_it_is_the_form_of_sana():
    """F = [(1 - 2t) x + (1 - 2t + 2t^2) v] / q of x as the network sees it (2503.09641, Eq. 9), and back."""
    t, x, v = at(0.1, 0.5, 0.75, 0.9, 1.0), *torch.randn(2, 5, 4, dtype=torch.float64)
    time, theta = t[:, None], torch.atan2(t, 1 - t)
    q = torch.hypot(time, 1 - time)
    F = TrigFlowView.of(FlowView(1.0, call))(Constant(v), x / q, theta, {})
    torch.testing.assert_close(F, ((1 - 2 * time) * x + (1 - 2 * time + 2 * time**2) * v) / q)
    torch.testing.assert_close((q * F - (1 - 2 * time) * x) / (1 - 2 * time + 2 * time**2), v)
    x0, noise = interpret(RF, v, x, t, "flow_prediction")
    torch.testing.assert_close(((1 - time) * noise - time * x0) / q, F)  # a VP network's v


# ---- what the network is shown


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_most_noise_of_training_is_less_than_all(dtype):
    network, label = Oracle(lambda x, t: (torch.zeros_like(x),)), torch.tensor([1, 2])
    view = FlowView(1.0, call)
    check_sigmas(view, 0.002, 80.0)
    F = view(network, torch.randn(2, 3, dtype=dtype), at(0.002, 80.0), {"label": label})
    ((noisy, told, seen),) = network.seen
    assert noisy.dtype == dtype
    assert F.dtype == torch.float32
    assert seen is label
    assert 0 < told[0] < told[1] < 1000
    assert told.double().tolist() == pytest.approx([1000 * 0.002 / 1.002, 1000 * 80 / 81], rel=2**-8)
    assert view.sigma_range == TrigFlowView.of(view).sigma_range == (0, math.inf)


def test_wrong_standard_deviation():
    with pytest.raises(ValueError, match=r"--sigma_data is 0\.0, but the standard deviation of data must be positive"):
        FlowView(0.0, call)


@pytest.mark.parametrize("d", [0.5, 1.0])
def test_the_denoiser_of_the_oracle(d):
    sigma, theta = at(*SIGMAS), torch.atan(at(*SIGMAS) / d)
    x = torch.randn(5, 6, dtype=torch.float64) * (1.69 + sigma[:, None] ** 2).sqrt()
    found = edm_denoiser(FlowView(d, call), Oracle())(x, sigma, {})
    for ours, theirs in zip(found, DATA.predict(EDM(), x, sigma), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    x = x * theta.cos()[:, None]
    found = trigflow_denoiser(TrigFlowView.of(FlowView(d, call)), Oracle())(x, theta, {})
    for ours, theirs in zip(found, DATA.predict(TrigFlow(d), x, theta), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# ---- objectives


def slct(view):
    return SLCTObjective(SLCTConfig(coupling="independent"), view)


OBJECTIVES = {
    "cd": lambda view: CDObjective(CDConfig(loss_type="l2"), view),
    "ct": lambda view: CTObjective(CTConfig(loss_type="l2"), view),
    "ict": lambda view: ICTObjective(ICTConfig(), view),
    "ect": lambda view: ECTObjective(ECTConfig(), view),
    "edm": lambda view: EDMObjective(EDMConfig(), view),
    "slct": slct,
}


@pytest.mark.parametrize("d", [0.5, 1.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_has_the_loss_of_the_same_network_of_edm(name, d):
    batch, losses = Batch(DATA.mean + DATA.std * torch.randn(200, 8, dtype=torch.float64)), []
    for view, network in ((FlowView(d, call), Oracle()), (EDMView(d, "edm"), edm_teacher(DATA, sigma_data=d))):
        torch.manual_seed(3)
        loss = OBJECTIVES[name](view)(Networks(network, teacher=network), batch, PROGRESS)
        losses.append(loss.value.item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)
    assert losses[0] > 1e-6


def test_a_teacher_of_flow_distils_a_student_of_edm_as_its_own_kind_does():
    """One loss of CD on the exact consistency model, stepped by either teacher."""
    x, grid = DATA.mean + 80 * torch.randn(17, 4, dtype=torch.float64), at(0.002, 0.5, 80.0)
    teachers = [edm_denoiser(FlowView(0.5, call), Oracle()), edm_denoiser(EDMView(0.5, "edm"), edm_teacher(DATA))]
    for sigma in grid:
        ours, theirs = (denoise(x, sigma.expand(17), {}).x0.double() for denoise in teachers)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert edm_student(DATA).sigma_data == 0.5


# ---- sCM


def scm(view, **settings):
    return SCMObjective(SCMConfig(**{"tangent_warmup_steps": 0, "learned_weight": False} | settings), view)


def oracle_tangent(network, d, kind="jvp", dtype=torch.float64):
    """t, the sample as the network sees it, and df / dt along the flow of rectified flow."""
    t = at(0.02, 0.25, 0.6, 0.9, 0.98)
    theta = torch.atan2(t, d * (1 - t))
    torch.manual_seed(0)
    x = diffuse(TrigFlow(d), *torch.randn(2, 5, 6, dtype=torch.float64), theta)
    dx = velocity(DATA.predict(TrigFlow(d), x, theta), theta, d)
    view, cos = TrigFlowView.of(FlowView(d, call)), theta.cos()
    g = scm(view, tangent=kind).tangent(network, {}, x.to(dtype), theta, dx.to(dtype), 1.0)
    c = 1 / (cos + d * theta.sin())
    return t[:, None], c[:, None] * x, g / append_dims(cos * d * c**2, x)  # d theta / dt = 1 / (d c^2)


@pytest.mark.parametrize("d", [0.5, 1.0])
def test_the_tangent_of_the_teacher_itself(d):
    """df / dt = v - F - t dF / dt = -S^2 t / V^2 (x - (1 - t) mu) for F = v."""
    t, x, g = oracle_tangent(Oracle(), d)
    variance = (1 - t) ** 2 * 1.69 + t**2
    torch.testing.assert_close(g, -1.69 * t / variance**2 * (x - (1 - t) * 0.3), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("d", [0.5, 1.0])
def test_the_tangent_of_the_exact_student_vanishes(d):
    """F = (x - f) / t."""
    exact = Oracle(lambda x, t: ((x - DATA.consistency(RF, x, t)) / t[:, None],))
    assert oracle_tangent(exact, d)[2].abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["central", "one_sided", "semi"])
def test_differences_know_how_long_the_time_of_a_flow_is(kind):
    """In float32, where a step of a UNet's 0.05 would leave the interval."""
    student = Oracle(lambda x, t: (torch.sin(2 * x) * torch.cos(5 * t)[:, None],))
    exact, found = (oracle_tangent(student, 1.0, *where)[2] for where in (("jvp",), (kind, torch.float32)))
    assert (found - exact).abs().max() < 6e-3 * exact.abs().max()


@pytest.mark.parametrize("taught", [True, False])
def test_scm_has_the_loss_of_the_same_network_of_edm(taught):
    batch, losses = Batch(DATA.mean + DATA.std * torch.randn(200, 8, dtype=torch.float64)), []
    for view, network in ((FlowView(0.5, call), Oracle()), (EDMView(0.5, "edm"), edm_teacher(DATA))):
        torch.manual_seed(3)
        nets = Networks(network, teacher=network if taught else None)
        losses.append(scm(TrigFlowView.of(view))(nets, batch, PROGRESS).value.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] > 1e-4


def test_scm_s_learned_weight_goes_with_a_network_called_its_own_way():
    """exp(w) E - w, w = b at all times while the head's weights are 0; at 0 it is the loss without."""
    batch, student = Batch(DATA.mean + DATA.std * torch.randn(200, 8, dtype=torch.float64)), WithTimeWeight(Oracle())
    view, losses = TrigFlowView.of(FlowView(0.5, call)), {}
    for bias in (0.0, 0.7):
        nn.init.constant_(student.head.bias, bias)
        torch.manual_seed(3)
        losses[bias] = scm(view, learned_weight=True)(Networks(student), batch, PROGRESS).value
    torch.manual_seed(3)
    plain = scm(view)(Networks(student.network), batch, PROGRESS).value.item()
    assert losses[0.0].item() == pytest.approx(plain, rel=1e-6)
    assert losses[0.7].item() == pytest.approx(math.exp(0.7) * plain - 0.7, rel=1e-6)
    losses[0.7].backward()
    assert student.head.weight.grad.abs().max() > 0


# ---- a network of today


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        **{"sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2},
        **{"attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 16, "caption_projection_dim": 32},
        **{"pooled_projection_dim": 16, "pos_embed_max_size": 8, "qk_norm": "rms_norm"},
    )


def call_sd3(network, x_t, t, cond):
    return network(x_t, timestep=1000 * t, **cond, return_dict=False)[0]


@pytest.mark.parametrize("name", [*OBJECTIVES, "scm"])
def test_a_transformer_that_predicts_a_velocity_learns_by_every_objective(transformer, name):
    cond = {"encoder_hidden_states": torch.randn(2, 5, 16), "pooled_projections": torch.randn(2, 16)}
    view, batch = FlowView(1.0, call_sd3), Batch(torch.randn(2, 4, 8, 8), cond)
    objective = scm(TrigFlowView.of(view), learned_weight=True) if name == "scm" else OBJECTIVES[name](view)
    student = WithTimeWeight(copy.deepcopy(transformer)) if name == "scm" else copy.deepcopy(transformer)
    loss = objective(Networks(student, teacher=transformer), batch, PROGRESS).value
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
    assert max(p.grad.abs().max() for p in student.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for p in transformer.parameters())


def test_the_tangent_of_a_transformer_is_exact(transformer):
    cond = {"encoder_hidden_states": torch.randn(2, 5, 16).double(), "pooled_projections": torch.randn(2, 16).double()}
    student, view = copy.deepcopy(transformer).double(), TrigFlowView.of(FlowView(1.0, call_sd3))
    x, dx, t = *torch.randn(2, 2, 4, 8, 8, dtype=torch.float64), at(0.4, 1.2)
    exact, central = (scm(view, tangent=kind).tangent(student, cond, x, t, dx, 1.0) for kind in ("jvp", "central"))
    assert (exact - central).norm() < 2e-2 * exact.norm()
