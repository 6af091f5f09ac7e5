"""Averages without a search, against running averages and moments of their profiles."""

import numpy as np
import pytest
import torch
from torch import nn

from cm_diffusers.combining.vectors import KINDS, baselines, ema, one_hot, power_function, uniform
from cm_diffusers.engine.averages import MovingAverage, power_rate


STEPS = [100, 200, 300, 450]


def test_every_baseline_has_the_sum_one_and_a_name_of_its_own() -> None:
    known = baselines(STEPS, [0.0, 0.5, 0.9], [0.05, 0.2])
    assert [one.kind for one in known] == [*["single"] * 4, "uniform", *["EMA"] * 3, *["power function"] * 2]
    assert {one.kind for one in known} == set(KINDS)
    assert len({one.name for one in known}) == len(known)
    assert [one.vector.sum() for one in known] == pytest.approx([1] * len(known), abs=1e-15)
    assert known[3].name == "single (step 450)"
    assert known[3].vector.tolist() == [0, 0, 0, 1] == ema(4, 0.0).tolist() == one_hot(4, 3).tolist()
    assert uniform(4).tolist() == [0.25] * 4


@pytest.mark.parametrize("sigma_rel", [0.05, 0.15])
def test_a_power_function_has_its_width_and_is_the_running_average(sigma_rel: float) -> None:
    """With a snapshot of every step; the running one weighs step tau with the integral over (tau - 1, tau]."""
    steps = np.arange(1, 401)
    weights = power_function(steps.tolist(), sigma_rel)
    mean = (weights * steps).sum()
    assert np.sqrt((weights * (steps - mean) ** 2).sum()) / 400 == pytest.approx(sigma_rel, rel=0.01)
    model = nn.Linear(400, 1, bias=False)
    running = MovingAverage(model, power_rate(sigma_rel))
    for step in range(1, 401):
        model.weight.data = torch.eye(400)[step - 1 : step]  # the average of these is the vector itself
        running.live["weight"] = model.weight
        running.update(step)
    assert np.abs(running.average["weight"].detach()[0].numpy() - weights).sum() < 0.06


def test_a_power_function_looks_at_steps_not_at_places() -> None:
    """Eq. 3: snapshots of steps s and 2 s are weighed as 1 to 2^gamma, whatever lies between."""
    first, second = power_function([100, 200], 0.2), power_function([100, 150, 170, 200], 0.2)
    assert first[1] / first[0] == pytest.approx(second[3] / second[0])
