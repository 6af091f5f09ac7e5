"""Data that only a later part of a run would read is looked for before anything is loaded."""

import re

import datasets
import pytest
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from scripts import image_folder, run_script


TEACHER = {"pretrained_teacher_model": "teacher"}
MISSING = {
    "train_data_dir": r"--train_data_dir {0} is not a folder",
    "moving_articles": r"--moving_articles {0} is not a folder",
    "test_data_dir": r"--test_data_dir {0} is not a folder",
    "prompts_file": r"--prompts_file {0} must be a \.txt, .* but there is no such file",
    "train_shards_path_or_url": r"--train_shards_path_or_url {0} names 1 shards or patterns, of which 1 are not there",
}
CASES = [
    *(("distill_lcm", flag, TEACHER) for flag in ("train_data_dir", "train_shards_path_or_url", "prompts_file")),
    ("distill_cd", "train_data_dir", TEACHER),
    ("distill_scott", "train_data_dir", TEACHER),
    ("distill_animatelcm", "train_data_dir", TEACHER | {"stage": "joint"}),
    ("train_motion", "moving_articles", TEACHER),
    ("finetune_lcf", "train_data_dir", {"pretrained_student_model": "student"}),
    ("finetune_direct_reward", "train_data_dir", {"pretrained_student_model": "student", "rewards": "aesthetic"}),
    ("tune_ect", "train_data_dir", TEACHER),
    ("train_edm", "train_data_dir", {"unet_config": "unet.json"}),
    ("train_diffusion", "train_data_dir", {"pretrained_vae": "vae"}),
    ("train_flow", "train_data_dir", {"pretrained_pipeline": "base", "transformer_config": "flow.json"}),
    ("train_vae", "test_data_dir", {}),
    ("train_classifier", "test_data_dir", {}),
    ("evaluate", "train_data_dir", {"teacher": "teacher", "feature_extractor": "classifier"}),
    ("evaluate_video", "train_data_dir", {"teacher": "teacher", "feature_extractor": "classifier"}),
    ("rank_critics", "train_data_dir", {"pipeline": "student", "backbones": "dinov2"}),
]


@pytest.fixture
def nothing_loads(monkeypatch) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("loaded")

    for kind in (DiffusionPipeline, ModelMixin, AutoencoderKL):
        monkeypatch.setattr(kind, "from_pretrained", load)


@pytest.mark.parametrize(("name", "flag", "others"), CASES, ids=[f"{name} {flag}" for name, flag, _ in CASES])
def test_missing_data_is_found_first(name, flag, others, tmp_path, nothing_loads) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(SystemExit) as ended:
        run_script(name, **others, **{flag: absent}, output_dir=tmp_path / "run")
    assert re.match(f"error: {MISSING[flag].format(absent)}", str(ended.value.code))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "fault"),
    [("train_vae", r"None of the 1 images of .* in empty files: 1"), ("train_classifier", "no column named label")],
)
def test_test_images_are_read_before_training(name, fault, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("cm_diffusers.engine.trainer.Trainer.fit", lambda *_: pytest.fail("trained"))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.png").write_bytes(b"")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["bag"]))
    image = image_folder(tmp_path / "data", 1)
    (tmp_path / "train").mkdir()
    rows = datasets.Dataset.from_dict({"image": [str(image / "0.png")], "label": [0]}, features=features)
    rows.to_parquet(tmp_path / "train" / "rows.parquet")
    flags = {"train_data_dir": tmp_path / "train", "test_data_dir": tmp_path / "test", "resolution": 32}
    with pytest.raises(SystemExit) as ended:
        run_script(name, **flags, output_dir=tmp_path / "run", cache_dir=tmp_path / "hf")
    assert re.search(fault, ended.value.code)
    assert not (tmp_path / "run").exists()


def test_classes_without_names_are_one_sentence(tmp_path) -> None:
    data = image_folder(tmp_path / "data", label=[0, 1, 0, 1, 0, 1])
    flags = {"train_data_dir": data, "test_data_dir": data, "resolution": 32, "output_dir": tmp_path / "run"}
    with pytest.raises(
        SystemExit, match=r"--label_column label must be a ClassLabel with the classes' names, .* it is Value"
    ):
        run_script("train_classifier", **flags)
