"""Grids, curricula and constants of consistency training, and what all its objectives share."""

import math
from pathlib import Path

import pytest
import torch
from diffusion.test_views import tiny_image_unet
from oracles import GridLinear
from torch import nn
from toys import assert_same, forget_accelerate, tensors, toy_trainer

from cm_diffusers.diffusion.distances import cauchy_c, huber_c
from cm_diffusers.diffusion.times import (
    doubling_intervals,
    easy_ratio,
    karras_grid,
    lognormal_probabilities,
    sample_lognormal,
    sample_neighbours,
    square_root_decay,
    square_root_intervals,
)
from cm_diffusers.diffusion.views import EDMView
from cm_diffusers.objectives.cd import CDConfig, CDObjective
from cm_diffusers.objectives.ct import CTConfig, CTObjective
from cm_diffusers.objectives.ect import ECTConfig, ECTObjective
from cm_diffusers.objectives.ict import ICTConfig, ICTObjective
from cm_diffusers.objectives.slct import SLCTConfig, SLCTObjective
from cm_diffusers.types import Batch, Networks, Progress


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


def karras(points):
    return karras_grid(points, 0.002, 80.0, 7.0)


# ---- grids and draws


@pytest.mark.parametrize(
    ("points", "from_above", "sigma"),
    [(40, 22, 1.382), (201, 106, 1.913), (40, 17, 4.366), (40, 18, 3.520), (151, 67, 3.991), (151, 62, 5.249), (641, 460, 0.253)],
)  # fmt: skip
def test_the_published_choices_of_two_steps(points, from_above, sigma):
    """They count from sigma_max; these grids ascend."""
    grid = karras(points)
    assert float(grid[points - 1 - from_above]) == pytest.approx(sigma, abs=5e-4)
    assert (grid.diff() > 0).all()


@pytest.mark.parametrize(
    ("recipe", "sigma"),
    [("cd_imagenet64", "1.382"), ("ct_imagenet64", "1.913"), ("ict_imagenet64", "1.526"), ("ect_imagenet64", "1.526"),
     ("ict_latents256", "0.253"), ("slct_latents256", "0.253")],
)  # fmt: skip
def test_recipes_recommend_what_their_papers_chose(recipe, sigma):
    text = (Path(__file__).parents[2] / "training" / "recipes" / f"{recipe}.args").read_text("utf-8")
    assert f"--recommended_sigmas 80 {sigma}\n" in text


@pytest.mark.parametrize("rho", [7.0, 3.0, 1.0])
def test_the_ends_of_a_grid_are_exact(rho):
    grid = karras_grid(11, 0.002, 80.0, rho)
    assert (grid[0].item(), grid[-1].item(), grid.dtype) == (0.002, 80.0, torch.float64)
    torch.testing.assert_close(
        (grid ** (1 / rho)).diff().std(), torch.zeros((), dtype=torch.float64), atol=1e-9, rtol=0
    )


def test_neighbours_are_drawn_as_asked():
    grid, wanted = karras(5), torch.tensor([0.1, 0.0, 0.6, 0.3])
    for probabilities, expected in ((wanted, wanted), (None, torch.full((4,), 0.25))):
        t, s = sample_neighbours(40_000, grid, probabilities)
        index = torch.searchsorted(grid, s)
        assert torch.equal(grid[index], s)
        assert torch.equal(grid[index + 1], t)
        shares = torch.bincount(index, minlength=4) / 40_000
        assert (shares - expected).abs().max() < 0.01
        assert t.dtype == s.dtype == torch.float64


def test_a_lognormal_between_two_sigmas():
    """Its quantiles are those of the normal within the ends, whose mass is 0.99166."""
    ends = torch.special.ndtr((torch.tensor([0.002, 80.0], dtype=torch.float64).log() + 1.1) / 2.0)
    assert float(ends[1] - ends[0]) == pytest.approx(0.99166, abs=5e-6)
    t = sample_lognormal(100_000, -1.1, 2.0, 0.002, 80.0)
    assert (t.dtype, 0.002 <= t.min(), t.max() <= 80.0) == (torch.float64, True, True)
    shares = (torch.special.ndtr((t.log() + 1.1) / 2.0) - ends[0]) / (ends[1] - ends[0])
    for quantile in (0.1, 0.5, 0.9):
        assert float((shares < quantile).double().mean()) == pytest.approx(quantile, abs=0.006)
    narrow = sample_lognormal(1000, -1.1, 2.0, 0.0292, 14.614)
    assert 0.0292 <= narrow.min() < 0.05 < 5 < narrow.max() <= 14.614
    middle = sample_lognormal(20_000, 0.0, 1.0, 0.5, 2.0)  # half of the mass: what is outside is drawn anew
    assert ((middle > 0.5) & (middle < 2.0)).all()
    low = torch.special.ndtr(torch.tensor(0.5, dtype=torch.float64).log())
    shares = (torch.special.ndtr(middle.log()) - low) / (1 - 2 * low)
    for quantile in (0.1, 0.5, 0.9):
        assert float((shares < quantile).double().mean()) == pytest.approx(quantile, abs=0.012)


# ---- curricula


@pytest.mark.parametrize(("step", "points", "decay"), [(0, 2, 0.81), (80_000, 48, 0.9955), (400_000, 107, 0.9980), (800_000, 151, 0.9986)])  # fmt: skip
def test_the_curriculum_of_ct_on_cifar10(step, points, decay):
    progress = Progress(step, 800_000)
    assert square_root_intervals(progress, 2, 150) + 1 == points
    assert square_root_decay(progress, 2, 150, 0.9) == pytest.approx(decay, abs=5e-5)


@pytest.mark.parametrize(("step", "points", "decay"), [(0, 2, 0.9025), (800_000, 201, 0.99949)])
def test_the_curriculum_of_ct_on_imagenet64(step, points, decay):
    progress = Progress(step, 800_000)
    assert square_root_intervals(progress, 2, 200) + 1 == points
    assert square_root_decay(progress, 2, 200, 0.95) == pytest.approx(decay, abs=5e-6)


def test_the_doublings_of_ict():
    """400,000 steps make eight stages of 50,000."""
    points = [11, 21, 41, 81, 161, 321, 641, 1281]
    for stage, expected in enumerate(points):
        for step in (50_000 * stage, 50_000 * stage + 49_999):
            assert doubling_intervals(Progress(step, 400_000), 10, 1280) + 1 == expected
    assert [doubling_intervals(Progress(k, 7), 10, 640) for k in range(7)] == [10, 20, 40, 80, 160, 320, 640]
    assert [doubling_intervals(Progress(k, 3), 10, 1280) for k in range(3)] == [10, 20, 40]  # shorter than its stages
    assert doubling_intervals(Progress(9, 10), 10, 10) == 10


def test_doublings_that_do_not_come_out_even():
    """K' = floor(K / (log2 floor(s1 / s0) + 1)) and N(k) = min(s0 2^floor(k / K'), s1) + 1 (2310.14189, Sec. 3.4)."""
    for first, last, steps, starts in (
        (3, 20, 100, {0: 3, 27: 6, 54: 12, 81: 20}),  # 100 / 3.58, of floor(20 / 3) = 6
        (10, 100, 1000, {0: 10, 231: 20, 462: 40, 693: 80, 924: 100}),  # 1000 / 4.32
    ):
        expected = [max(n for start, n in starts.items() if start <= k) for k in range(steps)]
        assert [doubling_intervals(Progress(k, steps), first, last) for k in range(steps)] == expected


@pytest.mark.parametrize(("points", "mean_weight"), [(11, 8.42), (21, 17.45), (161, 141.1), (1281, 1129.1)])
def test_the_times_of_ict(points, mean_weight):
    """E_p[1 / (sigma difference)], computed apart from this package; it doubles with the grid."""
    grid = karras(points)
    p = lognormal_probabilities(grid, -1.1, 2.0)
    assert p.shape == (points - 1,)
    assert float(p.sum()) == pytest.approx(1, abs=1e-14)
    assert float((p / grid.diff()).sum()) == pytest.approx(mean_weight, rel=4e-4)


def test_the_most_frequent_interval_and_the_greatest_weight():
    grid = karras(1281)
    mode = int(lognormal_probabilities(grid, -1.1, 2.0).argmax())
    assert grid[mode : mode + 2].tolist() == pytest.approx([0.18609, 0.18798], abs=5e-6)
    assert float((1 / grid.diff()).max()) == pytest.approx(25_585, abs=0.5)


TABLE = {  # r / t of easy consistency tuning at q = 2, k = 8, b = 1
    0: [0, 0, 0, 0, 0, 0.023, 0.473, 0.5],
    1: [0, 0, 0, 0.139, 0.212, 0.512, 0.737, 0.75],
    2: [0.3755, 0.4, 0.4975, 0.569, 0.606, 0.756, 0.868, 0.875],
    7: [0.9805, 0.9812, 0.9843, 0.9865, 0.9877, 0.9924, 0.9959, 0.9961],
}
AT = torch.tensor([0.002, 0.1, 0.5, 0.821, 1.0, 2.0, 5.0, 20.0])


@pytest.mark.parametrize("stage", TABLE)
def test_the_ratios_of_ect(stage):
    found = easy_ratio(AT, stage, 2.0, 8.0, 1.0)
    assert found.tolist() == pytest.approx(TABLE[stage], abs=5.5e-4)
    assert found.dtype == torch.float64


def test_stages_and_q_are_interchangeable():
    torch.testing.assert_close(easy_ratio(AT, 0, 256.0, 8.0, 1.0), easy_ratio(AT, 7, 2.0, 8.0, 1.0))
    for stage in range(4):
        torch.testing.assert_close(easy_ratio(AT, stage, 4.0, 8.0, 1.0), easy_ratio(AT, 2 * stage + 1, 2.0, 8.0, 1.0))


def test_a_constant_ratio_and_its_limits():
    assert easy_ratio(AT, 1, 4.0, 0.0, 1.0).tolist() == [1 - 1 / 16] * 8
    assert easy_ratio(AT, 5, 1.0, 0.0, 1.0).tolist() == [0] * 8  # diffusion, at every stage
    assert easy_ratio(AT, 5000, 2.0, 8.0, 1.0).tolist() == [0.999] * 8


# ---- constants


@pytest.mark.parametrize(("elements", "c"), [(3 * 32**2, 0.02993), (3 * 64**2, 0.05986), (4 * 32**2, 0.03456)])
def test_c_of_pseudo_huber(elements, c):
    assert huber_c(elements) == pytest.approx(c, abs=5e-6)


@pytest.mark.parametrize(
    ("intervals", "c"),
    [(10, 0.0345), (20, 0.01364), (40, 0.00614), (80, 0.00277), (160, 0.00125), (320, 5.62e-4), (640, 2.53e-4)],
)
def test_c_of_cauchy_falls_with_the_grid(intervals, c):
    assert cauchy_c(4096, intervals) == pytest.approx(c, rel=4e-3)
    assert cauchy_c(1024, intervals) == pytest.approx(cauchy_c(4096, intervals) / 2)  # half the norm, half of c


# ---- what all objectives share

VIEW = EDMView(0.5, "adm")
SHORT = {"discretization_s_0": 2, "discretization_s_1": 8}
OBJECTIVES = {
    "cd": lambda: CDObjective(CDConfig(), VIEW),
    "cd-guided-l1": lambda: CDObjective(CDConfig(w=2.0, loss_type="l1"), VIEW),
    "ct": lambda: CTObjective(CTConfig(**SHORT), VIEW),
    "ict": lambda: ICTObjective(ICTConfig(**SHORT), VIEW),
    "slct": lambda: SLCTObjective(SLCTConfig(**SHORT, coupling="independent"), VIEW),
    "ect": lambda: ECTObjective(ECTConfig(q=4.0, stage_steps=2), VIEW),
    "ect-snrpk": lambda: ECTObjective(ECTConfig(weighting="snrpk", huber_c=0.06, mapping="const"), VIEW),
}
each = pytest.mark.parametrize("name", OBJECTIVES)


def small_unet(**config):
    network = tiny_image_unet(**config).train()
    nn.init.normal_(network.conv_out.weight, std=0.1)
    return network


def networks(objective, **config):
    teacher = small_unet().requires_grad_(False) if isinstance(objective, CDObjective) else None
    return Networks(small_unet(**config), teacher=teacher)


def images(size=4):
    labels = torch.arange(size) % 3
    return Batch(
        0.5 * torch.randn(size, 3, 8, 8), {"class_labels": labels}, {"class_labels": torch.full_like(labels, 3)}
    )


@each
def test_losses_are_finite_and_teach_the_student_alone(name):
    objective = OBJECTIVES[name]()
    nets = networks(objective)
    loss = objective(nets, images(), Progress(3, 10))
    assert (loss.value.shape, loss.value.dtype) == ((), torch.float32)
    assert 0 < loss.value.item() < float("inf")
    assert all(log.shape == () and log.isfinite() and not log.requires_grad for log in loss.logs.values())
    loss.value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in nets.student.parameters())
    assert any(p.grad.any() for p in nets.student.parameters())
    assert nets.teacher is None or all(p.grad is None for p in nets.teacher.parameters())
    assert objective.players == {"student": objective}


class Seen(nn.Module):
    """Keeps what it is called with, a random number drawn in each call, and whether its answer can be trained."""

    def __init__(self):
        super().__init__()
        self.gain, self.calls = nn.Parameter(torch.ones(())), []

    def forward(self, x, t, **cond):
        self.calls.append({"x": x, "t": t, "draw": torch.rand(1), "grad": torch.is_grad_enabled()} | cond)
        return (self.gain * x,)


@each
@pytest.mark.parametrize("with_target", [False, True])
def test_a_pair_shares_noise_label_and_dropout(name, with_target):
    """x_t - x_s is (t - s) times one noise: the same for both if x0 + s noise is what the target saw."""
    objective, batch = OBJECTIVES[name](), images(8)
    nets = Networks(Seen(), Seen() if with_target else None, teacher=small_unet().requires_grad_(False))
    objective(nets, batch, Progress(3, 10))
    (offline,) = nets.target.calls if with_target else nets.student.calls[:1]
    online = nets.student.calls[-1]
    assert torch.equal(online["draw"], offline["draw"])
    assert (online["grad"], offline["grad"]) == (True, False)
    for call in (online, offline):
        assert torch.equal(call["class_labels"], batch.cond["class_labels"])
    if name.startswith("cd"):
        return
    sigmas = [torch.exp(call["t"] / 250)[:, None, None, None] for call in (online, offline)]
    x = [call["x"] * (sigma**2 + 0.25).sqrt() for call, sigma in zip((online, offline), sigmas, strict=True)]
    noises = [(x_sigma - batch.x0) / sigma for x_sigma, sigma in zip(x, sigmas, strict=True)]
    torch.testing.assert_close(*noises, rtol=1e-2, atol=1e-2)


@each
def test_dropout_masks_are_shared_also_when_activations_are_recomputed(name):
    objective, values, gradients = OBJECTIVES[name](), [], []
    nets = networks(objective, dropout=0.5)
    for recompute in (False, True):
        masks = []
        if recompute:
            nets.student.enable_gradient_checkpointing()
        keep = [
            m.register_forward_hook(lambda m, i, o, masks=masks: masks.append((o == 0) & (i[0] != 0)))
            for m in nets.student.modules()
            if isinstance(m, nn.Dropout) and m.p == 0.5
        ]
        torch.manual_seed(7)
        value = objective(nets, images(), Progress(3, 10)).value
        passes = masks[: len(masks) // 2], masks[len(masks) // 2 :]
        for hook in keep:
            hook.remove()
        assert len(masks) >= 8
        assert all(0.3 < mask.float().mean() < 0.7 for mask in masks)
        for offline, online in zip(*passes, strict=True):
            assert torch.equal(offline, online)
        nets.student.zero_grad()
        value.backward()
        values.append(value.item())
        gradients.append(torch.cat([p.grad.flatten() for p in nets.student.parameters()]))
    assert values[0] == values[1]
    torch.testing.assert_close(*gradients)


@each
def test_a_step_s_loss_depends_on_progress_and_not_on_what_came_before(name):
    """So the curriculum is the same on every rank, and after a resume."""
    worn, fresh, nets = OBJECTIVES[name](), OBJECTIVES[name](), networks(OBJECTIVES[name]())

    def value(objective, step):
        torch.manual_seed(step)
        return objective(nets, images(), Progress(step, 10)).value.item()

    first = [value(worn, step) for step in range(0, 10, 3)]
    assert [value(fresh, step) for step in (9, 6, 3, 0)] == first[::-1]


@pytest.mark.parametrize("name", ["ict", "ect"])
def test_a_stage_survives_a_resume(name, tmp_path):
    """From the middle of a stage, over the next two; bit for bit."""
    view, grid = EDMView(0.5, "edm"), karras(9)

    def train(folder, **config):
        objective = {
            "ict": lambda: ICTObjective(ICTConfig(**SHORT), view),
            "ect": lambda: ECTObjective(ECTConfig(stage_steps=2, q=4.0), view),
        }[name]()
        stages = []
        trainer = toy_trainer(
            folder,
            Networks(GridLinear(grid)),
            objective,
            callbacks=[lambda t, loss: stages.append(float(loss.logs.get("num_scales", loss.logs.get("stage"))))],
            max_train_steps=6,
            checkpointing_steps=3,
            **config,
        )
        trainer.fit(lambda start: (Batch(torch.full((8, 2), 0.1 * k)) for k in range(start, 6)))
        return stages

    whole = train(tmp_path / "whole")
    assert whole == {"ict": [3, 3, 5, 5, 9, 9], "ect": [0, 0, 1, 1, 2, 2]}[name]
    resumed = train(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed == whole[3:]
    assert_same(tensors(tmp_path / "resumed" / "checkpoint-6"), tensors(tmp_path / "whole" / "checkpoint-6"))


def test_c_is_that_of_the_sample_s_size():
    """4 x 32 x 32 latents on 20 intervals."""
    objective = SLCTObjective(SLCTConfig(discretization_s_0=20, coupling="independent"), VIEW)
    loss = objective(Networks(Seen()), Batch(torch.randn(2, 4, 32, 32)), Progress(0, 10))
    assert loss.logs["robust_c"].item() == pytest.approx(math.exp(-1.15 * math.log(20) - 0.85))
