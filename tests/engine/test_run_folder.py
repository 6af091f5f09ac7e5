"""The folder of a run: what a start may find in it, what it replaces, and that no file of the user is touched."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from toys import ToyObjective, assert_same, forget_accelerate, source, tensors, toy_networks, toy_trainer

from cm_diffusers.engine import checkpoints
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.own_files import RESULTS, is_run_file
from cm_diffusers.engine.run_folder import refuse_inputs_inside
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.publishing.folders import written_aside


OTHER = {"optim": OptimConfig(learning_rate=3e-2)}


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


def finished(folder: Path, **config) -> Path:
    """A run with a result, and with files of the user beside it and inside."""
    trainer = toy_trainer(folder, ema_sigma_rels=[0.1], **config)
    trainer.fit(source())
    for name in ("samples/step-000004.png", "pipeline/model_index.json", "pipeline/unet/config.json"):
        write(folder / name, "ours")
    for name in USERS:
        write(folder / name, "the user's")
    trainer.end()
    return folder


USERS = (
    "notes.txt",
    "pictures/step-000004.png",
    "pictures/checkpoint-4/state.json",
    "samples/best.png",
    "pipeline/notes.txt",
    "checkpoint-4/why.txt",
    "checkpoint-old/state.json",
    "other/run.json",
    "rewards.txt",
    ".replaced-mine/checkpoint-4/state.json",
)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Failing(ToyObjective):
    """Ends in an error at a step."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.at = at

    def __call__(self, nets, batch, progress):
        if progress.step == self.at:
            raise RuntimeError("no memory")
        return super().__call__(nets, batch, progress)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_folder_that_is_no_run_s_is_refused(tmp_path, overwrite, resume) -> None:
    write(tmp_path / "precious.txt", "x")
    with pytest.raises(ValueError, match=r"such as precious\.txt, but no run\.json.*give another folder"):
        toy_trainer(tmp_path, overwrite_output_dir=overwrite, resume_from_checkpoint=resume)
    assert content(tmp_path) == {"precious.txt": b"x"}


@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_finished_run_is_kept_unless_told_otherwise(tmp_path, resume) -> None:
    before = content(finished(tmp_path))
    if resume:
        for path in tmp_path.glob("checkpoint-[0-9]*/state.json"):
            before.pop(str(path.relative_to(tmp_path)))
            path.unlink()
    with pytest.raises(ValueError, match=r"already holds the files of another run.*--overwrite_output_dir"):
        toy_trainer(tmp_path, **OTHER, resume_from_checkpoint=resume)
    assert content(tmp_path) == before


@pytest.mark.parametrize("logs", ["cm_diffusers", "mine"])
def test_overwriting_replaces_what_a_run_writes_and_nothing_else(tmp_path, logs) -> None:
    folder = finished(tmp_path / "run", report_to="tensorboard", tracker_project_name=logs)
    old = set(content(folder)) - set(USERS)
    assert any(name.startswith(logs) for name in old)
    toy_trainer(tmp_path / "fresh", **OTHER).fit(source())
    again = toy_trainer(folder, **OTHER, overwrite_output_dir=True)
    assert set(content(folder)) == old | set(USERS)  # until training starts
    again.fit(source())
    set_aside = {f".replaced-1/{name}" for name in old}
    assert set_aside <= set(content(folder))
    again.end()
    mine = {"run.json", *(f"checkpoint-4/{name}" for name in content(tmp_path / "fresh" / "checkpoint-4"))}
    assert set(content(folder)) == mine | set(USERS)
    assert {(folder / name).read_text() for name in USERS} == {"the user's"}
    assert_same(tensors(folder / "checkpoint-4"), tensors(tmp_path / "fresh" / "checkpoint-4"))


def test_a_failure_before_the_first_checkpoint_brings_the_earlier_run_back(tmp_path) -> None:
    before = content(finished(tmp_path, report_to="tensorboard"))
    again = toy_trainer(tmp_path, objective=Failing(), overwrite_output_dir=True, report_to="tensorboard")
    with pytest.raises(RuntimeError, match="no memory"):
        again.fit(source())
    assert content(tmp_path) == before


@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_kill_between_averages_and_the_first_checkpoint_does_not_block_the_folder(tmp_path, resume) -> None:
    """A checkpoint's averages are there before it is."""
    flags = {"ema_sigma_rels": [0.1], "checkpointing_steps": 2}
    straight = toy_trainer(tmp_path / "straight", **flags)
    straight.fit(source())
    straight.end()
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    for left in ("checkpoint-2", "checkpoint-4", "averages/step-4"):
        shutil.rmtree(tmp_path / "killed" / left)
    again = toy_trainer(tmp_path / "killed", **flags, resume_from_checkpoint=resume)
    again.fit(source())
    again.end()
    assert content(tmp_path / "killed").keys() == content(tmp_path / "straight").keys()
    for part in ("checkpoint-4", "averages/step-2", "averages/step-4"):
        assert_same(tensors(tmp_path / "killed" / part), tensors(tmp_path / "straight" / part))


def test_averages_of_several_steps_are_not_replaced_unasked(tmp_path) -> None:
    """Somebody may have removed the checkpoints, and want to choose from them."""
    finished(tmp_path, checkpointing_steps=2)
    for left in ("checkpoint-2", "checkpoint-4", "pipeline", "samples"):
        shutil.rmtree(tmp_path / left)
    with pytest.raises(ValueError, match="already holds the files of another run, such as averages"):
        toy_trainer(tmp_path, ema_sigma_rels=[0.1], checkpointing_steps=2)


def test_a_failure_later_keeps_the_earlier_run_until_the_resumed_one_has_ended(tmp_path) -> None:
    first = toy_trainer(tmp_path)
    first.fit(source())
    first.end()
    old = tensors(tmp_path / "checkpoint-4")
    with pytest.raises(RuntimeError, match="no memory"):
        toy_trainer(tmp_path, objective=Failing(3), overwrite_output_dir=True, checkpointing_steps=2, seed=1).fit(
            source()
        )
    assert_same(tensors(tmp_path / ".replaced-1" / "checkpoint-4"), old)
    again = toy_trainer(tmp_path, objective=Failing(9), resume_from_checkpoint="latest", seed=1)
    assert again.step == 2
    again.fit(source())
    again.end()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-4", "run.json"]


@pytest.mark.parametrize("link", ["folder", "checkpoint", "result"])
def test_overwriting_acts_through_links(tmp_path, link) -> None:
    real, run = tmp_path / "real", tmp_path / "run"
    first = toy_trainer(real, toy_networks(5))
    first.fit(source())
    first.end()
    write(real / "pipeline" / "model_index.json", "old")
    if link == "folder":
        run.symlink_to(real)
    else:
        run.mkdir()
        name = {"checkpoint": "checkpoint-4", "result": "pipeline"}[link]
        os.replace(real / "run.json", run / "run.json")
        (run / name).symlink_to(real / name)
    toy_trainer(tmp_path / "fresh", max_train_steps=2).fit(source())
    again = toy_trainer(run, max_train_steps=2, overwrite_output_dir=True)
    again.fit(source())
    again.end()
    assert checkpoints.find_checkpoint(run, "latest").name == "checkpoint-2"
    assert_same(tensors(run / "checkpoint-2"), tensors(tmp_path / "fresh" / "checkpoint-2"))
    assert sorted(os.listdir(run)) == ["checkpoint-2", "run.json"]
    if link != "folder":  # what a link leads to is not the run's
        assert (real / "checkpoint-4" / "state.json").is_file()
        assert (real / "pipeline" / "model_index.json").is_file()


def test_a_run_taken_up_in_another_folder_does_not_mix_with_what_is_there(tmp_path) -> None:
    toy_trainer(tmp_path / "run", checkpointing_steps=2).fit(source())
    there = content(finished(tmp_path / "there", seed=1, max_train_steps=6, checkpointing_steps=3))
    moved = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-2")}
    with pytest.raises(ValueError, match="already holds the files of another run"):
        toy_trainer(tmp_path / "there", **moved)
    again = toy_trainer(tmp_path / "there", **moved, overwrite_output_dir=True)
    assert content(tmp_path / "there") == there
    again.fit(source())
    again.end()
    assert checkpoints.find_checkpoint(tmp_path / "there", "latest").name == "checkpoint-4"
    assert_same(tensors(tmp_path / "there" / "checkpoint-4"), tensors(tmp_path / "run" / "checkpoint-4"))


def test_a_link_to_nothing_and_a_file_are_refused(tmp_path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    write(tmp_path / "file", "x")
    for name, words in {"link": "is a link to .*gone, which is not there", "file": "is a file: give a folder"}.items():
        with pytest.raises(ValueError, match=words):
            toy_trainer(tmp_path / name, overwrite_output_dir=True)


@pytest.mark.parametrize("place", [".", "deep/down"])
def test_the_working_directory_is_not_overwritten(tmp_path, monkeypatch, place) -> None:
    before = content(finished(tmp_path))
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / place)
    with pytest.raises(ValueError, match="the working directory lies in it: give another --output_dir"):
        toy_trainer(tmp_path, overwrite_output_dir=True)
    assert content(tmp_path) == before


def test_inputs_in_the_folder_are_refused_and_outputs_are_not(tmp_path) -> None:
    config = TrainConfig(output_dir=str(tmp_path), resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    refuse_inputs_inside(str(tmp_path), [config])
    (tmp_path.parent / "link").symlink_to(tmp_path)
    config.tracker_project_name = str(tmp_path.parent / "link" / "pictures")
    with pytest.raises(ValueError, match=r"--tracker_project_name .*pictures lies in it"):
        refuse_inputs_inside(str(tmp_path), [config])


def test_nothing_is_written_before_training_starts(tmp_path) -> None:
    toy_trainer(tmp_path / "run", report_to="tensorboard")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_failed_start_does_not_block_the_next(tmp_path, caplog, resume) -> None:
    with pytest.raises(RuntimeError, match="no memory"):
        toy_trainer(tmp_path, objective=Failing(1), report_to="tensorboard").fit(source())
    write(tmp_path / "samples" / "step-000001.png", "of the run that failed")
    write(tmp_path / "notes.txt", "the user's")
    again = toy_trainer(tmp_path, **OTHER, resume_from_checkpoint=resume)
    again.fit(source())
    again.end()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4", "notes.txt", "run.json"]


def test_latest_on_a_first_start_begins_and_says_so(tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    trainer = toy_trainer(tmp_path / "run", resume_from_checkpoint="latest")
    assert trainer.step == 0
    assert [r.message for r in caplog.records if "latest" in r.message] == [
        f"--resume_from_checkpoint latest: {tmp_path / 'run'} has no checkpoint, so training starts afresh."
    ]
    trainer.fit(source())
    assert toy_trainer(tmp_path / "run", resume_from_checkpoint="latest").step == 4


def test_a_checkpoint_with_a_file_of_the_user_is_not_pruned(tmp_path) -> None:
    def note(trainer, loss) -> None:
        if trainer.step == 1:
            write(tmp_path / "checkpoint-1" / "notes.txt", "x")

    toy_trainer(tmp_path, callbacks=[note], checkpointing_steps=1, checkpoints_total_limit=1).fit(source())
    kept = {name: tensors(tmp_path / name) for name in os.listdir(tmp_path) if name.startswith("checkpoint")}
    assert sorted(kept) == ["checkpoint-1", "checkpoint-4"]
    assert all(kept.values())


def test_pruning_leaves_folders_that_are_no_checkpoints(tmp_path) -> None:
    write(tmp_path / "checkpoint-0" / "mine.txt", "x")
    toy_trainer(tmp_path / "elsewhere").fit(source())
    checkpoints.write_checkpoint(tmp_path, 3, {"student": {"a": torch.ones(1)}}, {})
    checkpoints.write_checkpoint(tmp_path, 4, {"student": {"a": torch.ones(1)}}, {})
    checkpoints.prune_checkpoints(tmp_path, 1)
    assert {"checkpoint-0", "checkpoint-4"} <= set(os.listdir(tmp_path))
    assert not (tmp_path / "checkpoint-3").exists()


def test_a_result_replaces_an_earlier_one_and_keeps_the_user_s_files(tmp_path) -> None:
    for name in ("model_index.json", "unet/config.json", "notes.txt", "drafts/a.safetensors", "unet/notes.md"):
        write(tmp_path / "pipeline" / name, "old")
    with written_aside(tmp_path / "pipeline") as aside:
        write(aside / "cm_diffusers.json", "new")
    users = dict.fromkeys(("notes.txt", "drafts/a.safetensors", "unet/notes.md"), b"old")
    assert content(tmp_path / "pipeline") == users | {"cm_diffusers.json": b"new"}
    assert os.listdir(tmp_path) == ["pipeline"]


def test_a_result_behind_a_link_is_replaced_there(tmp_path) -> None:
    write(tmp_path / "disk" / "big" / "model_index.json", "old")
    (tmp_path / "pipeline").symlink_to(tmp_path / "disk" / "big")
    for text in ("new", "newer"):
        with written_aside(tmp_path / "pipeline") as aside:
            write(aside / "model_index.json", text)
    assert content(tmp_path / "disk") == {"big/model_index.json": b"newer"}
    assert (tmp_path / "pipeline").is_symlink()


def test_own_files_are_listed_by_name() -> None:
    ours = ["checkpoint-3/state.json", "checkpoint-3/optimizer-student.safetensors", "averages/step-2/0.1.safetensors"]
    ours += ["rewards.json", "rewards.png", "metrics.json", "log/events.out.tfevents.1.x", "log/17.2/hparams.yml"]
    ours += ["samples/step-000500.png", ".checkpoint-3.partial/state.json", *(f"{name}/README.md" for name in RESULTS)]
    users = ["a.txt", "checkpoint-3/a.txt", "checkpoint-x/state.json", "samples/a.png", "pipeline/a.txt", "log/a.txt"]
    users += ["runs/checkpoint-3/state.json", "other/events.out.tfevents.1.x", "pipeline/unet/a.png", "pipeline"]
    assert [name for name in ours if not is_run_file(name, "log")] == []
    assert [name for name in users if is_run_file(name, "log")] == []
