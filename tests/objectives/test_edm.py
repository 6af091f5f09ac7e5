"""Diffusion in EDM's coordinates on Gaussian data, whose perfect denoiser errs by a known amount."""

import math

import pytest
import torch
from oracles import Gaussian, edm_teacher

from cm_diffusers.diffusion.views import EDMView
from cm_diffusers.objectives.edm import EDMConfig, EDMObjective
from cm_diffusers.types import Batch, Networks, Progress


def loss_on(data: Gaussian, sigma_data: float, sigma: float | None = None):
    """Of the perfect denoiser, at one noise level or at all those of training."""
    where = {} if sigma is None else {"p_mean": math.log(sigma), "p_std": 1e-6}
    objective = EDMObjective(EDMConfig(**where), EDMView(sigma_data, "edm"))
    x0 = data.mean + data.std * torch.randn(20_000, 8, dtype=torch.float64)
    return objective(Networks(edm_teacher(data, sigma_data=sigma_data)), Batch(x0), Progress(0, 1))


@pytest.mark.parametrize("sigma", [0.05, 0.5, 4.0])
@pytest.mark.parametrize(("std", "sigma_data"), [(0.3, 0.5), (2.0, 1.0)])
def test_noise_and_weight_at_a_level(std: float, sigma_data: float, sigma: float) -> None:
    """The error is the variance of x0 given x, std^2 sigma^2 / (std^2 + sigma^2), and lambda as in 2206.00364, Table 1."""
    error = std**2 * sigma**2 / (std**2 + sigma**2)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    loss = loss_on(Gaussian(0.4, std), sigma_data, sigma)
    assert loss.logs["error"].item() == pytest.approx(error, rel=0.015)
    assert loss.value.item() == pytest.approx(weight * error, rel=0.015)


def test_every_level_counts_alike() -> None:
    """Where sigma_data is that of the data, the weighted error is 1 at all levels (2206.00364, Sec. 5)."""
    assert loss_on(Gaussian(-1.0, 0.7), 0.7).value.item() == pytest.approx(1, rel=0.01)
