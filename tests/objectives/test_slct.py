"""sLCT: the Cauchy metric, the loss at little noise, the coupling and the norms without a scale."""

import math
import sys

import pytest
import torch
from diffusers import UNet2DModel
from diffusion.test_views import tiny_image_unet
from oracles import Gaussian, GridLinear, edm_student
from torch import nn
from torch.nn import functional as F
from toys import forget_accelerate, tensors, toy_trainer

from cm_diffusers.diffusion.distances import cauchy, pseudo_huber
from cm_diffusers.diffusion.times import lognormal_probabilities, sample_neighbours
from cm_diffusers.diffusion.views import EDMView
from cm_diffusers.engine.checkpoints import trainable_state
from cm_diffusers.objectives.slct import SLCTConfig, SLCTObjective, freeze_norm_scales
from cm_diffusers.types import Batch, Networks, Progress
from objectives.test_cd import DATA, draw, end_on_a_grid, karras


VIEW = EDMView(0.5, "edm")


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


def slct(**settings):
    return SLCTObjective(SLCTConfig(**{"coupling": "independent"} | settings), VIEW)


# ---- the metric


def vector(norm, elements=64):
    x = torch.randn(elements, dtype=torch.float64)
    return (norm * x / x.norm())[None].requires_grad_()


def pull(norm, c):
    x = vector(norm)
    cauchy(x, torch.zeros_like(x), c).sum().backward()
    return float(x.grad.norm())


@pytest.mark.parametrize("c", [0.0345, 2.53e-4])
def test_cauchy_acts_on_the_norm_of_the_sample(c):
    values = [cauchy(x, torch.zeros_like(x), c).item() for x in (vector(c), vector(1e-3 * c), vector(0))]
    assert values[0] == pytest.approx(math.log(1.5), rel=1e-12)
    assert values[1] == pytest.approx(1e-6 / 2, rel=1e-6)
    assert values[2] == 0


@pytest.mark.parametrize("c", [0.0345, 2.53e-4])
def test_cauchy_s_pull_has_a_peak_and_a_tail(c):
    """1 / (sqrt(2) c) at sqrt(2) c; 2 / n far from it. Pseudo-Huber's stays at 1."""
    peak = 2**0.5 * c
    assert pull(peak, c) == pytest.approx(1 / peak, rel=1e-9)
    assert pull(0.9 * peak, c) < pull(peak, c) > pull(1.1 * peak, c)
    assert pull(1000 * c, c) == pytest.approx(2 / (1000 * c), rel=1e-5)


# ---- the loss


def terms(objective, network, batch, step=0):
    loss = objective(Networks(network), batch, Progress(step, 7))
    return loss, {name: log.item() for name, log in loss.logs.items()}


@pytest.mark.parametrize(("step", "cut"), [(0, 0.085), (1, 0.170), (6, 0.170)])
def test_a_quarter_of_the_grid_also_denoises(step, cut):
    """At 11, 21 and 641 points: a network that is off by 1 at sigma <= cut and by 3 above shows which samples count."""
    objective, seen = slct(), []

    def network(shown, told, return_dict=True):
        sigma = torch.exp(4 * told)[:, None]
        seen.append(sigma)
        x = shown * (sigma**2 + 0.25).sqrt()
        c_skip, c_out = 0.25 / ((sigma - 0.002) ** 2 + 0.25), (sigma - 0.002) * 0.5 / (sigma**2 + 0.25).sqrt()
        off = torch.where(sigma <= cut + 5e-4, 1.0, 3.0)
        return (torch.where(sigma > 0.00201, (off - c_skip * x) / c_out, 0),)

    loss, logs = terms(objective, network, Batch(torch.zeros(20_000, 2, dtype=torch.float64)), step)
    assert logs["diffusion"] == pytest.approx(1, rel=0.05)  # times the share of samples here over that expected
    assert loss.value.item() == pytest.approx(logs["consistency"] + 5 * logs["diffusion"], rel=1e-6)
    grid = objective.grid(Progress(step, 7))
    assert float(grid[grid <= cut + 5e-4].max()) == pytest.approx(cut, abs=5e-4)
    share = (seen[1] <= cut + 5e-4).double().mean()  # of the student's times
    mass = lognormal_probabilities(grid, -1.1, 2.0)[grid[1:] <= cut + 5e-4].sum()
    assert float(share) == pytest.approx(float(mass), abs=0.012)


def test_a_batch_without_little_noise_has_no_diffusion_loss():
    batch = Batch(draw(DATA, 100, 4))
    loss, logs = terms(slct(diffusion_share=0.0), edm_student(DATA), batch)
    assert logs["diffusion"] == 0
    assert loss.value.item() == logs["consistency"]
    torch.manual_seed(0)
    weighted, logs = terms(slct(diffusion_share=1.0, diffusion_weight=2.0), edm_student(DATA), batch)
    torch.manual_seed(0)
    plain, _ = terms(slct(diffusion_share=1.0, diffusion_weight=0.0), edm_student(DATA), batch)
    assert logs["diffusion"] > 0.01
    assert weighted.value.item() == pytest.approx(plain.value.item() + 2 * logs["diffusion"])


def test_the_diffusion_loss_does_not_hang_on_the_micro_batch(monkeypatch):
    """The mean over micro-batches of any size is that of all samples at once, and on average that of a sample with it."""
    objective, count = slct(), 48
    grid = objective.grid(Progress(1, 7))
    probabilities = lognormal_probabilities(grid, -1.1, 2.0)
    t, s = sample_neighbours(count, grid, probabilities)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)

    def diffusion(rows):
        monkeypatch.setattr("cm_diffusers.objectives.slct.sample_neighbours", lambda *_: (t[rows], s[rows]))
        batch = Batch(torch.zeros(len(rows), 1, dtype=torch.float64))
        return terms(objective, lambda x, t, return_dict: (x + 1,), batch, step=1)[1]["diffusion"]

    low = t <= 0.17 + 5e-4
    assert 0 < low.sum() < count
    share = float(probabilities[grid[1:] <= 0.17 + 5e-4].sum())
    expected = ((t - 0.002) * 0.5 / (t**2 + 0.25).sqrt()).square()[low].sum() / count / share  # (c_out F)^2
    for size in (1, 2, 12, count):
        parts = [diffusion(rows) for rows in torch.arange(count).split(size)]
        assert sum(parts) / len(parts) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(("loss_type", "metric"), [("cauchy", cauchy), ("pseudo_huber", pseudo_huber)])
def test_the_consistency_term_is_the_weighted_metric(loss_type, metric):
    """With one interval all pairs are (80, 0.002), whose target is x at 0.002."""
    settings = {"discretization_s_0": 1, "discretization_s_1": 1, "robust_c": 0.3, "diffusion_weight": 0.0}
    objective, student, batch = slct(loss_type=loss_type, **settings), edm_student(DATA), Batch(draw(DATA, 64, 8))
    torch.manual_seed(1)
    loss = objective(Networks(student), batch, Progress(0, 1))
    torch.manual_seed(1)
    torch.multinomial(torch.ones(1, dtype=torch.float64), 64, replacement=True)
    noise = torch.randn_like(batch.x0)
    f = objective.consistency(student, batch.x0 + 80.0 * noise, torch.full((64,), 80.0), {})
    expected = metric(f, batch.x0 + 0.002 * noise, 0.3).mean() / (80 - 0.002)
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_c_falls_with_every_doubling():
    found = [terms(slct(), edm_student(DATA), Batch(torch.randn(2, 4096)), step)[1] for step in range(7)]
    assert [log["num_scales"] for log in found] == [11, 21, 41, 81, 161, 321, 641]
    expected = [0.0345, 0.01364, 0.00614, 0.00277, 0.00125, 5.62e-4, 2.53e-4]
    assert [log["robust_c"] for log in found] == pytest.approx(expected, rel=4e-3)
    assert terms(slct(robust_c=0.1), edm_student(DATA), Batch(torch.randn(2, 4)), 5)[1]["robust_c"] == pytest.approx(
        0.1
    )


def test_no_loss_on_a_point_mass():
    """But for the distance to the data at little noise: f(x, sigma) leaves 0.002 of the noise in x."""
    batch = Batch(torch.full((10_000, 4), 0.7, dtype=torch.float64))
    loss, logs = terms(slct(), edm_student(Gaussian(0.7, 0.0)), batch)
    assert logs["consistency"] < 1e-4
    assert logs["diffusion"] == pytest.approx(0.002**2, rel=0.1)
    assert loss.value.item() < 2e-4


def test_training_ends_where_ict_s_does(tmp_path):
    """The metric is symmetric about its minimum, so it does not matter there."""
    a, b = end_on_a_grid(tmp_path, slct(discretization_s_1=10, p_std=6.0, diffusion_weight=0.0), 11)
    assert a == pytest.approx(4.7048e-3, rel=0.01)
    assert b == pytest.approx(0.3 * (1 - a), rel=0.01)


# ---- the coupling


def test_noise_is_matched_with_data_whose_labels_stay():
    """Data in two far corners: after the coupling x_t lies on the line to the noise of the same side."""
    pytest.importorskip("ot")
    x0 = torch.tensor([1.0, -1.0]).repeat(32)[:, None] * torch.ones(1, 2)
    labels, calls = torch.tensor([1, 0]).repeat(32), []

    def network(shown, told, class_labels, return_dict=True):
        calls.append(
            (shown * (torch.exp(8 * told) + 0.25).sqrt()[:, None], torch.exp(4 * told)[:, None], class_labels)
        )
        return (shown,)

    drift = {}
    for coupling in ("ot", "independent"):
        torch.manual_seed(0)
        slct(coupling=coupling)(Networks(network), Batch(x0, {"class_labels": labels}), Progress(0, 1))
        x_t, sigma, seen = calls[-1]
        drift[coupling] = ((x_t - x0) / sigma * x0).mean().item()
        assert torch.equal(seen, labels)
    assert drift["ot"] == pytest.approx(
        2 / (2 * math.pi) ** 0.5 / 2**0.5, abs=0.15
    )  # E|u| / sqrt(2) along the diagonal
    assert abs(drift["independent"]) < 0.25


def test_too_small_a_batch_and_a_missing_package(monkeypatch):
    if "ot" in sys.modules or pytest.importorskip("ot"):
        with pytest.raises(ValueError, match=r"within a batch, but this one has 1; give --train_batch_size 2 or more"):
            slct(coupling="ot")(Networks(edm_student(DATA)), Batch(torch.randn(1, 4)), Progress(0, 1))
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ValueError, match="--coupling ot needs POT, which is not installed"):
        slct(coupling="ot")
    slct()


# ---- norms without a scale


def restless(network):
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return network


def test_norms_lose_their_scale():
    layers = nn.ModuleDict(
        {
            "group": nn.GroupNorm(2, 4),
            "layer": nn.LayerNorm(8),
            "free": nn.LayerNorm(8, elementwise_affine=False),
            "unbiased": nn.LayerNorm(8, bias=False),
            "linear": nn.Linear(8, 8),
        }
    )
    x = torch.randn(3, 4, 8)
    linear = restless(layers)["linear"].weight.clone()
    freeze_norm_scales(layers)
    torch.testing.assert_close(layers["group"](x), F.group_norm(x, 2))
    for name in ("layer", "free", "unbiased"):
        torch.testing.assert_close(layers[name](x), F.layer_norm(x, (8,)))
    assert torch.equal(layers["linear"].weight, linear)
    trainable = {name for name, p in layers.named_parameters() if p.requires_grad}
    assert trainable == {"group.bias", "layer.bias", "linear.weight", "linear.bias"}
    nn.init.normal_(layers["group"].bias)
    torch.testing.assert_close(layers["group"](x), F.group_norm(x, 2) + layers["group"].bias[:, None])


def test_a_unet_without_scales_loads_into_the_stock_class(tmp_path):
    network = tiny_image_unet()
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    before = sum(p.requires_grad for p in network.parameters())
    freeze_norm_scales(network)
    assert len(norms) > 8
    assert sum(p.requires_grad for p in network.parameters()) == before - len(norms)
    for p in network.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    assert not any(name.endswith(("norm1.weight", "conv_norm_out.weight")) for name in trainable_state(network))
    network.save_pretrained(tmp_path)
    stock = UNet2DModel.from_pretrained(tmp_path)
    arguments = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0]), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(stock(*arguments)[0], network(*arguments)[0])


class Normed(GridLinear):
    def __init__(self, grid):
        super().__init__(grid)
        self.norm = nn.LayerNorm(2)

    def forward(self, shown, told, return_dict=True):
        return (super().forward(self.norm(shown), told)[0],)


def test_no_optimizer_moves_a_scale(tmp_path):
    network = restless(Normed(karras(11)))
    freeze_norm_scales(network)
    trainer = toy_trainer(tmp_path, Networks(network), slct())
    trainer.fit(lambda start: (Batch(torch.randn(8, 2)) for _ in range(start, 4)))
    assert network.norm.weight.tolist() == [1, 1]
    assert network.norm.bias.abs().min() > 0
    names = {name.split("/")[-1] for name in tensors(tmp_path / "checkpoint-4")}
    assert "norm.bias" in names
    assert "norm.weight" not in names


# ---- wrong settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "l2"}, "Unknown --loss_type 'l2'; one of cauchy, pseudo_huber."),
        ({"coupling": "sinkhorn"}, "Unknown --coupling 'sinkhorn'; one of ot, class_ot, independent."),
        ({"diffusion_weight": -1.0}, "--diffusion_weight must be at least 0, but it is -1.0."),
        ({"diffusion_share": 1.5}, "--diffusion_share must be at least 0 and at most 1, but it is 1.5."),
        ({"robust_c": 0.0}, "--robust_c must be above 0, but it is 0.0."),
        ({"p_std": -1.0}, "--p_std must be above 0, but it is -1.0."),
        ({"discretization_s_1": 5}, "--discretization_s_0 10 is above --discretization_s_1 5; swap them."),
        ({"sigma_max": 0.001}, "--sigma_min 0.002 is above --sigma_max 0.001; swap them."),
    ],
)  # fmt: skip
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared
        slct(**settings)
    assert str(error.value) == message


def test_coupling_within_classes_leaves_each_class_its_own_noise():
    pytest.importorskip("ot")
    x0, noise = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([[3.0], [-3.0], [0.5], [-0.5]])
    labels = {"class_labels": torch.tensor([0, 0, 1, 1])}
    assert slct(coupling="class_ot").coupled(x0, noise, labels).tolist() == [[-3.0], [3.0], [-0.5], [0.5]]
    assert slct(coupling="ot").coupled(x0, noise, labels).tolist() == [[-3.0], [-0.5], [0.5], [3.0]]
    assert slct(coupling="independent").coupled(x0, noise, labels) is noise
    with pytest.raises(ValueError, match="--coupling class_ot needs classes: give --label_column"):
        slct(coupling="class_ot").coupled(x0, noise, {})
