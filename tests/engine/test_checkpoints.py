"""Checkpoints that are damaged, half written or have no room: one sentence, the one before, and nothing half left behind."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from toys import assert_same, forget_accelerate, source, tensors, toy_network, toy_networks, toy_trainer

from cm_diffusers.engine import checkpoints
from cm_diffusers.types import Networks


SETTINGS = {"checkpointing_steps": 2, "export_ema_decay": 0.9}


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer = toy_trainer(folder, **SETTINGS)
    trainer.fit(source())
    trainer.end()
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


def cut(name: str, size: int) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:size])

    return damage


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Of `state.json`; a release before this one wrote no list of files."""

    def damage(checkpoint: Path) -> None:
        state = json.loads((checkpoint / "state.json").read_text())
        state.pop("files")
        changed = change(state)
        (checkpoint / "state.json").write_text(json.dumps(state if changed is None else changed))

    return damage


def unlisted(damage: Callable[[Path], object]) -> Callable[[Path], None]:
    """The same in a checkpoint of an earlier release."""

    def both(checkpoint: Path) -> None:
        edit(lambda state: None)(checkpoint)
        damage(checkpoint)

    return both


def other_shapes(checkpoint: Path) -> None:
    save_file({name: torch.ones(3) for name in toy_network().state_dict()}, checkpoint / "target.safetensors")


DAMAGES = {
    "truncated": (cut("student.safetensors", 300), r"student\.safetensors is damaged: it has 300 bytes, not \d+"),
    "empty": (cut("optimizer-student.safetensors", 0), r"optimizer-student\.safetensors is damaged: it has 0 bytes"),
    "missing": (lambda c: (c / "target.safetensors").unlink(), r"target\.safetensors is damaged: it is not there"),
    "old, truncated": (unlisted(cut("student.safetensors", 300)), r"student\.safetensors is damaged: "),
    "old, header cut": (unlisted(cut("target.safetensors", 20)), r"target\.safetensors is damaged: "),
    "old, empty": (unlisted(cut("export_ema.safetensors", 0)), r"export_ema\.safetensors is damaged: "),
    "old, no student": (unlisted(lambda c: (c / "student.safetensors").unlink()), "'student' is missing in it"),
    "old, no target": (unlisted(lambda c: (c / "target.safetensors").unlink()), "'target' is missing in it"),
    "old, no average": (unlisted(lambda c: (c / "export_ema.safetensors").unlink()), "'export_ema' is missing in it"),
    "old, shapes": (unlisted(other_shapes), r"target\.safetensors is damaged: 0\.weight has the shape \(3,\), not \(8, 4\)"),
    "state empty": (cut("state.json", 0), r"state\.json is damaged: it is not the JSON that was written"),
    "state cut": (cut("state.json", 100), r"state\.json is damaged: it is not the JSON"),
    "state no text": (lambda c: (c / "state.json").write_bytes(b"\xff\xfe\x00"), r"state\.json is damaged"),
    "state a list": (edit(lambda state: [1, 2]), r"state\.json is damaged"),
    "state a number": (edit(lambda state: 3), r"state\.json is damaged"),
    "no step": (edit(lambda state: state.pop("step") and None), r"state\.json is damaged: step is missing"),
    "step no number": (edit(lambda state: state.update(step="x")), "checkpoint-4 is damaged: invalid literal"),
    "no identity": (edit(lambda state: state.pop("identity") and None), "identity is missing in it"),
    "no player": (edit(lambda state: state["players"].clear()), "'student' is missing in it"),
    "no schedule": (edit(lambda s: s["players"]["student"].pop("lr_scheduler") and None), "'lr_scheduler' is missing"),
    "no groups": (edit(lambda s: s["players"]["student"]["optimizer"].update(param_groups=[])), "is damaged: loaded state"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(copy, caplog, name) -> None:
    damage, words = DAMAGES[name]
    damage(copy / "checkpoint-4")
    trainer = toy_trainer(copy, toy_networks(9), resume_from_checkpoint="latest", **SETTINGS)
    assert trainer.step == 2
    said = [record.message for record in caplog.records if "damaged" in record.message]
    assert len(said) == 1
    assert f"Training goes on from the checkpoint before, {copy / 'checkpoint-2'}." in said[0]
    with pytest.raises(ValueError, match=rf"{words}.*; give another, or latest\.$") as caught:
        toy_trainer(copy, toy_networks(9), resume_from_checkpoint="checkpoint-4", **SETTINGS)
    assert str(copy / "checkpoint-4") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_follows_a_fall_back_is_the_same_run(copy, run) -> None:
    DAMAGES["truncated"][0](copy / "checkpoint-4")
    trainer = toy_trainer(copy, toy_networks(9), resume_from_checkpoint="latest", **SETTINGS)
    trainer.fit(source())
    trainer.end()
    assert_same(tensors(copy / "checkpoint-4"), tensors(run / "checkpoint-4"))
    assert (copy / "later-1" / "checkpoint-4" / "student.safetensors").stat().st_size == 300


def test_without_a_whole_checkpoint_a_resume_ends(copy) -> None:
    for name in ("checkpoint-2", "checkpoint-4"):
        DAMAGES["state empty"][0](copy / name)
    with pytest.raises(ValueError, match=r"checkpoint-2/state\.json is damaged.*no checkpoint before it is whole"):
        toy_trainer(copy, resume_from_checkpoint="latest", **SETTINGS)


def test_another_network_is_no_damage(copy) -> None:
    nets = Networks(torch.nn.Sequential(torch.nn.Linear(4, 4)), target=torch.nn.Sequential(torch.nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="belongs to another network: 4 parameters differ"):
        toy_trainer(copy, nets, resume_from_checkpoint="latest", **SETTINGS)


def test_a_checkpoint_without_a_list_of_files_loads(copy, run) -> None:
    edit(lambda state: None)(copy / "checkpoint-2")
    shutil.rmtree(copy / "checkpoint-4")
    toy_trainer(copy, toy_networks(9), resume_from_checkpoint="latest", **SETTINGS).fit(source())
    assert_same(tensors(copy / "checkpoint-4"), tensors(run / "checkpoint-4"))


@pytest.mark.parametrize("at", ["save_file", "fsync"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, at) -> None:
    original = {"save_file": checkpoints.save_file, "fsync": os.fsync}[at]

    def full(*arguments) -> None:
        if (tmp_path / "checkpoint-2").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(*arguments)

    monkeypatch.setattr(checkpoints if at == "save_file" else os, at, full)
    with pytest.raises(ValueError, match="cannot be written") as caught:
        toy_trainer(tmp_path, **SETTINGS).fit(source())
    assert str(caught.value) == (
        f"{tmp_path}/checkpoint-4 cannot be written: No space left on device (0.0 MiB are needed); make room; the last good "
        f"checkpoint is {tmp_path}/checkpoint-2."
    )
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "run.json"]


def test_an_error_inside_safetensors_is_such_a_sentence_as_well(tmp_path) -> None:
    checkpoints.write_checkpoint(tmp_path, 1, {"student": {"a": torch.ones(10)}}, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))  # bytes of a file
    try:
        with pytest.raises(
            ValueError, match=r"checkpoint-2 cannot be written: File too large \(0\.1 MiB are needed\)"
        ):
            checkpoints.write_checkpoint(tmp_path, 2, {"student": {"a": torch.ones(30_000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["checkpoint-1"]


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    with pytest.raises(ValueError, match=rf"run cannot be written: {tmp_path} is read-only; name another place"):
        toy_trainer(tmp_path / "run")


@pytest.mark.parametrize("begins", [True, False])
def test_a_full_disk_at_the_start_brings_nothing_down(copy, run, monkeypatch, begins) -> None:
    again = toy_trainer(copy, overwrite_output_dir=True, seed=1) if begins else None
    again = again or toy_trainer(copy, resume_from_checkpoint="checkpoint-2", **SETTINGS)

    def full(*arguments, **options) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ValueError, match=r"--output_dir .* cannot be written: No space left on device; make room"):
        again.fit(source())
    for name in ("checkpoint-2", "checkpoint-4"):
        assert_same(tensors(copy / name), tensors(run / name))


def test_leftovers_of_a_kill_are_cleared_and_what_was_replaced_returns(copy, run) -> None:
    os.replace(copy / "checkpoint-4", copy / ".checkpoint-4.replaced")  # a kill between two renames
    for name in (".checkpoint-4.0a1b2c3d.partial", ".checkpoint-1.0a1b2c3d.pruned", ".checkpoint-3.partial"):
        shutil.copytree(run / "checkpoint-2", copy / name)
    (copy / "samples").mkdir()
    (copy / "samples" / ".step-000002.png.partial").touch()
    (copy / ".notes.partial").touch()
    trainer = toy_trainer(copy, resume_from_checkpoint="latest", **SETTINGS)
    assert trainer.step == 4
    trainer.fit(source())
    trainer.end()
    assert sorted(os.listdir(copy)) == [".notes.partial", "checkpoint-2", "checkpoint-4", "run.json", "samples"]
    assert os.listdir(copy / "samples") == []
    assert_same(tensors(copy / "checkpoint-4"), tensors(run / "checkpoint-4"))


def test_two_that_write_do_not_share_a_partial_name(tmp_path, monkeypatch) -> None:
    names = []
    monkeypatch.setattr(checkpoints, "save_file", lambda tensors, path: names.append(path.parent.name))
    for _ in range(2):
        checkpoints.write_checkpoint(tmp_path, 1, {"student": {}}, {})
    assert len(set(names)) == 2
