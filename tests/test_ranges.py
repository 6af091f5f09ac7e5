"""Every numeric flag of every script has a range, and what lies outside is refused before anything is loaded."""

import math
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
from scripts import FOLDER, script

from cm_diffusers.engine.cli import parse_configs
from cm_diffusers.ranges import INTERVALS, ORDERED, RANGES, check_ranges


CONFIGS = {c for p in FOLDER.glob("*.py") for c in getattr(script(p.stem), "CONFIGS", ())}


def plain(hint: object) -> set:
    """The types in a hint such as `list[float] | None`; choices are not numbers."""
    args = () if str(hint).startswith("typing.Literal") else get_args(hint)
    return set().union(*map(plain, args)) if args else {hint}


def numeric(config: type) -> dict[str, type]:
    hints = get_type_hints(config)
    kinds = {field.name: plain(hints[field.name]) & {int, float} for field in fields(config)}
    return {name: kind.pop() for name, kind in kinds.items() if kind}


FLAGS = sorted((config.__module__, config.__name__, name) for config in CONFIGS for name in numeric(config))
BY_NAME = {(config.__module__, config.__name__): config for config in CONFIGS}


def test_every_numeric_flag_has_a_range_and_no_other() -> None:
    assert {name for *_, name in FLAGS} - RANGES.keys() == set()
    assert RANGES.keys() - {name for *_, name in FLAGS} == set()
    assert len(RANGES) == sum(len(names.split()) for names in INTERVALS.values())
    assert len(FLAGS) > 150


def outside(name: str, kind: type) -> list[float]:
    low, high = map(float, RANGES[name][1:-1].split(","))
    beyond = [low - 1, high + 1 if high > 1e6 else 10 * high + 1]
    found = [kind(value) for value in beyond if math.isfinite(value)]
    if kind is float:
        found += [math.nan, -math.inf] + ([] if RANGES[name].endswith("inf]") else [math.inf])
    return found


@pytest.mark.parametrize(("module", "config", "name"), FLAGS)
def test_numbers_out_of_range_are_refused(module, config, name) -> None:
    config = BY_NAME[module, config]
    hint = str(get_type_hints(config)[name])
    for value in outside(name, numeric(config)[name]):
        instance = config.__new__(config)
        for field in fields(config):
            setattr(instance, field.name, None)
        setattr(instance, name, [value] if hint.startswith("list") else value)
        with pytest.raises(ValueError, match=rf"^--{name} must be .*, but it is -?[\w.+]+\.$") as refused:
            check_ranges(instance)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "words", "sentence"),
    [
        ("distill_lcm", ["--ema_decay", "1.5"], "--ema_decay must be at least 0 and at most 1, but it is 1.5."),
        ("distill_lcm", ["--adam_beta2", "2"], "--adam_beta2 must be at least 0 and below 1, but it is 2.0."),
        ("distill_lcm", ["--lr_warmup_steps", "-5"], "--lr_warmup_steps must be at least 0, but it is -5."),
        ("distill_lcm", ["--learning_rate", "nan"], "--learning_rate must be at least 0, but it is nan."),
        ("distill_lcm", ["--learning_rate", "inf"], "--learning_rate must be at least 0 and finite, but it is inf."),
        ("distill_lcm", ["--train_batch_size", "1000000000"], "--train_batch_size must be at least 1 and at most 16384, but it is 1000000000."),
        ("distill_lcm", ["--resolution", "1000000"], "--resolution must be at least 1 and at most 16384, but it is 1000000."),
        ("distill_lcm", ["--seed", "-1"], "--seed must be at least 0, but it is -1."),
        ("distill_lcm", ["--validation_guidance_scale", "nan"], "--validation_guidance_scale must be at least 0, but it is nan."),
        ("distill_lcm", ["--w_min", "5", "--w_max", "2"], "--w_min 5.0 is above --w_max 2.0; swap them."),
        ("distill_scott", ["--eta", "nan"], "--eta must be at least 0 and at most 1, but it is nan."),
        ("train_edm", ["--p_mean", "nan"], "--p_mean must be finite, but it is nan."),
        ("train_edm", ["--sigma_min", "9", "--sigma_max", "3"], "--sigma_min 9.0 is above --sigma_max 3.0; swap them."),
        ("distill_lcm", ["--max_grad_norm", "inf"], None),
        ("evaluate", ["--guidance_scales", "2", "nan"], "--guidance_scales must be at least 0, but it is nan."),
    ],
)  # fmt: skip
def test_scripts_refuse_them_at_once(name, words, sentence) -> None:
    teacher = ["--pretrained_teacher_model", "teacher"]
    needed = {"distill_lcm": teacher, "distill_scott": teacher, "train_edm": ["--unet_config", "unet"]}
    given = [*needed.get(name, []), *words]
    if sentence is None:
        parse_configs(script(name).CONFIGS, "", given)
        return
    with pytest.raises(ValueError, match="--") as refused:
        parse_configs(script(name).CONFIGS, "", given)
    assert str(refused.value) == sentence


def test_bounds_that_are_not_given_have_no_order() -> None:
    assert all(lower in RANGES and upper in RANGES for lower, upper in ORDERED.items())
    (lcf,) = (config for config in CONFIGS if config.__name__ == "LCFConfig")
    check_ranges(lcf(w_min=5.0))
