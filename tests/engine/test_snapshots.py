"""Raw weights that a run keeps on its way, and checkpoints that stay to branch from."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_unet
from toys import assert_same, source, tensors, toy_networks, toy_trainer

from cm_diffusers.engine.checkpoints import list_checkpoints
from cm_diffusers.engine.snapshots import Kept, list_weights, weights_within, write_weights
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.models.adapters import add_lora
from cm_diffusers.models.families.unet import LCM_LORA_TARGETS


def steps(run: Path) -> list[int]:
    return [one.step for one in list_weights(run)]


def test_raw_weights_are_kept_every_few_steps_of_a_window(tmp_path) -> None:
    raw = {}

    def look(trainer, loss) -> None:
        raw[trainer.step] = {name: value.clone() for name, value in trainer.student.state_dict().items()}

    settings = {"max_train_steps": 12, "export_ema_decay": 0.9, "snapshot_steps": 2, "snapshot_window": [4, 11]}
    toy_trainer(tmp_path, callbacks=[look], **settings).fit(source())
    assert steps(tmp_path) == [4, 6, 8, 10]
    for step, path in list_weights(tmp_path):
        assert_same(load_file(path), raw[step])
    assert weights_within(tmp_path, [5, 8]) == [
        Kept(n, tmp_path / f"snapshots/step-{n}/student.safetensors") for n in (6, 8)
    ]
    with pytest.raises(ValueError, match="keeps no weights between steps 11 and 12; it has those of 4 to 10"):
        weights_within(tmp_path, [11, 12])
    with pytest.raises(ValueError, match="train with --snapshot_steps"):
        weights_within(tmp_path / "other", None)


def test_nothing_is_kept_unless_asked_for(tmp_path) -> None:
    toy_trainer(tmp_path).fit(source())
    assert not (tmp_path / "snapshots").exists()


def test_going_back_takes_later_weights_along(tmp_path) -> None:
    settings = {"max_train_steps": 6, "checkpointing_steps": 2, "snapshot_steps": 1}
    trainer = toy_trainer(tmp_path, **settings)
    trainer.fit(source())
    trainer.end()
    before = {step: load_file(path) for step, path in list_weights(tmp_path)}
    trainer = toy_trainer(
        tmp_path, toy_networks(9), resume_from_checkpoint="checkpoint-2", **settings | {"snapshot_steps": 2}
    )
    trainer.fit(source())
    trainer.end()
    assert steps(tmp_path) == [1, 2, 4, 6]
    assert steps(tmp_path / "later-1") == [3, 4, 5, 6]
    for step, path in list_weights(tmp_path):
        assert_same(load_file(path), before[step])
    (tmp_path / "notes.txt").write_text("the user's")
    again = toy_trainer(tmp_path, overwrite_output_dir=True, max_train_steps=2)
    again.fit(source())
    again.end()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "notes.txt", "run.json"]


def test_of_a_lora_its_adapters_alone_are_kept(tmp_path) -> None:
    student = add_lora(tiny_unet(), 4, 4.0, 0.0, LCM_LORA_TARGETS)
    write_weights(tmp_path, 1, student)
    kept = load_file(list_weights(tmp_path)[0].path)
    assert kept
    assert all("lora_" in name for name in kept)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"snapshot_window": [1, 2]}, "--snapshot_window has no effect without --snapshot_steps"),
        ({"snapshot_steps": 1, "snapshot_window": [3]}, "--snapshot_window is a first and a last step, but it is 3"),
        ({"snapshot_steps": 1, "snapshot_window": [3, 2]}, "the first not above the last"),
        ({"snapshot_steps": 5, "max_train_steps": 4}, "--snapshot_steps 5 keeps nothing of the steps 1 to 4"),
        ({"snapshot_steps": 5, "snapshot_window": [6, 9]}, "keeps nothing of the steps 6 to 9"),
    ],
)
def test_what_would_keep_nothing_is_refused(wrong, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        TrainConfig(**wrong)


def test_checkpoints_to_branch_from_stay(tmp_path) -> None:
    settings = {"max_train_steps": 9, "checkpointing_steps": 2, "checkpoints_total_limit": 1, "branch_steps": [3, 4]}
    toy_trainer(tmp_path / "run", **settings).fit(source())
    names = [path.name for path in list_checkpoints(tmp_path / "run")]
    assert names == ["checkpoint-3", "checkpoint-4", "checkpoint-9"]
    whole = {"checkpointing_steps": 1}
    toy_trainer(tmp_path / "all", **settings | whole | {"checkpoints_total_limit": None}).fit(source())
    for name in names:
        assert_same(tensors(tmp_path / "run" / name), tensors(tmp_path / "all" / name))
    (tmp_path / "run" / "checkpoint-3" / "state.json").write_text("cut sh")
    resumed = toy_trainer(
        tmp_path / "run", resume_from_checkpoint="latest", **settings | {"max_train_steps": 11, "branch_steps": [4]}
    )
    resumed.fit(source())
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-11"]
    assert torch.isfinite(resumed.student[0].weight).all()
