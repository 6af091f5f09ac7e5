"""Optimizers by name, and the shapes of the learning rate."""

import math
import sys

import pytest
import torch
from torch import nn

from cm_diffusers.engine.optimizers import (
    OPTIMIZERS,
    CooledOptimConfig,
    OptimConfig,
    RAdam,
    make_lr_scheduler,
    make_optimizer,
    wsd_factor,
)


def weights():
    return [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))]


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("radam", RAdam)])
def test_settings_reach_the_optimizer(name, kind):
    config = OptimConfig(
        learning_rate=0.02, optimizer=name, adam_beta1=0.5, adam_beta2=0.9, adam_epsilon=1e-6, adam_weight_decay=0.1
    )
    optimizer = make_optimizer(iter(weights()), config)
    assert type(optimizer) is kind
    found = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}
    assert found == {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-6, "weight_decay": 0.1}


@pytest.mark.parametrize("name", ["adamw", "radam"])
def test_weight_decay_is_decoupled(name):
    """With no gradient only the decay acts: w <- (1 - lr wd) w."""
    parameters = weights()
    for p in parameters:
        p.grad = torch.zeros_like(p)
    make_optimizer(parameters, OptimConfig(learning_rate=0.1, optimizer=name, adam_weight_decay=0.5)).step()
    for p in parameters:
        torch.testing.assert_close(p.detach(), torch.full_like(p, 0.95))


def test_every_choice_has_its_optimizer():
    assert set(OPTIMIZERS) == {"adamw", "adamw_8bit", "radam", "adamp"}


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        (
            "adamw_8bit",
            "bitsandbytes",
            '--optimizer adamw_8bit needs bitsandbytes, which is not installed: pip install "cm_diffusers[bnb]".',
        ),
        (
            "adamp",
            "timm.optim",
            '--optimizer adamp needs timm, which is not installed: pip install "cm_diffusers[timm]".',
        ),
    ],
)
def test_a_missing_package_is_named(monkeypatch, name, module, message):
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)  # what `import` sees as "not there"
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared below
        make_optimizer(weights(), OptimConfig(optimizer=name))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_adamp_minimises():
    optim = pytest.importorskip("timm.optim", exc_type=Exception)
    w = nn.Parameter(torch.full((4, 4), 2.0))
    optimizer = make_optimizer([w], OptimConfig(optimizer="adamp", learning_rate=0.1))
    assert type(optimizer) is optim.AdamP
    for _ in range(100):
        optimizer.zero_grad()
        (w - 1).square().sum().backward()
        optimizer.step()
    assert (w - 1).abs().max() < 0.1


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.0), (5, 0.5), (10, 1.0), (50, 1.0), (80, 1.0), (85, 0.5), (100, 0.0), (101, 0.0)]
)
def test_wsd_values(step, factor):
    """10 steps up, stable, and 20 down as 1 - sqrt(x): half the rate is gone after a quarter of the cooldown."""
    assert wsd_factor(step, warmup=10, cooldown=20, max_steps=100) == pytest.approx(factor, abs=1e-12)


def test_wsd_without_warmup_or_cooldown_is_constant():
    assert {wsd_factor(step, 0, 0, 10) for step in range(11)} == {1.0}


def rates(steps, **settings):
    """The learning rate of steps 0, 1, ..."""
    config = OptimConfig(learning_rate=0.5, **settings)
    optimizer = make_optimizer(weights(), config)
    scheduler, seen = make_lr_scheduler(optimizer, config, steps), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({"lr_scheduler": "constant"}, [1] * 8),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4}, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
        ({"lr_scheduler": "linear", "lr_warmup_steps": 4}, [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]),
        ({"lr_scheduler": "cosine"}, [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]),
        ({"lr_scheduler": "wsd", "lr_warmup_steps": 2, "lr_cooldown_steps": 4},
         [0, 0.5, 1, 1, 1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)]),
    ],
)  # fmt: skip
def test_shape_of_the_learning_rate(settings, factors):
    assert rates(8, **settings) == pytest.approx([0.5 * f for f in factors], abs=1e-9)


def test_cooldown_needs_wsd():
    with pytest.raises(ValueError, match="--lr_cooldown_steps acts with --lr_scheduler wsd, not 'cosine'"):
        rates(8, lr_scheduler="cosine", lr_cooldown_steps=2)


def test_warmup_and_cooldown_must_fit():
    with pytest.raises(ValueError, match="more than the 8 steps of the run"):
        rates(8, lr_scheduler="wsd", lr_warmup_steps=5, lr_cooldown_steps=4)


def test_radam_that_may_skip_steps_as_torch_s_does():
    """To the last bit, with a skipped step in between, but for the number of steps that it is told."""
    ours, theirs = weights(), weights()
    config = OptimConfig(learning_rate=0.02, optimizer="radam", adam_beta2=0.9, adam_weight_decay=0.1)
    optimizer = make_optimizer(ours, config)
    reference = torch.optim.RAdam(
        theirs, lr=0.02, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.1, decoupled_weight_decay=True
    )
    for step in range(10):
        for one, two in zip(ours, theirs, strict=True):
            one.grad = torch.full_like(one, math.sin(step + 1))
            two.grad = one.grad.clone()
        optimizer.found_inf = torch.tensor(float(step == 6))
        optimizer.step()
        if step == 6:
            for p in theirs:
                reference.state[p]["step"] += 1
        else:
            reference.step()
        assert all(map(torch.equal, ours, theirs)), step


@pytest.mark.parametrize(
    ("config", "steps", "cooldown"),
    [
        (CooledOptimConfig(), 600, 200),
        (CooledOptimConfig(lr_warmup_steps=8), 10, 2),
        (CooledOptimConfig(lr_cooldown_steps=0), 600, 0),
        (CooledOptimConfig(lr_cooldown_steps=7), 600, 7),
        (CooledOptimConfig(lr_scheduler="constant"), 600, 0),
        (OptimConfig(), 600, 0),
    ],
)
def test_a_distillation_cools_down_over_a_third_unless_told_otherwise(config, steps, cooldown) -> None:
    assert config.cooldown_of(steps) == cooldown
    scheduler = make_lr_scheduler(torch.optim.SGD([nn.Parameter(torch.zeros(1))], config.learning_rate), config, steps)
    middle = steps - cooldown + cooldown / 4
    if cooldown % 4 == 0:
        assert scheduler.lr_lambdas[0](middle) == pytest.approx(0.5 if cooldown else 1)
