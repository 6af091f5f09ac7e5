"""Mean flows against a Gaussian, whose average velocities are known exactly."""

import pytest
import torch
from torch import nn

from cm_diffusers.diffusion.process import EDM, RectifiedFlow, append_dims
from cm_diffusers.errors import UserError
from cm_diffusers.objectives.mean_flow import MeanFlowConfig, MeanFlowObjective
from cm_diffusers.types import Batch, Networks, Progress
from objectives.test_ctm import DATA, VIEW, ExactJumps, draw, tiny_networks


PROGRESS = Progress(0, 10)


def objective(any_class: int | None = None, **settings) -> MeanFlowObjective:
    return MeanFlowObjective(MeanFlowConfig(**settings), VIEW, any_class)


def times(t: float, r: float) -> tuple[torch.Tensor, torch.Tensor]:
    sigma, s = (torch.full((6,), time / (1 - time), dtype=torch.float64) for time in (t, r))
    return sigma, s


def test_velocity_times_distance_is_the_flow() -> None:
    """u = (x_t - X(t -> r)) / (t - r), in rectified flow."""
    (sigma, s), x = times(0.8, 0.3), draw(6)
    found = objective().velocity(ExactJumps(DATA), x, sigma, s, {})
    t, r = (torch.full((6,), time, dtype=torch.float64) for time in (0.8, 0.3))
    inside = 0.2 * x  # x_t
    torch.testing.assert_close(found, (inside - DATA.flow(RectifiedFlow(), inside, t, r)) / 0.5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tangent", ["jvp", "central"])
def test_the_exact_average_velocity_satisfies_the_identity(tangent: str) -> None:
    """Along the flow itself, whose direction is the marginal velocity, u = v - (t - r) du / dt."""
    (sigma, s), x = times(0.8, 0.3), draw(6)
    network = ExactJumps(DATA).double()
    prediction = DATA.predict(EDM(), x, sigma)
    mean_flow = objective(tangent=tangent)
    slope = mean_flow.slope(network, x, sigma, s, prediction.noise, {})
    span = append_dims((0.8 - 0.3) * (1 + sigma) ** 2 / sigma, x)
    expected = prediction.noise - prediction.x0 - span * slope
    torch.testing.assert_close(mean_flow.velocity(network, x, sigma, s, {}), expected, rtol=2e-3, atol=2e-3)


def test_with_equal_times_it_is_flow_matching(monkeypatch) -> None:
    nets, x0 = tiny_networks(), torch.randn(6, 3, 8, 8)
    mean_flow, noise = objective(instant_share=1.0, adaptive_power=0.0), torch.randn(6, 3, 8, 8)
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    sigma = torch.tensor([0.1, 0.3, 1.0, 3.0, 10.0, 60.0], dtype=torch.float64)
    monkeypatch.setattr(mean_flow, "times", lambda size: (sigma, sigma))
    loss = mean_flow(nets, Batch(x0), PROGRESS).value
    x = x0 + append_dims(sigma, x0) * noise
    v = mean_flow.velocity(nets.student, x, sigma, sigma, {})
    torch.testing.assert_close(loss, (v - (noise - x0)).square().flatten(1).sum(1).mean())


def test_times_are_logit_normal_and_a_share_is_equal() -> None:
    sigma, s = objective(instant_share=0.75).times(100_000)
    assert (sigma == s).double().mean().item() == pytest.approx(0.75, abs=0.01)
    assert (s <= sigma).all()
    apart = sigma > s
    pooled = torch.cat([sigma[apart], s[apart]]).log()
    assert pooled.mean().item() == pytest.approx(-0.4, abs=0.02)
    assert pooled.std().item() == pytest.approx(1.0, abs=0.02)


def test_the_adaptive_weight_makes_samples_count_alike() -> None:
    nets, x0 = tiny_networks(), torch.randn(6, 3, 8, 8)
    values = []
    for scale in (1.0, 100.0):
        torch.manual_seed(0)
        loss = objective(instant_share=1.0)(nets, Batch(scale * x0), PROGRESS)
        values.append(loss.value.item())
    assert all(value == pytest.approx(1.0, abs=1e-3) for value in values)


class Classes(nn.Module):
    """v = the class's number, whatever it sees: F of that denoiser."""

    def forward(self, shown, told, class_labels, target_timestep, return_dict=True):
        sigma = torch.exp(4 * told.double())
        x = shown.double() * append_dims((sigma**2 + 0.25).sqrt(), shown)
        level = append_dims(sigma, x)
        # n - g = k with x = g + sigma n: g = (x - sigma k) / (1 + sigma)
        g = (x - level * append_dims(class_labels, x)) / (1 + level)
        return ((g - 0.25 / (level**2 + 0.25) * x) * (level**2 + 0.25).sqrt() / (level * 0.5),)


def test_guidance_is_in_the_target_of_those_whose_class_is_known() -> None:
    """(1 + w) v - (w + kappa) u_any + kappa u_class, with u = 7 for any class and 3 for that of the image."""
    guided = objective(any_class=7, condition_dropout=0.5, w=1.0, guidance_mix=0.25)
    x, v = torch.randn(400, 2, dtype=torch.float64), torch.full((400, 2), 2.0, dtype=torch.float64)
    sigma = torch.full((400,), 1.5, dtype=torch.float64)
    cond, found = guided.guided(Classes(), x, sigma, v, {"class_labels": torch.full((400,), 3)})
    hidden = cond["class_labels"] == 7
    assert 150 < hidden.sum() < 250
    expected = torch.where(hidden, 2.0, 2 * 2.0 - 1.25 * 7 + 0.25 * 3).double()[:, None].expand(-1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UserError, match=r"--w 1\.0 needs a network that knows images of any class"):
        MeanFlowConfig(w=1.0)
    with pytest.raises(UserError, match="guidance_mix"):
        MeanFlowConfig(condition_dropout=0.1, guidance_mix=0.5)


def test_nothing_is_trained_but_the_student() -> None:
    nets = Networks(tiny_networks().student)
    torch.manual_seed(3)
    loss = objective(instant_share=0.25, tangent="central")(nets, Batch(torch.randn(8, 3, 8, 8)), PROGRESS)
    loss.value.backward()
    assert nets.student.class_embedding.target.linear_2.weight.grad.abs().sum() > 0
