"""An early stop by a column of a small evaluation, and the weights that were best in place of the last."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from scripts import data_flags, image_folder, run_script
from tiny import tiny_pipeline
from toys import assert_same, forget_accelerate, source, toy_networks, toy_trainer

from cm_diffusers.engine.checkpoints import trainable_state
from cm_diffusers.publishing.provenance import read_provenance
from cm_diffusers.tasks.watching import Watch, WatchConfig


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


class Scripted:
    """A comparison whose columns are those of a list, look by look."""

    config = SimpleNamespace(num_inference_steps=[1, 2])

    def __init__(self, values: list[float], column: str = "fid") -> None:
        self.values, self.column, self.scales = iter(value for value in values for _ in range(2)), column, []

    def look(self, pipe, steps: int, guidance: float | None) -> dict:
        self.scales.append((steps, guidance))
        return {self.column: next(self.values) + 0.5 * (steps == 2) - 0.5 * (steps == 1)}


def pipeline_of(network) -> SimpleNamespace:
    network.dtype = next(network.parameters()).dtype
    return SimpleNamespace(unet=network, components={"unet": network})


def watched(folder: Path, values: list[float], column: str = "fid", patience: int = 2, nets=None, **settings):
    settings = {"max_train_steps": 12, "checkpointing_steps": 4, "export_ema_decay": 0.5} | settings
    trainer = toy_trainer(folder, nets, **settings)
    config = WatchConfig(stop_when=column, stop_evaluation="x", stop_interval=2, stop_patience=patience)
    comparison = Scripted(values, column)
    watch = Watch(config, comparison, pipeline_of, 3.0, trainer)
    trainer.steering.append(watch)
    return trainer, watch, comparison


def test_training_ends_when_the_column_gets_no_better_and_the_best_is_kept(tmp_path, caplog) -> None:
    trainer, watch, comparison = watched(tmp_path, [9.0, 5.0, 3.0, 4.0, 3.0, 1.0])
    exported = {}

    def remember(trainer, loss) -> None:
        with trainer.export_weights() as student:
            exported[trainer.step] = {name: value.clone() for name, value in trainable_state(student).items()}

    trainer.callbacks.append(remember)
    trainer.fit(source())
    assert trainer.step == 8
    assert (
        "Training ended at step 8 of 12: fid was 3 at step 4 and has not been better since, in 2 looks." in caplog.text
    )
    assert watch.looks == [{"step": n, "value": v} for n, v in zip((2, 4, 6, 8), (5, 3, 4, 3), strict=True)]
    assert comparison.scales == [(1, 3.0), (2, 3.0)] * 5  # one before training, which is not kept
    assert os.listdir(tmp_path / "best") == ["step-4"]
    assert_same(load_file(tmp_path / "best/step-4/student.safetensors"), exported[4])
    with watch.best_weights(trainer) as student:
        assert_same(dict(student.state_dict()), exported[4])
    with trainer.export_weights() as student:
        assert_same(dict(student.state_dict()), exported[8])
    told = {"column": "fid", "evaluation": {}, "scale": 3.0}
    assert json.loads((tmp_path / "watch.json").read_text()) == told | {"looks": watch.looks}
    assert (tmp_path / "watch.png").stat().st_size > 1000


def test_of_columns_that_shall_grow_more_is_better(tmp_path) -> None:
    trainer, watch, _ = watched(tmp_path, [0.1, 0.2, 0.5, 0.4, 0.6, float("nan"), 0.5], "coverage")
    trainer.fit(source())
    assert (trainer.step, watch.best["step"], watch.best["value"]) == (12, 8, pytest.approx(0.6))
    assert json.loads((tmp_path / "watch.json").read_text())["looks"][4] == {"step": 10, "value": None}


def test_a_resumed_run_knows_its_looks_and_repeats_the_straight_one(tmp_path) -> None:
    values = [5.0, 3.0, 4.0, 2.0, 2.5, 2.6]
    straight, one, _ = watched(tmp_path / "straight", [9.0, *values])
    straight.fit(source())
    first, _, _ = watched(tmp_path / "parts", [9.0, *values[:4]])

    def stop(trainer, loss) -> None:
        trainer.stopping = trainer.stopping or ("a break" if trainer.step == 7 else "")

    first.steering.append(stop)
    first.fit(source())  # looks at 2, 4, 6 and, for it ends there, 7
    first.end()
    trainer, two, _ = watched(
        tmp_path / "parts", values[2:], nets=toy_networks(9), resume_from_checkpoint="checkpoint-4"
    )
    assert two.looks == one.looks[:2]
    trainer.fit(source())
    assert two.looks == one.looks
    assert trainer.step == straight.step == 12
    assert sorted(os.listdir(tmp_path / "parts" / "best")) == ["step-4", "step-8"]  # that of checkpoint-4, too
    for name in ("straight", "parts"):
        assert (tmp_path / name / "best/step-8/student.safetensors").is_file()
    assert_same(*(load_file(tmp_path / name / "best/step-8/student.safetensors") for name in ("parts", "straight")))


def test_going_back_finds_what_was_best_then(tmp_path) -> None:
    """Of step 4, whose weights stay as long as checkpoint-4 does, though step 8 was better."""
    first, _, _ = watched(tmp_path, [9.0, 5.0, 3.0, 4.0, 2.0, 2.5, 2.6])
    first.fit(source())
    first.end()
    trainer, watch, _ = watched(tmp_path, [4.0, 5.0], resume_from_checkpoint="checkpoint-4")
    trainer.fit(source())
    assert (trainer.step, watch.best["step"]) == (8, 4)
    with watch.best_weights(trainer) as student:
        assert_same(dict(student.state_dict()), load_file(tmp_path / "best/step-4/student.safetensors"))
    again, known, _ = watched(tmp_path, [], resume_from_checkpoint="latest")
    again.fit(source())
    assert again.step == 8  # it has stopped, whatever broke off after that
    more, _, _ = watched(tmp_path, [1.0, 1.0], patience=3, resume_from_checkpoint="latest", max_train_steps=10)
    more.fit(source())
    assert more.step == 10


def test_looks_of_another_evaluation_do_not_count(tmp_path, caplog) -> None:
    first, _, _ = watched(tmp_path, [9.0, 5.0, 3.0], max_train_steps=4)
    first.fit(source())
    first.end()
    _, watch, _ = watched(tmp_path, [], "coverage", resume_from_checkpoint="latest", max_train_steps=4)
    assert watch.looks == []
    assert "do not count, for they were of another evaluation" in caplog.text


def test_images_that_are_no_numbers_are_the_worst(tmp_path) -> None:
    trainer, watch, comparison = watched(tmp_path, [9.0, 5.0, 3.0], max_train_steps=4)
    comparison.look = lambda pipe, steps, scale: None
    trainer.fit(source())
    assert [str(look["value"]) for look in watch.looks] == ["nan", "nan"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"stop_when": "fid"}, "--stop_when needs --stop_evaluation"),
        ({"stop_interval": 3}, "--stop_interval has no effect without --stop_when"),
        ({"stop_when": "beauty"}, "invalid choice: 'beauty'"),
        ({"stop_when": "fid", "stop_evaluation": "none.args"}, "--recipe none.args: there is no such file"),
    ],
)
def test_what_cannot_be_watched_is_told_first(tmp_path, flags, sentence) -> None:
    with pytest.raises(SystemExit, match=sentence):
        run_script("distill_lcm", pretrained_teacher_model="x", train_data_dir=str(tmp_path), **flags)


@pytest.mark.parametrize("kind", [{"unet_time_cond_proj_dim": 32}, {"lora": True, "lora_rank": 2, "lora_alpha": 2.0}])
def test_a_distillation_publishes_its_best_weights(tmp_path, kind) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "teacher")
    image_folder(tmp_path / "images", 14)
    (tmp_path / "small.args").write_text(
        f"--train_data_dir {tmp_path / 'images'} --num_inference_steps 1 2 --num_images 6 --eval_batch_size 6\n"
        "--feature_extractor assets/fashion_classifier"
    )
    where = {
        "pretrained_teacher_model": str(tmp_path / "teacher"),
        "output_dir": str(tmp_path / "run"),
    }
    data = data_flags(tmp_path / "images", tmp_path / "cache")
    settings = {"max_train_steps": 4, "num_ddim_timesteps": 20, "learning_rate": 1e-2, "snapshot_steps": 1}
    stop = {
        "stop_when": "coverage",
        "stop_evaluation": str(tmp_path / "small.args"),
        "stop_interval": 1,
        "stop_patience": 9,
    }
    grids = {"validation_prompts": ["a"], "validation_steps": 1, "validation_seeds": [0], "validation_nfe": [1]}
    run_script("distill_lcm", **where, **data, **settings, **kind, **stop, **grids, validation_teacher_steps=2)
    looks = json.loads((tmp_path / "run" / "watch.json").read_text())["looks"]
    assert [look["step"] for look in looks] == [1, 2, 3, 4]
    (folder,) = (tmp_path / "run" / name for name in ("pipeline", "lora") if (tmp_path / "run" / name).is_dir())
    found = read_provenance(folder).settings
    best = max(looks, key=lambda look: look["value"])
    assert found["published_step"] == best["step"]
    assert found["coverage_when_best"] == best["value"]
    shown = tmp_path / "run" / "samples" / f"step-{best['step']:06d}.png"
    assert (folder / "samples.png").read_bytes() == shown.read_bytes()
    kept = load_file(tmp_path / "run" / "best" / f"step-{best['step']}" / "student.safetensors")
    assert_same(kept, load_file(tmp_path / "run" / "snapshots" / f"step-{best['step']}" / "student.safetensors"))
    if folder.name == "pipeline":
        stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        assert_same({name: stored[name] for name in kept}, kept)
