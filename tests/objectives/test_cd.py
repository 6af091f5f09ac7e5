"""Consistency models of the first paper, distilled (CD) and trained (CT), against data whose flow is known exactly."""

import sys
from itertools import count, pairwise
from types import SimpleNamespace

import pytest
import torch
from oracles import Gaussian, GridLinear, OracleNet, cm_scalings, edm_student, edm_teacher, guided
from tiny import tiny_scheduler
from toys import forget_accelerate, toy_trainer

from cm_diffusers.diffusion.distances import l1, load_lpips, perceptual
from cm_diffusers.diffusion.process import EDM, DiscreteVP, Prediction
from cm_diffusers.diffusion.solvers import heun_step
from cm_diffusers.diffusion.times import karras_grid
from cm_diffusers.diffusion.views import EDMView, VPView, edm_denoiser
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.objectives.cd import CDConfig, CDObjective
from cm_diffusers.objectives.ct import CTConfig, CTObjective
from cm_diffusers.types import Batch, Networks, Progress


VIEW, DATA, PROGRESS = EDMView(0.5, "edm"), Gaussian(0.3, 0.5), Progress(0, 10)
VP = DiscreteVP.from_scheduler(tiny_scheduler())
HEUN = {  # a(80) of std 0.5 on grids of N points, in 1e-3; 6.249928 exactly
    2: 500.0, 11: 7.3413, 18: 6.5954, 21: 6.4949, 40: 6.3111, 41: 6.3080, 81: 6.2641, 151: 6.2539, 161: 6.2534,
    321: 6.2508, 641: 6.2501, 1281: 6.24998,
}  # fmt: skip


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


def cd(view=VIEW, lpips=None, **settings):
    return CDObjective(CDConfig(**settings), view, lpips)


def ct(lpips=None, **settings):
    return CTObjective(CTConfig(**settings), VIEW, lpips)


def draw(data, *shape):
    return data.mean + data.std * torch.randn(shape, dtype=torch.float64)


def karras(points):
    return karras_grid(points, 0.002, 80.0, 7.0)


def exact_gain(t, s, variance=0.25):
    return ((variance + s**2) / (variance + t**2)) ** 0.5


# ---- distillation


@pytest.mark.parametrize("points", HEUN)
def test_where_distillation_ends(points):
    """Heun steps from 80 down to 0.002: the grid, its direction and the solver's order in one number."""
    x = torch.tensor([[2.3]], dtype=torch.float64)
    for t, s in pairwise(karras(points).flip(0)[:, None]):
        x = heun_step(lambda x, t: DATA.predict(EDM(), x, t), EDM(), x, t, s)
    assert float(x - 0.3) / 2.0 * 1e3 == pytest.approx(HEUN[points], rel=3e-5)


def test_the_teacher_steps_as_the_ode_solver_does():
    t, s = karras(18)[1:], karras(18)[:-1]
    x = draw(Gaussian(0.3, 80.0), 17, 4)
    steps = [
        heun_step(denoise, EDM(), x, t, s)
        for denoise in (
            cd().teacher(Networks(None, teacher=edm_teacher(DATA)), Batch(x)),
            lambda x, t: DATA.predict(EDM(), x, t),
        )
    ]
    torch.testing.assert_close(*steps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_variance_preserving_teacher_steps_the_same_way(prediction_type):
    grid = karras_grid(18, 0.0292, 14.6, 7.0)
    x = draw(Gaussian(0.3, 14.6), 17, 4)
    view = VPView(VP, prediction_type, 0.5)
    denoise = edm_denoiser(view, OracleNet(VP, prediction_type, DATA))
    found = heun_step(lambda x, t: denoise(x, t, {}), EDM(), x, grid[1:], grid[:-1])
    expected = heun_step(lambda x, t: DATA.predict(EDM(), x, t), EDM(), x, grid[1:], grid[:-1])
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("noise_conditioning", ["edm", "adm"])
def test_loss_on_the_oracle_has_the_predicted_value(noise_conditioning):
    """Mean over the grid of what Heun's gain is off, times the gain from there down, of x_t's variance."""
    grid, expected = karras(18).tolist(), 0.0
    for s, t in pairwise(grid):
        one, h = t / (0.25 + t**2), s - t
        two = s * (1 + h * one) / (0.25 + s**2)
        off = 1 + h / 2 * (one + two) - exact_gain(t, s)
        expected += (off * exact_gain(s, 0.002)) ** 2 * (0.25 + t**2) / 17
    kind = {"noise_conditioning": noise_conditioning}
    nets = Networks(edm_student(DATA, **kind), teacher=edm_teacher(DATA, **kind))
    loss = cd(EDMView(0.5, noise_conditioning))(nets, Batch(draw(DATA, 40_000, 16)), PROGRESS)
    assert loss.value.item() == pytest.approx(expected, rel=0.05)


def test_no_loss_on_a_point_mass():
    """All lines are straight, so one Heun step is exact; another student is not."""
    point, batch = Gaussian(0.7, 0.0), Batch(torch.full((500, 4), 0.7, dtype=torch.float64))
    for solution, bounds in ((point, (0, 1e-9)), (Gaussian(0.7, 0.5), (1e-4, 1))):
        nets = Networks(edm_student(solution), teacher=edm_teacher(point))
        assert bounds[0] <= cd()(nets, batch, PROGRESS).value.item() < bounds[1]


@pytest.mark.parametrize("w", [-1.0, 3.0])
def test_the_solution_is_that_of_the_guided_teacher(w):
    cond, uncond = Gaussian(0.5, 0.5), Gaussian(-0.5, 0.5)
    labels = torch.ones(2000)
    batch = Batch(draw(cond, 2000, 16), {"class_labels": labels}, {"class_labels": torch.zeros_like(labels)})
    teacher, losses = edm_teacher(cond, uncond), []
    for solution in (guided(cond, uncond, w), guided(cond, uncond, w + 1)):
        student = edm_student(solution)
        losses.append(cd(w=w, num_scales=81)(Networks(student, teacher=teacher), batch, PROGRESS).value.item())
    assert losses[0] < losses[1] / 100
    assert teacher.calls == [4000] * 4  # both branches in one call, twice a step


def test_without_guidance_one_branch_is_enough():
    nets = Networks(edm_student(DATA), teacher=edm_teacher(DATA))
    cd()(nets, Batch(torch.randn(10, 4), {"class_labels": torch.ones(10)}), PROGRESS)
    assert nets.teacher.calls == [10, 10]
    with pytest.raises(
        ValueError, match=r"--w 2\.0 guides the teacher, but the data has no unconditional branch; give --w 0\."
    ):
        cd(w=2.0)(nets, Batch(torch.randn(10, 4)), PROGRESS)


def end_of_training(folder, objective, sigmas, scalings, steps=800):
    """Gains and biases of f = a x + b at the sigmas, trained by the package's loop from EDM's first guess."""
    nets = Networks(GridLinear(sigmas), teacher=edm_teacher(DATA).requires_grad_(False))
    torch.nn.init.ones_(nets.student.gain)
    optim = OptimConfig(learning_rate=0.01, adam_beta2=0.99, lr_scheduler="cosine", max_grad_norm=1e9)
    trainer = toy_trainer(folder, nets, objective, optim, max_train_steps=steps)
    generator = torch.Generator().manual_seed(0)
    batches = (Batch(0.3 + 0.5 * torch.randn(512, 32, generator=generator)) for _ in count())
    for _ in range(steps):
        trainer.training_step(batches)
    c_skip, c_out = scalings(sigmas)
    gain, bias = nets.student.gain.detach(), nets.student.bias.detach()
    return c_skip + c_out * gain / (sigmas**2 + 0.25).sqrt(), c_out * bias


def end_on_a_grid(folder, objective, points):
    """a(80) and b(80) of a consistency model."""
    a, b = end_of_training(folder, objective, karras(points), lambda sigma: cm_scalings(sigma, 0.002, 0.5))
    return a[-1].item(), b[-1].item()


def test_distillation_converges_to_the_product_of_heun_steps(tmp_path):
    a, b = end_on_a_grid(tmp_path, cd(num_scales=18), 18)
    assert a == pytest.approx(6.5954e-3, rel=0.01)
    assert b == pytest.approx(0.3 * (1 - a), rel=0.01)


# ---- training


def test_training_converges_to_the_product_of_euler_steps(tmp_path):
    """As many intervals throughout: 10, but for the first step."""
    objective = ct(discretization_s_0=10, discretization_s_1=10)
    a, b = end_on_a_grid(tmp_path, objective, 11)
    assert a == pytest.approx(4.7048e-3, rel=0.01)
    assert b == pytest.approx(0.3 * (1 - a), rel=0.01)


def test_a_pair_is_an_ode_step_towards_its_own_data():
    """With x0 as the denoiser's answer the path is a straight line: Euler and Heun both end at x0 + s noise."""
    t, s = karras(18)[1:], karras(18)[:-1]
    x0, noise = torch.randn(2, 17, 4, dtype=torch.float64)
    found = heun_step(lambda x, t: Prediction(x0, (x - x0) / t[:, None]), EDM(), x0 + t[:, None] * noise, t, s)
    torch.testing.assert_close(found, x0 + s[:, None] * noise)


def test_the_irreducible_loss_of_one_pair():
    """12.4 of the closed forms, at t = 3 and s = 2: a mean over elements, and one noise for both."""
    objective = ct()
    objective.grid = lambda progress: torch.tensor([2.0, 3.0], dtype=torch.float64)
    nets = Networks(edm_student(DATA))
    loss = objective(nets, Batch(draw(DATA, 100_000, 16)), PROGRESS)
    assert loss.value.item() == pytest.approx(1.5924e-3, rel=0.01)


@pytest.mark.parametrize("points", [11, 41])
def test_the_irreducible_loss_of_a_grid(points):
    """a(s)^2 (t - s)^2 v / (v + t^2) + (v + t^2) bias^2, where the exact gain is not the grid's best one."""
    expected = 0.0
    for s, t in pairwise(karras(points).tolist()):
        a = exact_gain(s, 0.002)
        bias = exact_gain(t, 0.002) - a * (1 - (t - s) * t / (0.25 + t**2))
        expected += (a**2 * (t - s) ** 2 * 0.25 / (0.25 + t**2) + (0.25 + t**2) * bias**2) / (points - 1)
    objective = ct()
    objective.grid = lambda progress: karras(points)
    loss = objective(Networks(edm_student(DATA)), Batch(draw(DATA, 40_000, 16)), PROGRESS)
    assert loss.value.item() == pytest.approx(expected, rel=0.03)


def test_at_first_training_denoises_in_one_jump():
    """Two points: the target is x at sigma_min, whatever the network says."""
    student, batch = edm_student(Gaussian(0.0, 2.0)), Batch(draw(DATA, 64, 8))
    torch.manual_seed(1)
    loss = ct()(Networks(student), batch, Progress(0, 800_000))
    torch.manual_seed(1)
    torch.randint(1, (64,))  # the interval
    noise = torch.randn_like(batch.x0)
    f = ct().consistency(student, batch.x0 + 80.0 * noise, torch.full((64,), 80.0), {})
    expected = (f - (batch.x0 + 0.002 * noise)).square().mean()
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.logs["num_scales"] == 2


def test_the_grid_and_the_target_s_rate_follow_progress():
    objective = ct()
    assert [len(objective.grid(Progress(k, 800_000))) for k in (0, 80_000, 400_000)] == [2, 48, 107]
    decays = [objective.target_decay(Progress(k, 800_000)) for k in (0, 80_000, 400_000)]
    assert decays == pytest.approx([0.81, 0.9955, 0.9980], abs=5e-5)


def test_the_target_network_answers_for_the_target():
    """On a point mass the perfect target leaves a loss that only the student makes."""
    batch = Batch(torch.full((500, 4), 0.7, dtype=torch.float64))
    for objective in (ct(), cd()):
        perfect, other, teacher = (f(Gaussian(0.7, 0.0)) for f in (edm_student, edm_student, edm_teacher))
        other.gain.data.fill_(1.5)
        for student, target, zero in ((perfect, other, False), (perfect, None, True), (perfect, perfect, True)):
            loss = objective(Networks(student, target, teacher), batch, Progress(400_000, 800_000)).value.item()
            assert (loss < 1e-9) == zero


# ---- distances


def test_l1_is_the_mean_over_elements():
    x, y = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(l1(x, y), torch.stack([(a - b).abs().mean() for a, b in zip(x, y, strict=True)]))
    assert float(l1(torch.full((1, 7), -3.0), torch.ones(1, 7))) == 4.0


@pytest.mark.parametrize("make", [cd, ct])
@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_sees_images_of_224_pixels_in_colour(make, channels):
    seen = []

    def lpips(x, y):
        seen.append(x)
        return (x - y).square().mean((1, 2, 3), keepdim=True)

    x, y = torch.rand(2, 4, channels, 8, 8)
    distance = make(loss_type="lpips", lpips=lpips).distance(x, y)
    assert distance.shape == (4,)
    assert seen[0].shape == (4, 3, 224, 224)
    assert seen[0].amin() >= x.amin()  # between the pixels, not beyond them
    constant = make(loss_type="lpips", lpips=lpips).distance(
        torch.ones(2, channels, 8, 8), torch.zeros(2, channels, 8, 8)
    )
    assert constant.tolist() == [1, 1]


def test_lpips_resizes_bilinearly():
    """Pixel i of 224 lies at (i + 1/2) n / 224 - 1/2 of n pixels, between its neighbours; none lies beyond the border."""
    place = ((torch.arange(224).double() + 0.5) * 8 / 224 - 0.5).clamp(0, 7)
    across = (1 - (place[:, None] - torch.arange(8)).abs()).clamp(min=0)  # (224, 8)
    x, y = torch.rand(2, 2, 3, 8, 8, dtype=torch.float64)
    large = [across @ image @ across.T for image in (x, y)]
    ramp = torch.linspace(0, 1, 224).double()

    def lpips(one, other):
        return (ramp * (one - other).abs()).mean((1, 2, 3))

    torch.testing.assert_close(perceptual(lpips)(x, y), lpips(*large), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("size", "shown"),
    [((32, 32), (224, 224)), ((255, 255), (224, 224)), ((256, 256), (256, 256)), ((300, 512), (300, 512)),
     ((96, 192), (224, 448)), ((512, 128), (896, 224))],
)  # fmt: skip
def test_lpips_sees_large_images_as_they_are(size, shown):
    seen = []
    distance = perceptual(lambda x, y: seen.append(x) or (x - y).square().mean((1, 2, 3)))
    x, y = torch.rand(2, 1, 3, *size)
    distance(x, y)
    assert seen[0].shape == (1, 3, *shown)
    assert torch.equal(seen[0], x) == (size == shown)


def test_lpips_is_for_images():
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared
        perceptual(l1)(torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8))
    assert (
        str(error.value)
        == "--loss_type lpips compares images (B, 1 or 3, H, W), but these are (2, 4, 8, 8); use l2 or l1."
    )


def test_a_missing_package_is_told_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match="--loss_type lpips needs lpips, which is not installed"):
        cd(loss_type="lpips")


def test_the_package_s_network_is_frozen(monkeypatch):
    class LPIPS(torch.nn.Linear):
        def __init__(self, net, verbose):
            assert net == "vgg"
            super().__init__(3 * 224 * 224, 1, bias=False)

        def forward(self, x, y):
            return super().forward((x - y).square().flatten(1))[:, :, None, None]

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=LPIPS))
    x = torch.randn(2, 3, 224, 224, requires_grad=True)
    value = load_lpips()(x, torch.zeros_like(x)).sum()
    value.backward()
    assert x.grad.any()
    assert cd(loss_type="lpips").distance(x, x).tolist() == [0, 0]


# ---- wrong settings


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (cd, {"num_scales": 1}, "--num_scales must be at least 2, but it is 1."),
        (cd, {"w": float("nan")}, "--w must be at least -1, but it is nan."),
        (cd, {"rho": 0.0}, "--rho must be above 0, but it is 0.0."),
        (cd, {"loss_type": "huber"}, "Unknown --loss_type 'huber'; one of l2, l1, lpips."),
        (cd, {"sigma_min": 3.0, "sigma_max": 2.0}, "--sigma_min 3.0 is above --sigma_max 2.0; swap them."),
        (cd, {"view": VPView(VP, "epsilon", 1.0), "sigma_min": 0.03}, "--sigma_max 80.0 is more noise than the network knows; give at most 14.614."),
        (ct, {"discretization_s_0": 0}, "--discretization_s_0 must be at least 1, but it is 0."),
        (ct, {"discretization_s_0": 200}, "--discretization_s_0 200 is above --discretization_s_1 150; swap them."),
        (ct, {"target_decay_0": 1.0}, "--target_decay_0 must be above 0 and below 1, but it is 1.0."),
        (ct, {"rho": -7.0}, "--rho must be above 0, but it is -7.0."),
        (ct, {"loss_type": "huber"}, "Unknown --loss_type 'huber'; one of l2, l1, lpips."),
        (ct, {"sigma_min": 3.0, "sigma_max": 2.0}, "--sigma_min 3.0 is above --sigma_max 2.0; swap them."),
    ],
)  # fmt: skip
def test_wrong_settings(make, settings, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared
        make(**settings)
    assert str(error.value) == message
