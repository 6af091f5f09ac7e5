"""Easy consistency tuning: pairs by stage, both weightings, and where every stage ends."""

import pytest
import torch
from oracles import Gaussian, OracleNet, edm_scalings, edm_teacher
from tiny import tiny_scheduler
from torch import nn
from toys import forget_accelerate

from cm_diffusers.diffusion.process import EDM, DiscreteVP
from cm_diffusers.diffusion.times import easy_ratio
from cm_diffusers.diffusion.views import EDMView, VPView
from cm_diffusers.objectives.ect import ECTConfig, ECTObjective
from cm_diffusers.types import Batch, Networks, Progress
from objectives.test_cd import DATA, draw, end_of_training


VIEW = EDMView(0.5, "edm")
VP = DiscreteVP.from_scheduler(tiny_scheduler())
PROGRESS = Progress(0, 200_000)
ENDS = {  # a(80) in 1e-3 and a(0.821) of std 0.5, by stage at q = 2; 6.2499 and 0.520145 in the limit
    0: (3.7309, 0.270551), 1: (4.2375, 0.353483), 2: (5.3845, 0.458490), 3: (5.8533, 0.492627), 4: (6.0590, 0.507047),
    7: (6.2267, 0.518571),
}  # fmt: skip


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


def ect(view=VIEW, **settings):
    return ECTObjective(ECTConfig(**settings), view)


def chain(t, stage):
    """t, r(t), r(r(t)) ... down to the last above 0.002, below which the data is the target."""
    times = [t]
    while (r := times[-1] * float(easy_ratio(torch.tensor(times[-1]).double(), stage, 2.0, 8.0, 1.0))) >= 0.002:
        times.append(r)
    return times


# ---- where it ends


@pytest.mark.parametrize("stage", ENDS)
def test_where_a_stage_ends(stage):
    """Per pair the regression of x_r on x_t; below 0.002 nothing is left to gain."""
    for t, expected in zip((80.0, 0.821), ENDS[stage], strict=True):
        a, times = 1.0, [*chain(t, stage), 0.0]
        for r, now in zip(times[1:], times, strict=False):
            a *= 1 - (now - r) * now / (0.25 + now**2)
        assert a * (1e3 if t == 80 else 1) == pytest.approx(expected, rel=3e-5)


@pytest.mark.parametrize(("stage", "q"), [(0, 2.0), (1, 4.0)])
def test_training_ends_there(tmp_path, stage, q):
    """On the sigmas that pairs lead to from 80 and from 0.821; q = 4 in its first stage is q = 2 in its second."""
    sigmas = torch.tensor(sorted({*chain(80.0, stage), *chain(0.821, stage)}), dtype=torch.float64)
    objective = ect(q=q, stage_steps=0, huber_c=4.0)  # the metric does not matter; a smooth one settles sooner

    def times(batch_size, progress):
        t = sigmas[torch.randint(len(sigmas), (batch_size,))]
        r = t * easy_ratio(t, objective.stage(progress), q, 8.0, 1.0)
        return t, torch.where(r < 0.002, 0, r)

    objective.times = times
    a, b = end_of_training(tmp_path, objective, sigmas, lambda sigma: edm_scalings(sigma, 0.5))
    for t, expected in zip((80.0, 0.821), ENDS[stage], strict=True):
        here = int((sigmas - t).abs().argmin())
        assert a[here].item() * (1e3 if t == 80 else 1) == pytest.approx(expected, rel=0.01)
        assert b[here].item() == pytest.approx(0.3 * (1 - a[here].item()), rel=0.01)


# ---- the pairs


def test_pairs_are_drawn_as_the_stage_says():
    objective = ect(stage_steps=100)
    for step, stage in ((0, 0), (99, 0), (100, 1), (250, 2)):
        t, r = objective.times(20_000, Progress(step, 1000))
        assert objective.stage(Progress(step, 1000)) == stage
        assert t.dtype == r.dtype == torch.float64
        torch.testing.assert_close(r[r > 0], (t * easy_ratio(t, stage, 2.0, 8.0, 1.0))[r > 0])
        assert (r == 0).any()
        assert r[r > 0].min() >= 0.002
        assert float(t.log().mean()) == pytest.approx(-1.1, abs=0.05)
    assert ect(stage_steps=0, q=256.0).stage(Progress(199_999, 200_000)) == 0


def test_a_constant_ratio():
    t, r = ect(mapping="const", q=4.0).times(1000, PROGRESS)
    torch.testing.assert_close(r[r > 0], 0.75 * t[r > 0])
    t, r = ect(mapping="const", q=1.0).times(1000, PROGRESS)
    assert not r.any()


# ---- the loss


def replay(objective, batch, seed=3):
    """The draws of one loss: t, r and the noise."""
    torch.manual_seed(seed)
    t, r = objective.times(len(batch.x0), PROGRESS)
    return t, r, torch.randn_like(batch.x0)


def loss(objective, network, batch, seed=3):
    torch.manual_seed(seed)
    return objective(Networks(network), batch, PROGRESS).value.item()


WEIGHTS = {"inverse": lambda t, r: 1 / (t - r), "snrpk": lambda t, r: 1 / t**2 + 4}


@pytest.mark.parametrize("huber_c", [0.0, 0.06])
@pytest.mark.parametrize("weighting", WEIGHTS)
def test_at_r_0_it_is_diffusion(weighting, huber_c):
    """w (sqrt(||D - x0||^2 + c^2) - c) of the denoiser D."""
    objective, batch = ect(mapping="const", q=1.0, weighting=weighting, huber_c=huber_c), Batch(draw(DATA, 500, 8))
    t, r, noise = replay(objective, batch)
    error = DATA.predict(EDM(), batch.x0 + t[:, None] * noise, t).x0 - batch.x0
    expected = WEIGHTS[weighting](t, r) * ((error.square().sum(1) + huber_c**2).sqrt() - huber_c)
    assert loss(objective, edm_teacher(DATA), batch) == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize("huber_c", [0.0, 0.06])
@pytest.mark.parametrize("weighting", WEIGHTS)
def test_pairs_are_compared_as_the_paper_writes(weighting, huber_c):
    """Networks of the closed form D: the target is D at r with the same noise, and the data where r = 0."""
    objective, batch = ect(q=4.0, weighting=weighting, huber_c=huber_c), Batch(draw(DATA, 500, 8))
    t, r, noise = replay(objective, batch)
    assert 0 < (r == 0).sum() < 500
    online = DATA.predict(EDM(), batch.x0 + t[:, None] * noise, t).x0
    target = DATA.predict(EDM(), batch.x0 + r[:, None] * noise, r).x0  # D is the identity at 0
    norm = (online - target).norm(dim=1)
    expected = WEIGHTS[weighting](t, r) * ((norm**2 + huber_c**2).sqrt() - huber_c)
    assert loss(objective, edm_teacher(DATA), batch) == pytest.approx(expected.mean().item(), rel=1e-5)


def test_stages_and_q_give_the_same_loss():
    batch = Batch(draw(DATA, 200, 8))
    many = ect(q=2.0, stage_steps=25_000)
    torch.manual_seed(3)
    eighth = many(Networks(edm_teacher(DATA)), batch, Progress(7 * 25_000, 200_000)).value.item()
    assert loss(ect(q=256.0, stage_steps=0), edm_teacher(DATA), batch) == pytest.approx(eighth, rel=1e-9)


class NoSigmaZero(nn.Module):
    """As networks whose time embedding has no value at 0."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, shown, told, return_dict=True):
        assert told.isfinite().all()
        return (self.gain * shown,)


def test_networks_never_see_sigma_0():
    network = NoSigmaZero()
    value = ect()(Networks(network), Batch(torch.randn(100, 4)), PROGRESS).value
    value.backward()
    assert value.isfinite()
    assert network.gain.grad.isfinite()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_diffusion_model_is_the_start(prediction_type):
    """f of a variance-preserving network is its denoiser, and the loss that of an EDM network of the same data."""
    settings = {"sigma_min": 0.0292, "sigma_max": 14.614}
    batch, t = Batch(draw(DATA, 500, 8)), torch.tensor([0.03, 1.0, 14.0], dtype=torch.float64)
    network = OracleNet(VP, prediction_type, DATA)
    objective = ect(VPView(VP, prediction_type, 0.5), **settings)
    x = draw(Gaussian(0.0, 5.0), 3, 8)
    f = objective.consistency(network, x, t, {})
    torch.testing.assert_close(f, DATA.predict(EDM(), x, t).x0, rtol=2e-5, atol=2e-5)
    expected = loss(ect(**settings), edm_teacher(DATA), batch)
    assert loss(objective, network, batch) == pytest.approx(expected, rel=1e-4)


def test_no_loss_on_a_point_mass():
    """The denoiser of a point mass is its consistency function."""
    batch = Batch(torch.full((500, 4), 0.7, dtype=torch.float64))
    for stage_q in (2.0, 16.0):
        assert loss(ect(q=stage_q), edm_teacher(Gaussian(0.7, 0.0)), batch) < 1e-4
        assert loss(ect(q=stage_q), edm_teacher(Gaussian(0.7, 0.5)), batch) > 1e-2


class Counting(nn.Module):
    """How many samples it is called with; with dropout between its layers."""

    def __init__(self, dropout):
        super().__init__()
        self.layers, self.sizes = nn.Sequential(nn.Linear(8, 8), nn.Dropout(dropout), nn.Linear(8, 8)), []

    def forward(self, shown, told, return_dict=True, **cond):
        self.sizes.append(len(shown))
        assert {len(value) for value in (told, *cond.values())} == {len(shown)}
        return (self.layers(shown) + sum(value for value in cond.values()),)


def test_the_target_runs_on_samples_that_need_it():
    """In the first stage four of five have the data itself; the loss is that of a run on all."""
    batch = Batch(draw(DATA, 500, 8).float(), {"shift": torch.randn(500, 8)})
    network, objective = Counting(0.0), ect()
    t, r, noise = replay(objective, batch)
    needed = int((r > 0).sum())
    found = loss(objective, network, batch)
    assert network.sizes == [needed, 500]
    assert 50 < needed < 150
    jump = objective.consistency(network, batch.x0 + torch.where(r > 0, r, t)[:, None].float() * noise,
                                 torch.where(r > 0, r, t), batch.cond)  # fmt: skip
    online = objective.consistency(network, batch.x0 + t[:, None].float() * noise, t, batch.cond)
    norm = (online - torch.where(r[:, None] > 0, jump, batch.x0)).norm(dim=1)
    assert found == pytest.approx((norm / (t - r)).mean().item(), rel=1e-5)


def test_dropout_masks_are_shared_by_the_whole_batch():
    """They hang on its size, so nothing is left out; both passes then see the same."""
    network = Counting(0.5)
    masks = []
    network.layers[1].register_forward_hook(lambda _, given, made: masks.append(made == 0))
    loss(ect(), network, Batch(torch.randn(20, 8)))
    assert network.sizes == [20, 20]
    assert torch.equal(*masks)


def test_a_batch_of_data_alone_still_calls_the_network():
    """As the other processes do, or they would wait for its buffers."""
    network = Counting(0.0)
    loss(ect(mapping="const", q=1.0), network, Batch(torch.randn(6, 8)))
    assert network.sizes == [1, 6]


# ---- wrong settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"q": 0.5}, "--q must be at least 1, but it is 0.5."),
        ({"mapping_k": -1.0}, "--mapping_k must be at least 0, but it is -1.0."),
        ({"mapping_b": -1.0}, "--mapping_b must be at least 0, but it is -1.0."),
        ({"stage_steps": -1}, "--stage_steps must be at least 0, but it is -1."),
        ({"huber_c": -0.1}, "--huber_c must be at least 0, but it is -0.1."),
        ({"p_std": 0.0}, "--p_std must be above 0, but it is 0.0."),
        ({"mapping": "linear"}, "Unknown --mapping 'linear'; one of sigmoid, const."),
        ({"weighting": "edm"}, "Unknown --weighting 'edm'; one of inverse, snrpk."),
        ({"sigma_min": 80.0}, "--sigma_min 80.0 and --sigma_max 80.0 are no range; give 0 < sigma_min < sigma_max."),
        ({"view": VPView(VP, "epsilon", 1.0)}, "--sigma_min 0.002 is less noise than the network knows; give at least 0.0292."),
    ],
)  # fmt: skip
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared
        ect(**settings)
    assert str(error.value) == message
