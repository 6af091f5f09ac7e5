"""`branch.py` on a run of `distill_lcm.py`: the straight runs with its schedules, in folders of their own, and one table."""

import json
import shutil
from pathlib import Path

import pytest
from scripts import data_flags, image_folder, run_script
from tiny import tiny_pipeline
from toys import assert_same, tensors


TRAIN = {
    "unet_time_cond_proj_dim": 32, "num_ddim_timesteps": 20, "learning_rate": 1e-2, "export_ema_decay": 0.5, "report_to": "none",
    "lr_warmup_steps": 1, "max_train_steps": 4, "checkpointing_steps": 4, "checkpoints_total_limit": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("branch")
    tiny_pipeline().save_pretrained(place / "teacher")
    image_folder(place / "images")
    own = {"branch_steps": [2], "snapshot_steps": 1, "snapshot_window": [1, 3]}
    run_script("distill_lcm", **flags(place, "trunk"), **own)
    return place


def flags(place: Path, name: str, **more) -> dict:
    where = {"pretrained_teacher_model": str(place / "teacher"), "output_dir": str(place / name)}
    return TRAIN | data_flags(place / "images", place / "cache") | where | more


def test_branches_are_straight_runs_and_stand_in_one_table(place, capfd) -> None:
    points = [place / "trunk" / f"checkpoint-{step}" for step in (2,)]
    before = [tensors(point) for point in points]
    (place / "evaluation.args").write_text(
        f"--train_data_dir {place / 'images'} --resolution 16 --num_inference_steps 1 --num_images 6 --guidance_scales 2\n"
        "--feature_extractor assets/fashion_classifier"
    )
    wanted = {"checkpoints": list(map(str, points)), "cooldown_steps": [2], "output_dir": str(place / "branches")}
    run_script("branch", **wanted, evaluation=str(place / "evaluation.args"))
    for step, cooldown, kept in zip((2,), (2,), before, strict=True):
        steps = {"max_train_steps": step + cooldown, "lr_scheduler": "wsd", "lr_cooldown_steps": cooldown}
        run_script("distill_lcm", **flags(place, f"straight-{step}", **steps))
        branch, straight = place / "branches" / f"trunk-{step}+{cooldown}", place / f"straight-{step}"
        last = f"checkpoint-{step + cooldown}"
        assert_same(tensors(branch / last), tensors(straight / last))
        assert_same(tensors(branch / "pipeline" / "unet"), tensors(straight / "pipeline" / "unet"))
        assert not (branch / "snapshots").exists()
        assert_same(tensors(place / "trunk" / f"checkpoint-{step}"), kept)
    rows = json.loads((place / "branches" / "evaluation" / "table.json").read_text())["rows"]
    assert [row["pipeline"] for row in rows[-1:]] == ["trunk-2+2"]
    assert str(place / "branches" / "trunk-2+2" / "pipeline") in capfd.readouterr().out


def test_a_finished_branch_stays_and_one_that_was_stopped_goes_on(place) -> None:
    wanted = {
        "checkpoints": [str(place / "trunk" / "checkpoint-2")],
        "cooldown_steps": [3],
        "output_dir": str(place / "again"),
    }
    run_script("branch", **wanted)
    branch = place / "again" / "trunk-2+3"
    expected = tensors(branch / "checkpoint-5")
    (branch / "pipeline" / "unet" / "note.txt").write_text("not trained again")
    run_script("branch", **wanted)
    assert (branch / "pipeline" / "unet" / "note.txt").exists()
    shutil.rmtree(branch / "pipeline")
    run_script("branch", **wanted)  # from its own last checkpoint
    assert_same(tensors(branch / "checkpoint-5"), expected)
    assert (branch / "pipeline" / "model_index.json").is_file()


def test_what_cannot_be_branched_is_told_before_anything_is_trained(place) -> None:
    first = str(place / "trunk" / "checkpoint-2")
    with pytest.raises(SystemExit, match="--cooldown_steps has 2 for 1 --checkpoints: give one, or one for each"):
        run_script("branch", checkpoints=[first], cooldown_steps=[1, 2], output_dir=str(place / "none"))
    with pytest.raises(
        SystemExit, match=r"does not tell how the run of .*checkpoint-9 was started|is not a checkpoint"
    ):
        run_script(
            "branch",
            checkpoints=[first, str(place / "trunk" / "checkpoint-9")],
            cooldown_steps=[1],
            output_dir=str(place / "none"),
        )
    with pytest.raises(SystemExit, match=r"--evaluation none\.args: there is no such file"):
        run_script(
            "branch", checkpoints=[first], cooldown_steps=[1], evaluation="none.args", output_dir=str(place / "none")
        )
    with pytest.raises(SystemExit, match="Two branches would be called alike, of trunk-2"):
        run_script("branch", checkpoints=[first, first], cooldown_steps=[1], output_dir=str(place / "none"))
    assert not (place / "none").exists()
