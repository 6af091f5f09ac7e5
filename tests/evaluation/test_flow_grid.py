"""Flow teachers are sampled at even times, shifted once, which their stock scheduler does not do by itself."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_flow import tiny_sd3

from cm_diffusers.evaluation.sampling import generate


@pytest.mark.parametrize(
    ("shift", "steps", "times"),
    [(1.0, 1, [1000]), (1.0, 2, [1000, 500]), (1.0, 4, [1000, 750, 500, 250]), (3.0, 4, [1000, 900, 750, 500])],
)
def test_times_of_few_steps(shift: float, steps: int, times: list[float]) -> None:
    pipeline = tiny_sd3(scheduler=FlowMatchEulerDiscreteScheduler(shift=shift))
    images, _ = generate(pipeline, ["a bag", "a coat"], [0, 1], steps, 2.0, 2)
    assert images.shape == (2, 3, 32, 32)
    assert torch.allclose(pipeline.scheduler.timesteps, torch.tensor(times, dtype=torch.float32))
