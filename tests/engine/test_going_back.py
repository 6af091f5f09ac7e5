"""A run that goes back to an earlier checkpoint, one that is in use, and what only shows how it goes."""

import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from toys import assert_same, forget_accelerate, source, tensors, toy_networks, toy_trainer

from cm_diffusers.engine import interrupts, own_files
from cm_diffusers.engine.checkpoints import list_checkpoints
from cm_diffusers.engine.own_files import set_later_aside


SETTINGS = {"max_train_steps": 6, "checkpointing_steps": 2, "ema_sigma_rels": [0.1]}


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


@pytest.fixture
def run(tmp_path) -> Path:
    trainer = toy_trainer(tmp_path / "run", **SETTINGS)
    trainer.fit(source())
    for step in (2, 4, 6):
        (tmp_path / "run" / "samples").mkdir(exist_ok=True)
        (tmp_path / "run" / "samples" / f"step-{step:06d}.png").touch()
    trainer.end()
    return tmp_path / "run"


def test_going_back_sets_later_steps_aside(run, caplog) -> None:
    before = {name: tensors(run / name) for name in ("checkpoint-4", "checkpoint-6", "averages/step-6")}
    trainer = toy_trainer(run, toy_networks(9), resume_from_checkpoint="checkpoint-2", **SETTINGS)
    assert names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]  # until training starts
    seen = []
    trainer.callbacks.append(lambda trainer, loss: seen.append((trainer.step, names(run)[-1])))
    trainer.fit(source())
    trainer.end()
    assert seen == [(3, "checkpoint-2"), (4, "checkpoint-4"), (5, "checkpoint-4"), (6, "checkpoint-6")]
    assert f"steps after 2 is kept in {run / 'later-1'}" in caplog.text
    assert sorted(os.listdir(run)) == ["averages", "checkpoint-2", "checkpoint-4", "checkpoint-6", "later-1", "run.json", "samples"]  # fmt: skip
    assert os.listdir(run / "samples") == ["step-000002.png"]
    assert sorted(os.listdir(run / "later-1" / "samples")) == ["step-000004.png", "step-000006.png"]
    for name, expected in before.items():
        assert_same(tensors(run / name), expected)  # the same run again
        assert_same(tensors(run / "later-1" / name), expected)


@pytest.mark.parametrize("moves", range(6))
def test_a_kill_while_later_steps_are_set_aside_leaves_what_belongs_together(run, monkeypatch, moves) -> None:
    """So many of the six have been moved: averages, a picture and a checkpoint of two steps."""
    replace, left = os.replace, iter(range(moves))

    def killed(source: Path, goal: Path) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        replace(source, goal)

    monkeypatch.setattr(own_files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        set_later_aside(run, 2)
    monkeypatch.undo()
    newest = int(names(run)[-1].rpartition("-")[2])
    for step in range(2, newest, 2):
        assert (run / f"averages/step-{step}").is_dir()
        assert (run / f"samples/step-{step:06}.png").is_file()
    gone = [step for step in (4, 6) if step > newest]
    assert not [path for step in gone for path in run.glob(f"*/step-*{step}*") if path.parts[-3] == run.name]
    assert len(list(run.glob("later-1/*/*step-*")) + list(run.glob("later-1/checkpoint-*"))) == moves


def test_the_checkpoint_just_written_is_never_pruned(run) -> None:
    limited = SETTINGS | {"checkpoints_total_limit": 1}
    trainer = toy_trainer(run, resume_from_checkpoint="checkpoint-2", **limited | {"max_train_steps": 4})
    trainer.fit(source())
    trainer.end()
    assert names(run) == ["checkpoint-4"]
    assert names(run / "later-1") == ["checkpoint-4", "checkpoint-6"]
    assert toy_trainer(run, resume_from_checkpoint="latest", **limited).step == 4


def test_overwriting_takes_what_was_set_aside_as_well(run) -> None:
    trainer = toy_trainer(run, resume_from_checkpoint="checkpoint-2", **SETTINGS)
    trainer.fit(source())
    trainer.end()
    (run / "later-1" / "notes.txt").write_text("the user's")
    with pytest.raises(ValueError, match="already holds the files of another run"):
        toy_trainer(run, **SETTINGS)
    again = toy_trainer(run, overwrite_output_dir=True, max_train_steps=2)
    again.fit(source())
    again.end()
    assert sorted(os.listdir(run)) == ["checkpoint-2", "later-1", "run.json"]
    assert os.listdir(run / "later-1") == ["notes.txt"]


HOLDER = """
import fcntl, os, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print(os.getpid(), "a-host", file=file, end="", flush=True)
print("held", flush=True)
time.sleep(600)
"""


def test_a_folder_in_use_is_refused_until_the_process_has_ended(run, caplog) -> None:
    command = [sys.executable, "-S", "-c", HOLDER, str(run / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        options = [{"resume_from_checkpoint": name} for name in ("latest", "checkpoint-2", str(run / "checkpoint-2"))]
        for option in [*options, {"overwrite_output_dir": True}]:
            with pytest.raises(ValueError, match=rf"run is in use by process {process.pid} on a-host: wait until"):
                toy_trainer(run, **SETTINGS, **option)
        process.kill()
    assert (run / ".lock").exists()
    trainer = toy_trainer(run, **SETTINGS, resume_from_checkpoint="latest")  # the lock has died with it
    trainer.end()
    assert ".lock" not in os.listdir(run)


def test_a_folder_is_locked_while_a_run_writes_into_it(tmp_path) -> None:
    seen = []
    trainer = toy_trainer(tmp_path, callbacks=[lambda trainer, loss: seen.append((tmp_path / ".lock").read_text())])
    trainer.fit(source())
    assert seen == [f"{os.getpid()} {socket.gethostname()}"] * 4
    with (tmp_path / ".lock").open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    trainer.end()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4", "run.json"]


def test_a_run_that_began_meanwhile_is_not_mixed_with(tmp_path) -> None:
    late = toy_trainer(tmp_path, seed=1)
    first = toy_trainer(tmp_path)
    first.fit(source())
    first.end()
    with pytest.raises(ValueError, match="already holds the files of another run"):
        late.fit(source())
    assert names(tmp_path) == ["checkpoint-4"]


def test_ranks_whose_launcher_is_gone_end_after_the_step(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(interrupts, "LAUNCHER", os.getppid())
    trainer = toy_trainer(tmp_path)
    trainer.steering.append(lambda t, loss: monkeypatch.setattr(interrupts, "LAUNCHER", -1) if t.step == 2 else None)
    with pytest.raises(
        SystemExit, match="Stopped without a launcher at step 2; continue with --resume_from_checkpoint"
    ):
        trainer.fit(source())
    assert names(tmp_path) == ["checkpoint-2"]
    assert ".lock" not in os.listdir(tmp_path)


def failing(trainer, loss) -> None:
    with trainer.export_weights():
        raise RuntimeError("CUDA out of memory.\nTried to allocate")


def test_what_only_shows_a_run_may_fail(tmp_path, caplog) -> None:
    settings = {"checkpointing_steps": 2, "export_ema_decay": 0.9}
    toy_trainer(tmp_path / "plain", toy_networks(0, 0.5), **settings).fit(source())
    saved = []
    callbacks = [failing, lambda trainer, loss: saved.append(names(tmp_path / "run"))]
    toy_trainer(tmp_path / "run", toy_networks(0, 0.5), callbacks=callbacks, **settings).fit(source())
    assert saved == [[], ["checkpoint-2"], ["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]  # saved before it shows
    assert "What shows step 2 failed, and training goes on: RuntimeError: CUDA out of memory." in caplog.text
    for name in ("checkpoint-2", "checkpoint-4"):
        assert_same(tensors(tmp_path / "run" / name), tensors(tmp_path / "plain" / name))


def test_what_steers_a_run_may_not(tmp_path) -> None:
    trainer = toy_trainer(tmp_path, checkpointing_steps=1)
    trainer.steering.append(lambda t, loss: failing(t, loss) if t.step == 3 else None)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit(source())
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
