"""Moving averages of a student: closed forms, and power-function averages rebuilt after training (2312.02696)."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_unet
from torch import nn
from toys import source, toy_trainer, weights

from cm_diffusers.engine.averages import (
    MovingAverage,
    list_snapshots,
    power_of,
    power_rate,
    profile_product,
    rebuild,
    rebuild_weights,
    warmed_up,
)
from cm_diffusers.models.adapters import add_lora
from cm_diffusers.models.families.unet import LCM_LORA_TARGETS


def layer(value: float) -> nn.Module:
    module = nn.Linear(3, 2, bias=False)
    nn.init.constant_(module.weight, value)
    return module


def test_export_ema_closed_form():
    """Rate min(decay, (1 + k) / (10 + k)) at step k: 0.1, 2 / 11, then the cap."""
    model = layer(0.0)
    average = MovingAverage(model, warmed_up(0.2))
    for step, value in enumerate([1.0, 2.0, 4.0]):
        nn.init.constant_(model.weight, value)
        average.update(step)
    expected = (0.9 * 2 / 11 + 2 * 9 / 11) * 0.2 + 4 * 0.8
    torch.testing.assert_close(average.average["weight"], torch.full((2, 3), expected))


def test_export_ema_is_applied_and_taken_back():
    model = layer(0.5)
    average = MovingAverage(model, warmed_up(0.999))
    nn.init.normal_(model.weight)
    live, mean = model.weight.detach().clone(), average.average["weight"].clone()
    with pytest.raises(KeyError), average.applied():  # noqa: PT012
        assert torch.equal(model.weight, mean)
        raise KeyError
    assert torch.equal(model.weight, live)
    assert torch.equal(average.average["weight"], mean)


def test_export_ema_holds_trainable_weights_only_and_applies_them():
    student = add_lora(tiny_unet(), 4, 4.0, 0.0, LCM_LORA_TARGETS)
    average = MovingAverage(student, warmed_up(0.9))
    assert all("lora_" in name for name in average.average)
    for value in average.average.values():
        value.fill_(0.25)
    with average.applied():
        assert all((p == 0.25).all() for p in student.parameters() if p.requires_grad)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_power_of_has_the_paper_s_values(sigma_rel, gamma):
    assert power_of(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.1, 0.25])
def test_the_profile_has_the_width_asked_for(sigma_rel):
    tau, gamma = np.linspace(0, 1, 2_000_001), power_of(sigma_rel)
    density = (gamma + 1) * tau**gamma
    mean = np.trapezoid(density * tau, tau)
    assert np.sqrt(np.trapezoid(density * (tau - mean) ** 2, tau)) == pytest.approx(sigma_rel, rel=1e-4)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.289])
def test_a_width_that_no_profile_has_is_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"give one between 0 and 0\.288\.$"):
        power_of(sigma_rel)


def test_power_average_of_a_straight_line():
    """Weights tau have the mean (gamma + 1) / (gamma + 2) step."""
    model, steps = nn.Linear(1, 1, bias=False).double(), 4000
    average = MovingAverage(model, power_rate(0.1))
    for step in range(1, steps + 1):
        nn.init.constant_(model.weight, float(step))
        average.update(step)
    gamma = power_of(0.1)
    assert average.average["weight"].item() == pytest.approx((gamma + 1) / (gamma + 2) * steps, rel=1e-3)


def test_profile_product_is_the_integral():
    tau = np.linspace(0, 30, 300_001)
    profiles = [np.where(tau <= t, (g + 1) * tau**g / t ** (g + 1), 0) for t, g in ((30, 6.94), (20, 16.97))]
    assert profile_product(30, 6.94, 20, 16.97) == pytest.approx(
        np.trapezoid(profiles[0] * profiles[1], tau), rel=1e-3
    )


def test_a_kept_average_is_rebuilt_as_itself():
    kept = [(step, width) for step in (100, 200, 300) for width in (0.05, 0.1)]
    expected = [0, 0, 0, 1, 0, 0]
    assert rebuild_weights(kept, 200, 0.1) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.07, 0.15])
def test_another_average_is_rebuilt_from_two(sigma_rel):
    """Of a random walk: nearer to the true average than either kept one, by far."""
    steps, generator = 2000, np.random.default_rng(0)
    walk = np.cumsum(generator.normal(size=(steps, 8)), 0)
    found = {width: np.zeros(8) for width in (0.05, 0.1, sigma_rel)}
    kept = {}
    for step in range(1, steps + 1):
        for width, value in found.items():
            rate = power_rate(width)(step)
            found[width] = rate * value + (1 - rate) * walk[step - 1]
            if step % 125 == 0 and width != sigma_rel:
                kept[step, width] = found[width]
    rebuilt = rebuild_weights(list(kept), steps, sigma_rel) @ np.array(list(kept.values()))
    error, others = rebuilt - found[sigma_rel], [found[width] - found[sigma_rel] for width in (0.05, 0.1)]
    assert np.linalg.norm(error) < 0.05 * min(map(np.linalg.norm, others))


def test_factors_sum_to_one_and_too_few_averages_are_refused():
    kept = [(step, width) for step in range(250, 2001, 250) for width in (0.05, 0.1)]
    assert rebuild_weights(kept, 2000, 0.13).sum() == pytest.approx(1)
    with pytest.raises(ValueError, match=r"The 1 averages kept until step 2000 come only within 128% of the profile"):
        rebuild_weights([(2000, 0.05)], 2000, 0.15)


def test_snapshots_of_a_run_survive_pruning_and_rebuild(tmp_path):
    settings = {
        "max_train_steps": 6,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 1,
        "ema_sigma_rels": [0.05, 0.1],
    }
    trainer = toy_trainer(tmp_path, **settings)
    trainer.fit(source())
    assert [(one.step, one.sigma_rel) for one in list_snapshots(tmp_path)] == [
        (s, w) for s in (2, 4, 6) for w in (0.05, 0.1)
    ]
    rebuilt, step = rebuild(tmp_path, 0.1)
    kept = load_file(tmp_path / "averages" / "step-6" / "0.1.safetensors")
    assert step == 6
    assert all(torch.allclose(rebuilt[name], value, atol=1e-5) for name, value in kept.items())
    assert not all(
        torch.equal(value, live) for value, live in zip(kept.values(), weights(trainer.student), strict=True)
    )


def test_averages_go_on_after_a_resume_and_later_ones_are_set_aside(tmp_path):
    settings = {"max_train_steps": 6, "checkpointing_steps": 2, "ema_sigma_rels": [0.1]}
    toy_trainer(tmp_path, **settings).fit(source())
    first, seen = {one.step: load_file(one.path) for one in list_snapshots(tmp_path)}, []
    resumed = toy_trainer(tmp_path, resume_from_checkpoint="checkpoint-2", **settings)
    assert [one.step for one in list_snapshots(tmp_path)] == [2, 4, 6]  # until training starts
    resumed.callbacks.append(lambda trainer, loss: seen.append([one.step for one in list_snapshots(tmp_path)]))
    resumed.fit(source())
    assert seen == [[2], [2, 4], [2, 4], [2, 4, 6]]
    for one in [*list_snapshots(tmp_path), *list_snapshots(tmp_path / "later-1")]:
        assert all(torch.equal(value, first[one.step][name]) for name, value in load_file(one.path).items())


def test_a_run_without_averages_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="train with --ema_sigma_rels"):
        rebuild(tmp_path, 0.1)
