"""Cooldowns that branch off a run at a constant rate (2405.18392): the same bits as a run with that schedule from the start."""

import json
import logging
import sys

import pytest
from toys import ToyObjective, assert_same, source, tensors, toy_networks, toy_trainer

from cm_diffusers.diffusion.times import doubling_intervals
from cm_diffusers.engine.branching import check_stages, command_line, command_of
from cm_diffusers.engine.optimizers import OptimConfig, wsd_factor
from cm_diffusers.types import Progress


WARM = {"learning_rate": 1e-2, "lr_warmup_steps": 2}
CONSTANT = OptimConfig(**WARM, lr_scheduler="constant_with_warmup")


def cooled(steps: int, shape: str = "1-sqrt", **more) -> OptimConfig:
    return OptimConfig(**WARM | more, lr_scheduler="wsd", lr_cooldown_steps=steps, lr_cooldown_shape=shape)


def constant_run(folder, **settings) -> None:
    settings = {
        "max_train_steps": 8,
        "checkpointing_steps": 1,
        "ema_sigma_rels": [0.1],
        "export_ema_decay": 0.9,
    } | settings
    trainer = toy_trainer(folder, optim=CONSTANT, **settings)
    trainer.fit(source())
    trainer.end()


def branch(folder, start, optim, steps, nets=None, objective=None):
    averages = {"ema_sigma_rels": [0.1], "export_ema_decay": 0.9}
    return toy_trainer(
        folder,
        nets,
        objective,
        optim,
        max_train_steps=steps,
        resume_from_checkpoint=str(start) if start else None,
        **averages,
    )


@pytest.mark.parametrize("shape", ["1-sqrt", "linear", "cosine"])
@pytest.mark.parametrize("start", [4, 6])
def test_a_branch_is_the_straight_run_with_its_schedule(tmp_path, shape, start) -> None:
    constant_run(tmp_path / "run")
    before = tensors(tmp_path / "run" / f"checkpoint-{start}")
    for name, place in (("branch", tmp_path / "run" / f"checkpoint-{start}"), ("straight", None)):
        trainer = branch(tmp_path / name, place, cooled(4, shape), start + 4, toy_networks(9) if place else None)
        trainer.fit(source())
        trainer.end()
    one, two = (tensors(tmp_path / name / f"checkpoint-{start + 4}") for name in ("branch", "straight"))
    assert_same(one, two)
    assert_same(tensors(tmp_path / "run" / f"checkpoint-{start}"), before)  # the trunk is as it was
    trunk = tensors(tmp_path / "run" / "checkpoint-8")
    assert start + 4 != 8 or any(not (trunk[name] == value).all() for name, value in one.items())


def test_a_branch_goes_on_after_a_break(tmp_path) -> None:
    constant_run(tmp_path / "run")
    start = tmp_path / "run" / "checkpoint-4"
    trainer = branch(tmp_path / "whole", start, cooled(4), 8)
    trainer.fit(source())
    halves = {"max_train_steps": 8, "checkpointing_steps": 2, "ema_sigma_rels": [0.1], "export_ema_decay": 0.9}

    def stop(trainer, loss) -> None:
        trainer.stopping = "a break" if trainer.step == 6 else ""

    first = toy_trainer(tmp_path / "parts", optim=cooled(4), resume_from_checkpoint=str(start), **halves)
    first.steering.append(stop)
    first.fit(source())
    first.end()
    toy_trainer(tmp_path / "parts", optim=cooled(4), resume_from_checkpoint="latest", **halves).fit(source())
    assert_same(tensors(tmp_path / "parts" / "checkpoint-8"), tensors(tmp_path / "whole" / "checkpoint-8"))


def test_a_branch_from_where_the_rates_differ_is_refused(tmp_path) -> None:
    constant_run(tmp_path / "run", max_train_steps=4)
    with pytest.raises(
        ValueError, match=r"learning rate was 0.01 in .*checkpoint-4, but the schedule has 0.00293 there: a branch"
    ):
        branch(tmp_path / "one", tmp_path / "run" / "checkpoint-4", cooled(4), 6)  # 1 - sqrt(2 / 4) = 0.29
    with pytest.raises(ValueError, match="after the warm-up and before the cooldown"):
        branch(tmp_path / "two", tmp_path / "run" / "checkpoint-4", OptimConfig(**WARM, lr_scheduler="cosine"), 8)
    with pytest.raises(ValueError, match=r"learning_rate was 0\.01, now 0\.02"):
        branch(tmp_path / "three", tmp_path / "run" / "checkpoint-4", cooled(4, learning_rate=2e-2), 8)


def test_more_steps_of_a_schedule_that_follows_them_are_a_warning(tmp_path, caplog) -> None:
    linear = OptimConfig(learning_rate=1e-2, lr_scheduler="linear")
    toy_trainer(tmp_path, optim=linear, max_train_steps=4).fit(source())
    toy_trainer(tmp_path, optim=linear, max_train_steps=8, resume_from_checkpoint="latest")
    assert "learning rate was 0 in" in caplog.text
    assert "the schedule has 0.005 there: it follows --max_train_steps" in caplog.text


class Staged(ToyObjective):
    """With a curriculum: a stage for every three steps."""

    def stage(self, progress: Progress) -> int:
        return progress.step // 3


def test_a_cooldown_over_a_change_of_stage_is_told(tmp_path, caplog) -> None:
    constant_run(tmp_path / "run", objective=Staged())
    assert "curriculum" not in caplog.text
    with pytest.raises(
        ValueError, match=r"last stage at step 6, .* falling since step 4.*--lr_cooldown_steps 2, or a checkpoint from"
    ):
        branch(tmp_path / "b", tmp_path / "run" / "checkpoint-4", cooled(4), 8, objective=Staged())
    toy_trainer(tmp_path / "s", objective=Staged(), optim=cooled(4), max_train_steps=8)
    assert caplog.records[-1].levelno == logging.WARNING
    assert "Give at most --lr_cooldown_steps 2, or fewer stages." in caplog.text


def test_the_stages_of_doubled_grids_are_known(caplog) -> None:
    """2310.14189: from 10 to 160 in 5 stages of 400 of 2,000 steps."""

    class Doubled:
        def stage(self, progress: Progress) -> int:
            return doubling_intervals(progress, 10, 160)

    check_stages(Doubled(), [400], 2000, True)
    with pytest.raises(ValueError, match="last stage at step 1600"):
        check_stages(Doubled(), [401], 2000, True)


def test_shapes_of_the_cooldown_in_closed_form() -> None:
    half = {"1-sqrt": 1 - 0.5**0.5, "linear": 0.5, "cosine": 0.5}
    quarter = {"1-sqrt": 0.5, "linear": 0.75, "cosine": (1 + 0.5**0.5) / 2}
    for shape in half:
        assert [wsd_factor(n, 2, 4, 10, shape) for n in (0, 1, 2, 6)] == [0, 0.5, 1, 1]
        assert wsd_factor(8, 2, 4, 10, shape) == pytest.approx(half[shape])
        assert wsd_factor(7, 2, 4, 10, shape) == pytest.approx(quarter[shape])
        assert wsd_factor(10, 2, 4, 10, shape) == wsd_factor(11, 2, 4, 10, shape) == pytest.approx(0, abs=1e-15)
    with pytest.raises(ValueError, match="--lr_cooldown_shape has no effect without --lr_cooldown_steps"):
        toy_trainer("unused", optim=cooled(0, "linear"))


def test_a_run_keeps_its_command_without_what_is_private(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.args").write_text("--seed 3\n--branch_steps 1 2\n--w_max 4\n")
    words = [
        "--recipe",
        str(tmp_path / "a.args"),
        "--hub-token",
        "hf_secret",
        "--push_to_hub",
        "--output_dir=x",
        "--w_max",
        "6",
    ]
    monkeypatch.setattr(sys, "argv", ["/somewhere/training/distill_lcm.py", *words])
    expected = ["distill_lcm.py", "--seed", "3", "--w_max", "4", "--w_max", "6"]
    assert command_line() == expected
    toy_trainer(tmp_path / "run").fit(source())
    (tmp_path / "scripts").mkdir()
    with pytest.raises(
        ValueError, match=r"made by distill_lcm.py, which is not in .*scripts: start that script itself"
    ):
        command_of(tmp_path / "run" / "checkpoint-4", tmp_path / "scripts")
    (tmp_path / "scripts" / "distill_lcm.py").touch()
    assert command_of(tmp_path / "run" / "checkpoint-4", tmp_path / "scripts") == expected
    assert "hf_secret" not in (tmp_path / "run" / "run.json").read_text()
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    del content["command"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"does not tell how the run of .*checkpoint-4 was started"):
        command_of(tmp_path / "run" / "checkpoint-4", tmp_path / "scripts")
