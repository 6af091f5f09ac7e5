"""Improved consistency training: its metric, its times and weights, and where it ends."""

from itertools import pairwise

import pytest
import torch
from oracles import Gaussian, edm_student
from toys import forget_accelerate

from cm_diffusers.diffusion.distances import huber, pseudo_huber
from cm_diffusers.diffusion.times import lognormal_probabilities
from cm_diffusers.diffusion.views import EDMView
from cm_diffusers.objectives.ict import ICTConfig, ICTObjective
from cm_diffusers.types import Batch, Networks, Progress
from objectives.test_cd import DATA, draw, end_on_a_grid, exact_gain, karras


VIEW = EDMView(0.5, "edm")
EULER = {  # a(80) of std 0.5 on grids of N points, in 1e-3; 6.249928 exactly
    2: 0.06406, 11: 4.7048, 18: 5.2880, 21: 5.4222, 40: 5.8107, 41: 5.8213, 81: 6.0318, 151: 6.1326, 161: 6.1399,
    321: 6.1947, 641: 6.2222, 1281: 6.2361,
}  # fmt: skip


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


def ict(**settings):
    return ICTObjective(ICTConfig(**settings), VIEW)


# ---- the metric


@pytest.mark.parametrize("elements", [1, 2, 3072])
def test_pseudo_huber_acts_on_the_norm_of_the_sample(elements):
    """At a norm of 3 c / 4 it is c / 4: a right triangle. The mean over elements is another number."""
    x = torch.randn(5, elements, dtype=torch.float64)
    x = 0.75 * 0.03 * x / x.norm(dim=1, keepdim=True)
    assert pseudo_huber(x, torch.zeros_like(x), 0.03).tolist() == pytest.approx([0.0075] * 5, rel=1e-12)
    if elements > 1:
        assert float(huber(x, torch.zeros_like(x), 0.03).max()) < 0.005


@pytest.mark.parametrize(("residual", "pull"), [(1e-4, 0.182), (1e-3, 0.88), (1e-2, 0.9986), (1e-1, 1.000)])
def test_its_pull_on_a_sample(residual, pull):
    """The gradient's norm where every pixel of 3 x 32 x 32 is off by `residual`, and c = 0.02993."""
    x = torch.full((1, 3, 32, 32), residual, dtype=torch.float64, requires_grad=True)
    pseudo_huber(x, torch.zeros_like(x), 0.02993).sum().backward()
    assert float(x.grad.norm()) == pytest.approx(pull, abs=6e-4)


def test_pseudo_huber_without_c_is_the_norm():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    distance = pseudo_huber(x, torch.zeros_like(x), 0.0)
    distance.sum().backward()
    assert distance.tolist() == [5, 0]
    assert x.grad.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]


def test_pseudo_huber_keeps_its_digits():
    """n^2 / 2c where n is far below c; sqrt(n^2 + c^2) - c would be 0 in float32."""
    x = torch.full((1, 1), 1e-5)
    assert pseudo_huber(x, torch.zeros_like(x), 0.03).item() == pytest.approx(1e-10 / 0.06, rel=1e-4)
    assert pseudo_huber(x, x, 0.03).item() == 0


# ---- the loss


@pytest.mark.parametrize("huber_c", [0.0, 100.0])
def test_the_weighted_loss_has_the_predicted_value(huber_c):
    """Mean over p(i) of d / (t - s). With c = 100 the metric is n^2 / 2c; with c = 0, in many dimensions, n is known."""
    grid, dims, batch = karras(11), 1024 if huber_c == 0 else 64, 20_000 if huber_c else 1000
    squared = []
    for s, t in pairwise(grid.tolist()):
        a = exact_gain(s, 0.002)
        bias = exact_gain(t, 0.002) - a * (1 - (t - s) * t / (0.25 + t**2))
        squared.append(dims * (a**2 * (t - s) ** 2 * 0.25 / (0.25 + t**2) + (0.25 + t**2) * bias**2))
    squared = torch.tensor(squared, dtype=torch.float64)
    distances = squared.sqrt() if huber_c == 0 else squared / 200
    expected = (lognormal_probabilities(grid, -1.1, 2.0) * distances / grid.diff()).sum()
    objective = ict(huber_c=huber_c)
    loss = objective(Networks(edm_student(DATA)), Batch(draw(DATA, batch, dims)), Progress(0, 10))
    assert loss.value.item() == pytest.approx(expected.item(), rel=0.03)
    assert loss.logs["num_scales"] == 11


def test_times_are_drawn_from_the_lognormal():
    objective, student = ict(), edm_student(DATA)
    seen = []
    student.register_forward_pre_hook(lambda module, inputs: seen.append(torch.exp(4 * inputs[1].double())))
    objective(Networks(student), Batch(draw(DATA, 50_000, 1)), Progress(0, 10))
    s, t = (torch.searchsorted(karras(11) * 0.999, sigma) - 1 for sigma in seen)
    assert torch.equal(t, s + 1)
    shares = torch.bincount(s, minlength=10) / 50_000
    assert (shares - lognormal_probabilities(karras(11), -1.1, 2.0)).abs().max() < 0.01


def test_c_follows_the_size_of_the_sample():
    """0.02993 for images of 32 pixels: the loss is that of this c, given by hand."""
    batch, values = Batch(torch.randn(4, 3, 32, 32, dtype=torch.float64)), []
    for huber_c in (None, 0.00054 * 3072**0.5, 0.06):
        torch.manual_seed(0)
        nets = Networks(edm_student(DATA))
        values.append(ict(huber_c=huber_c)(nets, batch, Progress(0, 10)).value.item())
    assert values[0] == values[1] > values[2]


def test_no_loss_on_a_point_mass():
    batch = Batch(torch.full((500, 4), 0.7, dtype=torch.float64))
    for solution, bounds in ((Gaussian(0.7, 0.0), (0, 1e-6)), (Gaussian(0.7, 0.5), (1e-2, 10))):
        value = ict()(Networks(edm_student(solution)), batch, Progress(0, 10)).value.item()
        assert bounds[0] <= value < bounds[1]


# ---- where it ends


@pytest.mark.parametrize("points", EULER)
def test_where_training_ends(points):
    """Per interval the regression of x_s on x_t, whose product is that of Euler steps."""
    a = 1.0
    for s, t in pairwise(karras(points).tolist()):
        a *= 1 - (t - s) * t / (0.25 + t**2)
    assert a * 1e3 == pytest.approx(EULER[points], rel=2e-5, abs=6e-6)


def test_the_end_comes_nearer_as_the_grid_doubles():
    """To sqrt(v + sigma_min^2) / sqrt(v + 80^2), with 1 / N."""
    errors = [6.249928 - EULER[points] for points in (161, 321, 641, 1281)]
    assert exact_gain(80.0, 0.002) * 1e3 == pytest.approx(6.249928, abs=5e-7)
    assert all(1.95 < coarse / fine < 2.05 for coarse, fine in pairwise(errors))


def test_training_ends_there(tmp_path):
    """Whatever the metric, the weights and the times: N = 11 throughout."""
    a, b = end_on_a_grid(tmp_path, ict(discretization_s_1=10, p_std=6.0), 11)
    assert a == pytest.approx(4.7048e-3, rel=0.01)
    assert b == pytest.approx(0.3 * (1 - a), rel=0.01)


# ---- wrong settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"discretization_s_0": 0}, "--discretization_s_0 must be at least 1, but it is 0."),
        ({"discretization_s_1": 5}, "--discretization_s_0 10 is above --discretization_s_1 5; swap them."),
        ({"p_std": 0.0}, "--p_std must be above 0, but it is 0.0."),
        ({"rho": 0.0}, "--rho must be above 0, but it is 0.0."),
        ({"huber_c": -0.1}, "--huber_c must be at least 0, but it is -0.1."),
        ({"sigma_min": 0.0}, "--sigma_min must be above 0, but it is 0.0."),
    ],
)  # fmt: skip
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared
        ict(**settings)
    assert str(error.value) == message
