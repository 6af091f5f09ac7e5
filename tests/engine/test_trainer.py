"""The training loop on networks of a few numbers: what arrives in the weights, and what a checkpoint brings back."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_unet
from torch import nn
from toys import (
    ToyConfig,
    ToyObjective,
    assert_same,
    forget_accelerate,
    rows,
    source,
    tensors,
    toy_network,
    toy_networks,
    toy_trainer,
    weights,
)

from cm_diffusers.diffusion.views import EDMView
from cm_diffusers.engine import checkpoints
from cm_diffusers.engine.optimizers import OptimConfig, RAdam
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.models.adapters import WithoutAdapters, add_lora
from cm_diffusers.objectives.ct import CTConfig, CTObjective
from cm_diffusers.types import Batch, Loss, Networks


EVERYTHING = {
    "gradient_accumulation_steps": 2,
    "ema_decay": 0.9,
    "export_ema_decay": 0.9,
    "checkpointing_steps": 2,
}


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


@pytest.fixture
def rich_optim() -> OptimConfig:
    return OptimConfig(
        learning_rate=1e-2, adam_weight_decay=0.1, lr_scheduler="wsd", lr_warmup_steps=1, lr_cooldown_steps=2
    )


def record(trainer, steps: int, batches=None) -> list[Loss]:
    stream = (batches or source())(0)
    return [trainer.training_step(stream)[0] for _ in range(steps)]


def first_moment_norm(trainer) -> float:
    state = trainer.players[0].optimizer.state_dict()["state"]
    return torch.stack([entry["exp_avg"].norm() for entry in state.values()]).norm().item()


def test_micro_batches_add_up_to_the_batch(tmp_path) -> None:
    optim = OptimConfig(learning_rate=1e-2, adam_epsilon=1e-3)
    whole = toy_trainer(tmp_path / "whole", optim=optim)
    parts = toy_trainer(tmp_path / "parts", optim=optim, gradient_accumulation_steps=2)
    for one, two in zip(record(whole, 3, source(8)), record(parts, 3, source(4)), strict=True):
        torch.testing.assert_close(one.value, two.value, rtol=1e-6, atol=0)
        torch.testing.assert_close(one.logs["student/grad_norm"], two.logs["student/grad_norm"], rtol=1e-5, atol=0)
    torch.testing.assert_close(weights(whole.student), weights(parts.student), rtol=1e-5, atol=1e-7)


class Drawing:
    """Two players; keeps a number that each draws in its turn, and one that the source drew."""

    config = ToyConfig()

    def __init__(self) -> None:
        self.drawn = {"source": [], "student": [], "critic": []}
        self.players = {name: partial(self.play, name) for name in ("student", "critic")}

    def play(self, name: str, nets: Networks, batch, progress) -> Loss:
        self.drawn[name].append(torch.rand(()).item())
        return Loss(getattr(nets, name)(batch.x0).square().mean(), {"drawn": batch.x0[0, 0]})

    def source(self, start: int):
        while True:
            self.drawn["source"].append(torch.rand(()).item())
            yield Batch(torch.randn(4, 4))


def drawn_by(folder: Path, rank: int, monkeypatch: pytest.MonkeyPatch, **config) -> dict[str, list[float]]:
    objective = Drawing()
    trainer = toy_trainer(folder, Networks(toy_network(0), critic=toy_network(1)), objective, **config)
    monkeypatch.setattr(type(trainer.accelerator), "process_index", property(lambda _: rank))
    trainer.fit(objective.source)
    return objective.drawn


def test_ranks_players_steps_and_sources_draw_numbers_of_their_own(tmp_path, monkeypatch) -> None:
    ranks = [drawn_by(tmp_path / str(rank), rank, monkeypatch) for rank in (0, 1)]
    numbers = [number for drawn in ranks for of_one in drawn.values() for number in of_one]
    assert len(numbers) == len(set(numbers)) == 2 * 3 * 4
    assert drawn_by(tmp_path / "again", 1, monkeypatch) == ranks[1]


def test_a_source_that_samples_repeats_after_a_resume(tmp_path, monkeypatch) -> None:
    config = {"checkpointing_steps": 2}
    whole = drawn_by(tmp_path / "whole", 0, monkeypatch, **config)
    torch.rand(7)  # whatever else happens between
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    rest = drawn_by(tmp_path / "rest", 0, monkeypatch, resume_from_checkpoint=checkpoint, **config)
    assert rest == {name: numbers[2:] for name, numbers in whole.items()}
    assert_same(tensors(tmp_path / "rest" / "checkpoint-4"), tensors(tmp_path / "whole" / "checkpoint-4"))


def test_logs_are_means_over_micro_batches(tmp_path) -> None:
    trainer = toy_trainer(tmp_path, gradient_accumulation_steps=2)
    loss = record(trainer, 1)[0]
    expected = (rows(0, 1).x0[0, 0] + rows(4, 5).x0[0, 0]) / 2
    torch.testing.assert_close(loss.logs["first"], expected)


@pytest.mark.parametrize("limit", [1e-3, math.inf])
def test_gradients_are_clipped_to_the_norm(tmp_path, limit) -> None:
    trainer = toy_trainer(tmp_path, optim=OptimConfig(max_grad_norm=limit))
    norm = record(trainer, 1)[0].logs["student/grad_norm"].item()
    assert norm > 0.1, "the log holds the norm before clipping"
    assert first_moment_norm(trainer) == pytest.approx(0.1 * min(norm, limit), rel=1e-3)  # (1 - beta1) * gradient


@pytest.mark.parametrize(
    ("optim", "factors"),
    [
        (OptimConfig(lr_warmup_steps=4), [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
        (
            OptimConfig(lr_scheduler="wsd", lr_warmup_steps=2, lr_cooldown_steps=4),
            [0, 0.5, 1, 1, 1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)],
        ),
        (OptimConfig(lr_scheduler="constant"), [1] * 8),
    ],
    ids=["warmup", "wsd", "constant"],
)
def test_the_schedule_arrives_in_the_optimizer(tmp_path, optim, factors) -> None:
    trainer = toy_trainer(
        tmp_path, optim=replace(optim, learning_rate=0.1), max_train_steps=8, gradient_accumulation_steps=2
    )
    used = []
    optimizer = trainer.players[0].optimizer.optimizer
    optimizer.register_step_pre_hook(lambda opt, *_: used.append(opt.param_groups[0]["lr"]))
    logged = [loss.logs["student/learning_rate"].item() for loss in record(trainer, 8)]
    assert used == pytest.approx([0.1 * factor for factor in factors])
    assert logged == pytest.approx(used)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr_cooldown_steps": 1}, "acts with --lr_scheduler wsd"),
        ({"lr_scheduler": "wsd", "lr_warmup_steps": 3, "lr_cooldown_steps": 2}, "more than the 4 steps"),
    ],
)
def test_impossible_schedules_are_refused(tmp_path, settings, words) -> None:
    with pytest.raises(ValueError, match=words):
        toy_trainer(tmp_path, optim=OptimConfig(**settings))


def test_moving_averages_are_exact(tmp_path) -> None:
    trainer = toy_trainer(tmp_path, ema_decay=0.7, export_ema_decay=0.25)
    target = exported = [value.double() for value in weights(trainer.student)]
    for step in range(1, 4):
        record(trainer, 1)
        live = [value.double() for value in weights(trainer.student)]
        rate = min(0.25, (1 + step) / (10 + step))
        target = [0.7 * a + 0.3 * b for a, b in zip(target, live, strict=True)]
        exported = [rate * a + (1 - rate) * b for a, b in zip(exported, live, strict=True)]
    torch.testing.assert_close([v.double() for v in weights(trainer.nets.target)], target, rtol=1e-6, atol=1e-7)
    average = [value.double() for value in trainer.averages.state()["export_ema"].values()]
    torch.testing.assert_close(average, exported, rtol=1e-6, atol=1e-7)


def test_an_objective_may_set_the_target_s_rate_by_progress(tmp_path) -> None:
    class Hurried(ToyObjective):
        def target_decay(self, progress):
            return progress.step / progress.max_steps

    trainer = toy_trainer(tmp_path, objective=Hurried(), ema_decay=0.7)
    target = [value.double() for value in weights(trainer.nets.target)]
    for rate in (0, 0.25, 0.5):
        record(trainer, 1)
        live = [value.double() for value in weights(trainer.student)]
        target = [rate * a + (1 - rate) * b for a, b in zip(target, live, strict=True)]
    torch.testing.assert_close([v.double() for v in weights(trainer.nets.target)], target, rtol=1e-6, atol=1e-7)


def test_exported_weights_are_the_average_and_leave_again(tmp_path) -> None:
    trainer = toy_trainer(tmp_path, export_ema_decay=0.9)
    record(trainer, 3)
    before, average = weights(trainer.student), [v.clone() for v in trainer.averages.state()["export_ema"].values()]
    with trainer.export_weights() as student:
        assert not student.training
        assert all(map(torch.equal, weights(student), average))
    assert trainer.student.training
    assert all(map(torch.equal, weights(trainer.student), before))
    assert not all(map(torch.equal, before, average))


class Duel:
    """Student and critic, each with its loss; looks at both at the start of every turn."""

    config = ToyConfig()

    def __init__(self) -> None:
        self.seen, self.players = [], {"student": self.student, "critic": self.critic}

    def look(self, nets: Networks, name: str) -> None:
        flags = {n: [p.requires_grad for p in getattr(nets, n).parameters()] for n in self.players}
        self.seen.append((name, flags, {n: weights(getattr(nets, n)) for n in self.players}))

    def student(self, nets, batch, progress) -> Loss:
        self.look(nets, "student")
        return Loss(nets.critic(nets.student(batch.x0)).square().mean(), {})

    def critic(self, nets, batch, progress) -> Loss:
        self.look(nets, "critic")
        fake, real = nets.critic(nets.student(batch.x0)), nets.critic(batch.cond["goal"])
        return Loss((fake + 1).square().mean() + (real - 1).square().mean(), {})


def duel(folder: Path, **config):
    nets = Networks(toy_network(0), critic=toy_network(1))
    nets.student[0].requires_grad_(False)  # as the base weights under adapters
    optims = {
        "student": OptimConfig(learning_rate=1e-2, max_grad_norm=1e-3),
        "critic": OptimConfig(learning_rate=3e-2, optimizer="radam", max_grad_norm=math.inf),
    }
    return toy_trainer(folder, nets, Duel(), optims, **config)


def test_players_take_turns(tmp_path) -> None:
    trainer = duel(tmp_path)
    nets, grads = trainer.nets, []
    for player, other in zip(trainer.players, ("critic", "student"), strict=True):
        see = lambda *_, other=other: grads.append([p.grad for p in getattr(nets, other).parameters()])  # noqa: E731
        player.optimizer.optimizer.register_step_pre_hook(see)
    record(trainer, 2)
    assert grads == [[None] * 4] * 4
    turns = trainer.objective.seen
    assert [name for name, *_ in turns] == ["student", "critic"] * 2
    for name, flags, _ in turns:
        assert flags == {
            "student": [False, False, name == "student", name == "student"],
            "critic": [name == "critic"] * 4,
        }
    for (name, _, before), (_, _, after) in pairwise(turns):
        other = {"student": "critic", "critic": "student"}[name]
        assert all(map(torch.equal, before[other], after[other])), f"{name}'s turn changed the {other}"
        assert not torch.equal(before[name][-1], after[name][-1])
    assert all(map(torch.equal, weights(nets.student)[:2], weights(toy_network(0))[:2]))
    assert [p.requires_grad for p in nets.student.parameters()] == [False, False, True, True]
    assert all(p.requires_grad for p in nets.critic.parameters())


def test_players_have_their_own_optimizers(tmp_path) -> None:
    trainer = duel(tmp_path)
    logs = record(trainer, 1)[0].logs
    assert logs["student/learning_rate"].item() == pytest.approx(1e-2)
    assert logs["critic/learning_rate"].item() == pytest.approx(3e-2)
    kinds = [type(player.optimizer.optimizer) for player in trainer.players]
    assert kinds == [torch.optim.AdamW, RAdam]
    assert first_moment_norm(trainer) == pytest.approx(1e-4, rel=1e-3)


def test_a_checkpoint_restores_both_players(tmp_path) -> None:
    duel(tmp_path / "whole", checkpointing_steps=2).fit(source())
    again = duel(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.step == 2
    again.fit(source())
    expected = tensors(tmp_path / "whole" / "checkpoint-4")
    assert {name.split("/")[0] for name in expected} == {"student", "critic", "optimizer-student", "optimizer-critic"}
    assert not any(name.startswith("student/0.") for name in expected), "frozen weights are not in the checkpoint"
    assert_same(tensors(tmp_path / "resumed" / "checkpoint-4"), expected)


def test_a_player_that_cannot_learn_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="The student has no trainable parameter"):
        toy_trainer(tmp_path, Networks(toy_network().requires_grad_(False)))


def test_logs_reach_tensorboard(tmp_path) -> None:
    losses = []
    trainer = toy_trainer(
        tmp_path, callbacks=[lambda _, loss: losses.append(loss)], report_to="tensorboard", logging_steps=2
    )
    trainer.fit(source())
    trainer.accelerator.end_training()
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents.*")).parent)).Reload()
    assert {"loss", "first", "student/grad_norm", "student/learning_rate", "images_per_second"} <= set(
        events.Tags()["scalars"]
    )
    for name, values in {"loss": [x.value for x in losses], "first": [x.logs["first"] for x in losses]}.items():
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx({2: values[1].item(), 4: values[3].item()})


def test_only_the_newest_checkpoints_are_kept(tmp_path) -> None:
    trainer = toy_trainer(tmp_path, checkpointing_steps=1, checkpoints_total_limit=2)
    trainer.fit(source())
    trainer.end()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4", "run.json"]


@pytest.mark.parametrize("optimizer", ["adamw", "radam"])
def test_resume_is_bit_exact(tmp_path, rich_optim, optimizer) -> None:
    optim, starts = replace(rich_optim, optimizer=optimizer), []

    def noted(start: int):
        starts.append(start)
        return source()(start)

    toy_trainer(tmp_path / "whole", toy_networks(0, dropout=0.5), optim=optim, **EVERYTHING).fit(noted)
    again = toy_trainer(
        tmp_path / "resumed",
        toy_networks(9, dropout=0.5),  # everything that matters is in the checkpoint
        optim=optim,
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"),
        **EVERYTHING,
    )
    torch.rand(7)  # nor does the state of the global generator matter
    again.fit(noted)
    assert starts == [0, 4]
    expected = tensors(tmp_path / "whole" / "checkpoint-4")
    assert {name.split("/")[0] for name in expected} == {"student", "target", "export_ema", "optimizer-student"}
    assert_same(tensors(tmp_path / "resumed" / "checkpoint-4"), expected)
    states = [
        json.loads((tmp_path / name / "checkpoint-4" / "state.json").read_text()) for name in ("whole", "resumed")
    ]
    assert states[0] == states[1]


def test_dropout_differs_between_steps_and_seeds(tmp_path) -> None:
    """Otherwise the bit-exact resume would prove nothing about the generator."""
    frozen = {"optim": OptimConfig(learning_rate=0.0)}
    runs = [toy_trainer(tmp_path / str(s), toy_networks(0, 0.5), **frozen, seed=s, ema_decay=1.0) for s in (0, 1)]
    same_batch = lambda start: iter([rows(0, 4)] * 3)  # noqa: E731
    values = [loss.value.item() for run in runs for loss in record(run, 3, same_batch)]
    assert len(set(values)) == 6


@pytest.mark.parametrize("form", ["latest", "checkpoint-3", "path"])
def test_ways_to_name_a_checkpoint(tmp_path, form) -> None:
    toy_trainer(tmp_path, max_train_steps=3, checkpointing_steps=1).fit(source())
    name = str(tmp_path / "checkpoint-3") if form == "path" else form
    again = toy_trainer(tmp_path, toy_networks(9), resume_from_checkpoint=name)
    assert again.step == 3
    assert_same({f"student/{k}": v for k, v in again.student.state_dict().items()},
                {k: v for k, v in tensors(tmp_path / "checkpoint-3").items() if k.startswith("student/")})  # fmt: skip


def test_the_latest_checkpoint_has_the_greatest_number(tmp_path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", ".checkpoint-11.partial", "checkpoint-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    (tmp_path / "checkpoint-12").mkdir()  # of the user, or half deleted
    assert checkpoints.find_checkpoint(tmp_path, "latest").name == "checkpoint-10"


def test_resume_with_other_settings_is_refused(tmp_path) -> None:
    toy_trainer(tmp_path).fit(source())
    optim, objective = OptimConfig(learning_rate=0.5), ToyObjective(ToyConfig(pull=0.1))
    with pytest.raises(ValueError, match="other settings") as caught:
        toy_trainer(tmp_path, optim=optim, objective=objective, resume_from_checkpoint="latest", seed=3)
    sentence = "(pull was 0.5, now 0.1, seed was 0, now 3, student/learning_rate was 0.01, now 0.5)"
    assert sentence in str(caught.value)


def test_a_longer_run_may_continue_a_shorter_one(tmp_path) -> None:
    toy_trainer(tmp_path, max_train_steps=2).fit(source())
    toy_trainer(tmp_path, max_train_steps=3, resume_from_checkpoint="latest").fit(source())
    assert checkpoints.find_checkpoint(tmp_path, "latest").name == "checkpoint-3"


def test_a_missing_checkpoint_is_answered_with_what_there_is(tmp_path) -> None:
    toy_trainer(tmp_path, checkpointing_steps=2).fit(source())
    with pytest.raises(ValueError, match=r"checkpoint-3: no such checkpoint; .* holds: checkpoint-2, checkpoint-4"):
        toy_trainer(tmp_path, resume_from_checkpoint="checkpoint-3")
    with pytest.raises(ValueError, match=r"is not a checkpoint: there is no state\.json in it"):
        toy_trainer(tmp_path, resume_from_checkpoint=str(tmp_path))


def test_a_run_is_not_resumed_past_its_end(tmp_path) -> None:
    toy_trainer(tmp_path).fit(source())
    with pytest.raises(ValueError, match=r"--max_train_steps 3 is less than the 4 of .*checkpoint-4: give more"):
        toy_trainer(tmp_path, max_train_steps=3, resume_from_checkpoint="latest")
    assert toy_trainer(tmp_path, resume_from_checkpoint="latest").step == 4


@pytest.mark.parametrize(
    "name",
    [
        "max_train_steps",
        "gradient_accumulation_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "logging_steps",
    ],
)
def test_counts_are_positive(name) -> None:
    with pytest.raises(ValueError, match=f"--{name} must be at least 1, but it is 0"):
        TrainConfig(**{name: 0})


@pytest.mark.parametrize("settings", [{"learning_rate": -1e-4}, {"max_grad_norm": 0.0}])
def test_optimizer_settings_are_in_range(settings) -> None:
    with pytest.raises(
        ValueError, match=f"--{next(iter(settings))} must be .*, but it is {next(iter(settings.values()))}"
    ):
        OptimConfig(**settings)


class Diverging(ToyObjective):
    """Not finite at the fourth step."""

    def __call__(self, nets, batch, progress) -> Loss:
        value, logs = super().__call__(nets, batch, progress)
        return Loss(value * float("nan") if progress.step == 3 else value, logs)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path) -> None:
    trainer, seen = toy_trainer(tmp_path, objective=Diverging(), checkpointing_steps=2), []
    trainer.callbacks.append(lambda t, _: seen.append(weights(t.student)))
    with pytest.raises(FloatingPointError, match=r"step 3: the student's loss is nan.*checkpoint-2; try a lower"):
        trainer.fit(source())
    assert all(map(torch.equal, weights(trainer.student), seen[-1]))
    again = toy_trainer(tmp_path, toy_networks(9), Diverging(), resume_from_checkpoint="latest")
    assert all(map(torch.equal, weights(again.student), seen[1]))


def learnt(trainer) -> dict[str, torch.Tensor]:
    """Whatever a step changes: weights, target, averages and moments."""
    state = trainer.players[0].optimizer.state_dict()["state"]
    moments = {f"{i}/{name}": value for i, named in state.items() for name, value in named.items() if name != "step"}
    named = {"student": trainer.student.state_dict(), "target": trainer.nets.target.state_dict(), "moments": moments}
    named |= trainer.averages.state()
    return {f"{part}/{name}": value.clone() for part, values in named.items() for name, value in values.items()}


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "radam"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_told_at_the_next_look(tmp_path, optimizer, bad) -> None:
    class Stumbling(ToyObjective):
        def __call__(self, nets, batch, progress) -> Loss:
            value, logs = super().__call__(nets, batch, progress)
            return Loss(value * float("inf") if progress.step == bad else value, logs)

    optim = OptimConfig(learning_rate=1e-2, adam_weight_decay=0.1, optimizer=optimizer)
    averages = {"ema_decay": 0.5, "export_ema_decay": 0.5, "ema_sigma_rels": [0.1]}
    trainer, stream = toy_trainer(tmp_path, objective=Stumbling(), optim=optim, **averages), source()(0)
    for step in range(4):
        before = learnt(trainer)
        trainer.training_step(stream)
        after = learnt(trainer)
        if step == bad:
            assert_same({name: after[name] for name in before}, before)
            assert not any(after[name].any() for name in after.keys() - before.keys()), "moments begin at 0"
        else:
            assert not any(torch.equal(after[name], value) for name, value in before.items() if "/step" not in name)
    with pytest.raises(
        FloatingPointError, match=rf"step {bad}: the student's loss is inf, its .*; 1 step was skipped"
    ):
        trainer.looks.check()


def test_nothing_is_written_before_it_was_looked_at(tmp_path) -> None:
    trainer = toy_trainer(tmp_path, objective=Diverging(), max_train_steps=9, checkpointing_steps=5, logging_steps=100)
    with pytest.raises(FloatingPointError, match=r"step 3: .* none yet"):
        trainer.fit(source())
    assert trainer.step == 5
    assert checkpoints.list_checkpoints(tmp_path) == []


def test_several_processes_stop_at_a_look(tmp_path, monkeypatch) -> None:
    def ask(trainer, loss) -> None:
        if trainer.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = toy_trainer(tmp_path, callbacks=[ask], max_train_steps=9, logging_steps=3)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda _: 2))
    with pytest.raises(SystemExit, match="Stopped by a signal at step 3"):
        trainer.fit(source())
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-3"]


class Noting:
    """A source that notes when it is asked, and for which step."""

    def __init__(self, trainer) -> None:
        self.trainer, self.asked = trainer, []

    def __call__(self, start: int):
        for k, batch in enumerate(source()(start), start):
            self.asked.append((k, self.trainer.step))
            yield batch


class Keeping(Noting):
    """One with a state."""

    def state(self) -> dict[str, torch.Tensor]:
        return {"asked": torch.tensor(self.asked)}


@pytest.mark.parametrize("kind", [Noting, Keeping])
def test_batches_are_made_ahead_but_not_of_a_source_with_a_state(tmp_path, kind) -> None:
    """Nor before a checkpoint, here that of step 2, nor beyond the end."""
    trainer, seen = toy_trainer(tmp_path, checkpointing_steps=2), []
    batches = kind(trainer)
    trainer.steering.append(lambda trainer, loss: seen.append(len(batches.asked)))
    trainer.fit(batches)
    assert batches.asked == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert seen == ([2, 2, 4, 4] if kind is Noting else [1, 2, 3, 4])


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_mixed_precision_is_the_one_asked_for(tmp_path, precision, dtype) -> None:
    seen = []

    class Looking(ToyObjective):
        def __call__(self, nets, batch, progress) -> Loss:
            enabled = torch.is_autocast_enabled("cpu")
            seen.append((enabled, torch.get_autocast_dtype("cpu") if enabled else None, (batch.x0 @ batch.x0.T).dtype))
            return super().__call__(nets, batch, progress)

    trainer = toy_trainer(tmp_path, objective=Looking(), mixed_precision=precision)
    record(trainer, 1)
    assert seen == [(True, torch.bfloat16, dtype) if precision == "bf16" else (False, None, dtype)]
    assert {value.dtype for value in weights(trainer.student) + weights(trainer.nets.target)} == {torch.float32}
    state = trainer.players[0].optimizer.state_dict()["state"]
    assert {entry["exp_avg"].dtype for entry in state.values()} == {torch.float32}


@pytest.mark.parametrize("asked", [True, False])
def test_gradient_checkpointing_reaches_the_student(tmp_path, asked) -> None:
    trainer = toy_trainer(tmp_path, Networks(tiny_unet(), teacher=tiny_unet()), gradient_checkpointing=asked)
    assert trainer.student.is_gradient_checkpointing is asked
    assert not trainer.nets.teacher.is_gradient_checkpointing


@pytest.mark.parametrize("asked", [True, False])
def test_compile_reaches_every_network(tmp_path, monkeypatch, asked) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    nets = toy_networks()
    toy_trainer(tmp_path, nets, compile=asked)
    assert compiled == ([nets.student, nets.target] if asked else [])


def test_repeated_blocks_are_compiled_where_there_are_some(tmp_path, monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None}
    toy_trainer(tmp_path, Networks(tiny_unet(), teacher=tiny_unet(**plain)), compile=True)
    assert compiled == ["BasicTransformerBlock"] * 4 + ["UNet2DConditionModel"]
    compiled.clear()
    student = add_lora(tiny_unet(), 2, 2.0, 0.0)
    toy_trainer(tmp_path, Networks(student, teacher=WithoutAdapters(student)), compile=True)
    assert compiled == ["BasicTransformerBlock"] * 4, "the teacher in a LoRA student is that student"


def image_trainer(folder: Path, **config):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    torch.manual_seed(0)
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 8), norm_num_groups=4, add_attention=False, **blocks)
    return toy_trainer(folder, Networks(unet), CTObjective(CTConfig(), EDMView(0.5, "adm")), **config)


def pixels(start: int):
    for k in count(start):
        yield Batch(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(k)))


def test_channels_last_is_a_matter_of_memory(tmp_path) -> None:
    """The same training but for rounding; a resume is bit-exact, with moments where the weights are."""
    runs = [image_trainer(tmp_path / str(last), channels_last=last, checkpointing_steps=2) for last in (False, True)]
    for trainer in runs:
        trainer.fit(pixels)
    weight = runs[1].student.down_blocks[0].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    torch.testing.assert_close(weights(runs[1].student), weights(runs[0].student), rtol=1e-3, atol=1e-4)
    checkpoint = str(tmp_path / "True" / "checkpoint-2")
    image_trainer(tmp_path / "resumed", channels_last=True, resume_from_checkpoint=checkpoint).fit(pixels)
    assert_same(tensors(tmp_path / "resumed" / "checkpoint-4"), tensors(tmp_path / "True" / "checkpoint-4"))


def test_channels_last_without_convolutions_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="--channels_last is for networks of convolutions, which Sequential is not"):
        toy_trainer(tmp_path, channels_last=True)


def test_a_second_signal_ends_the_run_at_once(tmp_path) -> None:
    def twice(trainer, loss) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        toy_trainer(tmp_path, callbacks=[twice]).fit(source())
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoints.list_checkpoints(tmp_path) == []


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """Folders of runs that signals ended in other processes, and their exit codes."""
    folder = tmp_path_factory.mktemp("interrupted")
    worker = [sys.executable, str(Path(__file__).parents[1] / "interrupted_worker.py"), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # threads do not survive a fork
    done = subprocess.run(worker, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Stopped by a signal at step 3; continue with --resume_from_checkpoint latest") == 2
    return folder, json.loads(done.stdout)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_stopped_run_continues_as_if_nothing_had_been(tmp_path, interrupted, name) -> None:
    folder, codes = interrupted
    assert codes[name] == 1
    assert checkpoints.find_checkpoint(folder / name, "latest").name == "checkpoint-3"
    toy_trainer(folder / name, toy_networks(9), resume_from_checkpoint="latest", max_train_steps=6).fit(source())
    toy_trainer(tmp_path, max_train_steps=6).fit(source())
    assert_same(tensors(folder / name / "checkpoint-6"), tensors(tmp_path / "checkpoint-6"))


def test_a_run_killed_while_saving_has_its_last_checkpoint(tmp_path, interrupted) -> None:
    folder, codes = interrupted
    assert codes["SIGKILL"] == -signal.SIGKILL
    assert len(list((folder / "SIGKILL").glob(".checkpoint-4.*.partial"))) == 1
    again = toy_trainer(folder / "SIGKILL", toy_networks(9), resume_from_checkpoint="latest", checkpointing_steps=2)
    assert again.step == 2
    again.fit(source())
    toy_trainer(tmp_path).fit(source())
    assert_same(tensors(folder / "SIGKILL" / "checkpoint-4"), tensors(tmp_path / "checkpoint-4"))
    again.end()
    assert sorted(os.listdir(folder / "SIGKILL")) == ["checkpoint-2", "checkpoint-4", "run.json"]


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.is_wandb_available", lambda: False)
    with (
        pytest.warns(UserWarning, match="no supported trackers"),
        pytest.raises(ValueError, match=r"pip install .cm_diffusers\[wandb\]"),
    ):
        toy_trainer(tmp_path, report_to="wandb")
