"""A step of `FlowConsistencyScheduler` is a Gaussian whose mean and deviation are those of the formula, at every gamma."""

import pytest
import torch

from cm_diffusers.policy.transitions import transition
from cm_diffusers.schedulers import FlowConsistencyScheduler


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("gamma", [0.01, 0.3, 0.7, 1.0])
def test_law_of_a_step(gamma: float, shift: float) -> None:
    """x' = a (D + s / t (x - D)) + sqrt(t'^2 - (a s)^2) z, s = (1 - gamma) t', a = (1 - t') / (1 - s); drawn 40000 times."""
    generator = torch.Generator().manual_seed(0)
    scheduler = FlowConsistencyScheduler(shift=shift, gamma=gamma)
    scheduler.set_timesteps(4)
    x, v = torch.randn(2, 1, 4, 1, 1, generator=generator, dtype=torch.float64).expand(2, 1, 4, 100, 100)
    for index in range(4):
        law = transition(scheduler, index, v, x)
        t, following = scheduler.sigmas[index : index + 2].tolist()
        s = (1 - gamma) * following
        kept, data = (1 - following) / (1 - s), x - t * v
        mean, std = kept * (data + s / t * (x - data)), (following**2 - (kept * s) ** 2) ** 0.5
        torch.testing.assert_close(law.mean, mean.float(), atol=1e-6, rtol=1e-6)
        assert law.std.item() == pytest.approx(std, abs=1e-7)
        drawn = scheduler.step(v, scheduler.timesteps[index], x, generator=generator).prev_sample
        if index == 3:
            assert law.std == 0
            torch.testing.assert_close(drawn.float(), law.mean, atol=1e-6, rtol=1e-6)
            continue
        z = (drawn - mean) / std
        assert z.mean().abs() < 5 / 200
        assert z.std().item() == pytest.approx(1.0, abs=5 / 282)


def test_without_noise_there_is_nothing_to_learn_from() -> None:
    scheduler = FlowConsistencyScheduler(shift=3.0, gamma=0.0)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="is deterministic with gamma 0"):
        transition(scheduler, 0, torch.zeros(1, 1), torch.zeros(1, 1))
