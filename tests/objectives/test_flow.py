"""Flow matching on Gaussian data, whose velocity is known, and the times that it is learnt at."""

import math

import pytest
import torch
from oracles import Gaussian
from torch import Tensor, nn

from cm_diffusers.diffusion.process import RectifiedFlow
from cm_diffusers.errors import UserError
from cm_diffusers.objectives.flow import FlowConfig, FlowObjective
from cm_diffusers.types import Batch, Networks, Progress


PROGRESS = Progress(0, 1)


class Affine(nn.Module):
    """The velocity slope * x + offset."""

    def __init__(self, slope: float = 0.0, offset: float = 0.0) -> None:
        super().__init__()
        self.slope, self.offset = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (slope, offset))

    def forward(self, x_t: Tensor) -> Tensor:
        return self.slope * x_t + self.offset


def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    return network(x_t)


def at(t: float) -> FlowConfig:
    """All times are t."""
    return FlowConfig(logit_mean=math.log(t / (1 - t)), logit_std=1e-9)


def velocity(data: Gaussian, t: float) -> tuple[float, float]:
    """Slope and offset of E[noise - x0 | x_t]: -mu + (t - (1 - t) S^2) / V (x - (1 - t) mu), V = (1 - t)^2 S^2 + t^2."""
    slope = (t - (1 - t) * data.std**2) / ((1 - t) ** 2 * data.std**2 + t**2)
    return slope, -data.mean * (1 + slope * (1 - t))


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_minimiser_is_the_velocity_of_the_data(t: float) -> None:
    """Of affine students, by least squares, for the loss is quadratic in both numbers."""
    data, objective = Gaussian(1.5, 1.3), FlowObjective(at(t), call)
    x0 = data.mean + data.std * torch.randn(
        100_000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )

    def gradient(student: Affine) -> Tensor:
        torch.manual_seed(1)
        return torch.stack(
            torch.autograd.grad(
                objective(Networks(student), Batch(x0), PROGRESS).value, [student.slope, student.offset]
            )
        )

    start, along_slope, along_offset = (gradient(Affine(*numbers)) for numbers in ((0, 0), (1, 0), (0, 1)))
    found = torch.linalg.solve(torch.stack([along_slope - start, along_offset - start], 1), -start)
    slope, offset = velocity(data, t)
    assert found[0].item() == pytest.approx(slope, rel=0.01, abs=0.005)
    assert found[1].item() == pytest.approx(offset, rel=0.01)


@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_the_oracle_errs_by_the_variance_that_is_left(t: float) -> None:
    """Var[noise - x0 | x_t] = S^2 / V."""
    data = Gaussian(0.4, 0.7)

    def oracle(network: nn.Module, x_t: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
        assert torch.allclose(time, torch.full_like(time, t))
        x0, noise = data.predict(RectifiedFlow(), x_t, time)
        return noise - x0

    x0 = data.mean + data.std * torch.randn(100_000, 4, dtype=torch.float64)
    loss = FlowObjective(at(t), oracle)(Networks(nn.Identity()), Batch(x0), PROGRESS)
    assert loss.value.item() == pytest.approx(data.std**2 / ((1 - t) ** 2 * data.std**2 + t**2), rel=0.015)


def test_times_are_logit_normal_or_uniform_then_shifted() -> None:
    """A shift of k adds log k to log(t / (1 - t)); the quartiles of N(0, 1) are at 0.67449."""
    for settings, median, quartile in (
        ({}, 0.5, 1 / (1 + math.exp(0.67449))),
        ({"logit_mean": 1.0, "logit_std": 0.5}, 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-1 + 0.337245))),
        ({"shift": 3.0}, 0.75, 3 / (3 + math.exp(0.67449))),
        ({"time_sampling": "uniform"}, 0.5, 0.25),
        ({"time_sampling": "uniform", "shift": 3.0}, 0.75, 0.5),
    ):
        t = FlowObjective(FlowConfig(**settings), call).times(200_000)
        assert t.dtype == torch.float64
        assert ((t >= 0) & (t <= 1)).all()
        assert t.median().item() == pytest.approx(median, abs=0.005)
        assert t.quantile(0.25).item() == pytest.approx(quartile, abs=0.005)


def test_conditions_are_dropped_by_rows_and_all_of_a_row_together() -> None:
    shares = []

    def spy(network: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        first, second = cond["states"][:, 0, 0], cond["pooled"][:, 0]
        assert torch.equal(first, second)
        shares.append((first == 0).double().mean().item())
        return x_t

    rows = torch.arange(1.0, 20_001.0)
    cond = {"states": rows[:, None, None].expand(-1, 3, 2), "pooled": rows[:, None].expand(-1, 2)}
    batch = Batch(torch.randn(20_000, 1), cond, {name: torch.zeros_like(value) for name, value in cond.items()})
    FlowObjective(FlowConfig(condition_dropout=0.3), spy)(Networks(nn.Identity()), batch, PROGRESS)
    assert shares[0] == pytest.approx(0.3, abs=0.015)


@pytest.mark.parametrize(
    "wrong", [{"logit_std": 0.0}, {"shift": -1.0}, {"shift": math.inf}, {"condition_dropout": 1.5}]
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(wrong))} must be "):
        FlowConfig(**wrong)
