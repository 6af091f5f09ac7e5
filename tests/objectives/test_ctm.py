"""Consistency trajectory models against data whose flow between any two noise levels is known exactly."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel
from oracles import Gaussian, edm_scalings, edm_teacher
from torch import nn

from cm_diffusers.diffusion.adversarial import adaptive_weight
from cm_diffusers.diffusion.process import EDM, append_dims
from cm_diffusers.diffusion.times import karras_grid
from cm_diffusers.diffusion.views import EDMView
from cm_diffusers.errors import UserError
from cm_diffusers.models.critics import CriticConfig, make_view_critic
from cm_diffusers.models.dropout import DropoutConfig, set_dropout
from cm_diffusers.models.with_target import with_target
from cm_diffusers.objectives.cd import CDConfig, CDObjective
from cm_diffusers.objectives.ctm import CTMConfig, CTMObjective
from cm_diffusers.objectives.edm import EDMConfig, EDMObjective
from cm_diffusers.schedulers import EDMConsistencyScheduler
from cm_diffusers.types import Batch, Networks, Progress


VIEW, DATA, PROGRESS = EDMView(0.5, "edm"), Gaussian(0.3, 0.5), Progress(0, 10)


class ExactJumps(nn.Module):
    """The perfect student of `data`: its g = (t G - s x) / (t - s) makes every jump the flow, and D where t = s."""

    def __init__(self, data: Gaussian) -> None:
        super().__init__()
        self.data, self.gain = data, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, shown, told, target_timestep=None, return_dict=True):
        t, s = (torch.exp(4 * time.double()) for time in (told, target_timestep))
        s = torch.where(s <= 0.002 * 1.0001, 0.0, s)  # a jump to the data is told sigma_min
        x = shown.double() * append_dims((t**2 + 0.25).sqrt(), shown)
        landed, here = self.data.flow(EDM(), x, t, s), self.data.predict(EDM(), x, t).x0
        apart = append_dims((t - s).abs() > 1e-5 * t, x).bool()
        g = torch.where(apart, (append_dims(t, x) * landed - append_dims(s, x) * x) / append_dims(t - s, x), here)
        c_skip, c_out = (append_dims(c, x) for c in edm_scalings(t, 0.5))
        return (self.gain * (g - c_skip * x) / c_out,)


def ctm(**settings) -> CTMObjective:
    return CTMObjective(CTMConfig(**settings), VIEW)


def draw(count: int = 4000, size: int = 4) -> torch.Tensor:
    torch.manual_seed(0)
    return DATA.mean + DATA.std * torch.randn(count, size, dtype=torch.float64)


def oracle_networks(teacher: Gaussian = DATA) -> Networks:
    return Networks(ExactJumps(DATA), target=ExactJumps(DATA).requires_grad_(False), teacher=edm_teacher(teacher))


def tiny_networks() -> Networks:
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "block_out_channels": (16, 16), "layers_per_block": 1, "norm_num_groups": 8}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    teacher = UNet2DModel(**sizes, **blocks).requires_grad_(False).eval()
    student = with_target(teacher)
    return Networks(student, target=copy.deepcopy(student).requires_grad_(False), teacher=teacher)


# ---- jumps


def test_a_jump_to_where_it_begins_is_the_identity() -> None:
    x, t = torch.randn(5, 3, 8, 8), torch.tensor([0.002, 0.1, 1.0, 5.0, 80.0], dtype=torch.float64)
    assert torch.equal(ctm().jump(tiny_networks().student, x, t, t, {}), x)


def test_the_oracle_jumps_as_the_flow_and_jumps_compose() -> None:
    objective, student, x = ctm(), ExactJumps(DATA), draw(6)
    t, u, s = (torch.full((6,), level, dtype=torch.float64) for level in (10.0, 2.0, 0.3))
    direct = objective.jump(student, x, t, s, {})
    torch.testing.assert_close(direct, DATA.flow(EDM(), x, t, s), rtol=1e-4, atol=1e-4)
    via = objective.jump(student, objective.jump(student, x, t, u, {}), u, s, {})
    torch.testing.assert_close(via, direct, rtol=1e-4, atol=1e-4)


def test_times_lie_on_the_grid_in_order_and_the_data_is_reached() -> None:
    objective, grid = ctm(num_scales=6, teacher_intervals=5), karras_grid(6, 0.002, 80.0, 7.0)
    for m in (1, 3, 5):
        t, u, s, between = objective.times(4000, m)
        place = {level: i for i, level in enumerate(grid.tolist())} | {0.0: 0}
        start, end, last = ([place[level] for level in times.tolist()] for times in (t, u, s))
        assert all(a - b == m and b >= c for a, b, c in zip(start, end, last, strict=True))
        assert set(start) == set(range(m, 6))
        assert set(last) == set(range(6 - m))
        assert torch.equal(between[0], t)
        assert torch.equal(between[-1], u)
        assert len(between) == m + 1
        assert 0.002 not in s.tolist()


def test_long_crossings_are_drawn_more_often() -> None:
    objective = ctm(teacher_intervals=3)
    drawn = torch.tensor([objective.intervals(Progress(step, 10_000)) for step in range(6000)])
    shares = torch.bincount(drawn, minlength=4)[1:] / 6000
    torch.testing.assert_close(shares, torch.tensor([1 / 6, 2 / 6, 3 / 6]), rtol=0, atol=0.02)
    assert objective.intervals(Progress(7, 10_000)) == drawn[7]


# ---- the loss


def test_the_oracle_has_a_loss_of_the_solver_s_order() -> None:
    """Heun's error is of second order in the spacing, and the loss is its square."""
    coarse, fine = (
        ctm(num_scales=n, teacher_intervals=1, dsm_weight=0)(oracle_networks(), Batch(draw()), PROGRESS).value.item()
        for n in (11, 41)
    )
    assert 0 < fine < coarse / 60
    assert ctm(dsm_weight=0)(oracle_networks(Gaussian(0.8, 0.5)), Batch(draw()), PROGRESS).value.item() > 0.05


def test_with_one_interval_and_jumps_to_the_data_it_is_consistency_distillation(monkeypatch) -> None:
    nets, x0 = tiny_networks(), torch.randn(6, 3, 8, 8)
    cd = CDObjective(CDConfig(), VIEW, boundary="edm")
    objective, index = ctm(teacher_intervals=1, dsm_weight=0), torch.randint(0, 17, (6,))
    t, s = objective.grid[index + 1], objective.grid[index]
    monkeypatch.setattr(objective, "times", lambda size, m: (t, s, torch.zeros_like(s), torch.stack([t, s])))
    monkeypatch.setattr("cm_diffusers.objectives.cd.sample_neighbours", lambda size, grid: (t, s))
    values = []
    for one in (cd, objective):
        torch.manual_seed(1)
        values.append(one(nets, Batch(x0), PROGRESS).value)
    assert values[0] > 0
    assert torch.equal(*values)


def test_gradients_pass_through_the_average_into_the_student_alone() -> None:
    nets = tiny_networks()
    nn.init.normal_(nets.target.class_embedding.target.linear_2.weight)
    ctm(teacher_intervals=2)(nets, Batch(torch.randn(4, 3, 8, 8)), PROGRESS).value.backward()
    assert all(p.grad is None for net in (nets.target, nets.teacher) for p in net.parameters())
    assert nets.student.class_embedding.target.linear_2.weight.grad.abs().sum() > 0


def test_denoising_is_edm_s_loss_at_its_own_times(monkeypatch) -> None:
    nets, x0 = tiny_networks(), torch.randn(6, 3, 8, 8)
    objective, sigma = ctm(teacher_intervals=1), torch.tensor([0.1, 0.3, 1.0, 3.0, 10.0, 60.0], dtype=torch.float64)
    monkeypatch.setattr(objective, "denoising_times", lambda size: sigma)
    noise = torch.randn_like(x0)
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    found = objective(nets, Batch(x0), PROGRESS).logs["dsm"]
    monkeypatch.setattr("cm_diffusers.objectives.edm.sample_lognormal", lambda *args: sigma)
    expected = EDMObjective(EDMConfig(), VIEW)(nets, Batch(x0), PROGRESS).value
    torch.testing.assert_close(found, expected)


def test_denoising_times_are_half_lognormal_half_even_on_the_upper_end() -> None:
    sigma = ctm().denoising_times(200_000).log()
    drawn = sigma < math.log(0.318)  # below the grid's upper end: of the lognormal half alone
    share = torch.special.ndtr(torch.tensor((math.log(0.318) + 1.2) / 1.2)).item() / 2
    assert drawn.double().mean().item() == pytest.approx(share, abs=0.005)
    rest = sigma[sigma > math.log(20)].exp() ** (1 / 7)  # next to none of the lognormal: even in sigma^(1 / rho)
    assert rest.mean().item() == pytest.approx((20 ** (1 / 7) + 80 ** (1 / 7)) / 2, abs=0.005)


def test_the_weight_of_denoising_does_not_depend_on_the_scale_of_its_loss() -> None:
    hold, pull = torch.randn(4, 3), torch.randn(4, 3)
    once, tenfold = (adaptive_weight(hold, scale * pull, 0.0, 1e4) * scale * pull for scale in (1, 10))
    torch.testing.assert_close(once, tenfold)
    assert adaptive_weight(1e6 * hold, pull, 0.0, 1e4) == 1e4


# ---- sampling


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7, 1.0])
def test_sampling_keeps_mean_and_spread_for_every_gamma(gamma: float) -> None:
    """With exact jumps every step's law is that of its noise level: the target is told the level before fresh noise."""
    scheduler = EDMConsistencyScheduler(
        boundary_scalings="edm", gamma=gamma, noise_conditioning="edm", clip_denoised=False
    )
    scheduler.set_timesteps(sigmas=[80.0, 5.0, 1.0, 0.2])
    student = ExactJumps(DATA)
    seed = torch.Generator().manual_seed(0)
    x = DATA.mean + (6400 + 0.25) ** 0.5 * torch.randn(400_000, 1, generator=seed, dtype=torch.float64)
    for t, level in zip(scheduler.timesteps, [5.0, 1.0, 0.2, 0.0], strict=True):
        told = scheduler.target_timestep(t).expand(len(x))
        output = student(scheduler.scale_model_input(x, t), t.expand(len(x)), told)[0].detach()
        x = scheduler.step(output, t, x, generator=seed).prev_sample
        assert x.mean().item() == pytest.approx(0.3, abs=4 * (0.25 + level**2) ** 0.5 / 600)
        assert x.std().item() == pytest.approx((0.25 + level**2) ** 0.5, rel=5e-3)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="--teacher_intervals is 18, but a grid of --num_scales 18 has 17"):
        CTMConfig(teacher_intervals=18)


# ---- the critic


def with_critic(nets: Networks) -> Networks:
    torch.manual_seed(2)
    critic = make_view_critic(nets.teacher, VIEW, CriticConfig("heads", critic_channels=8))
    for head in critic.heads:
        nn.init.normal_(head[-1].weight)
    return replace(nets, critic=critic)


def test_with_dropout_both_sides_of_a_pair_have_the_same_masks(monkeypatch) -> None:
    """A pair whose ends are one has no loss, whatever is dropped."""
    nets, x0 = tiny_networks(), torch.randn(4, 3, 8, 8)
    for net in (nets.student.train(), nets.target.train()):
        set_dropout(net, DropoutConfig(dropout=0.5))
    objective = ctm(dsm_weight=0)
    t, s = torch.full((4,), 5.0, dtype=torch.float64), torch.full((4,), 0.5, dtype=torch.float64)
    monkeypatch.setattr(objective, "times", lambda size, m: (t, t, s, t[None]))
    assert objective(nets, Batch(x0), PROGRESS).value == 0


def test_the_critic_moves_the_student_by_its_share_and_only_when_it_plays() -> None:
    nets, x0 = with_critic(tiny_networks()), torch.randn(4, 3, 8, 8)
    settings = {"teacher_intervals": 1, "dsm_weight": 0, "adversarial_start": 5, "adversarial_ramp": 0}
    judged = CTMObjective(CTMConfig(**settings, adversarial_weight=0.5), VIEW, critic=True)
    values = {}
    for step in (4, 5):
        torch.manual_seed(1)
        loss = judged(nets, Batch(x0), Progress(step, 10))
        values[step] = loss.value.item()
        assert (judged.judge(nets, Batch(x0), Progress(step, 10)) is None) == (step == 4)
    assert values[5] - values[4] == pytest.approx(0.5 * loss.logs["adversarial"].item(), rel=1e-3)
    loss.value.backward()
    assert all(p.grad is None for net in (nets.teacher, nets.target) for p in net.parameters())


def test_the_critic_learns_alone_from_data_and_what_two_jumps_make() -> None:
    """Features of frozen attention lie in memory as torch's backward pass of a norm cannot bear."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    teacher = UNet2DModel(**sizes, **blocks, attention_head_dim=8).requires_grad_(False).eval()
    student = with_target(teacher)
    nets = with_critic(Networks(student, target=copy.deepcopy(student).requires_grad_(False), teacher=teacher))
    judged = CTMObjective(CTMConfig(adversarial_start=0, adversarial_ramp=0), VIEW, critic=True)
    loss = judged.judge(nets, Batch(torch.randn(6, 3, 8, 8)), Progress(0, 10))
    loss.value.backward()
    assert loss.value.item() > 0
    assert all(p.grad is not None for p in nets.critic.parameters())
    assert all(p.grad is None for p in student.parameters())


def test_critics_that_read_text_are_refused() -> None:
    with pytest.raises(UserError, match="--critic vision judges images with their text"):
        make_view_critic(tiny_networks().teacher, VIEW, CriticConfig("vision"))
    assert make_view_critic(tiny_networks().teacher, VIEW, CriticConfig("none")) is None
