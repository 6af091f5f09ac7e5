"""`distill_scd.py --dmd_weight`: a run with a fake score, of a model of images and of one that reads text."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from scripts import data_flags, image_folder, run_script
from tiny import tiny_pipeline
from toys import assert_same, tensors

from cm_diffusers import ConsistencyPipeline


IMAGES = {"train_batch_size": 2, "resolution": 8, "validation_images": 0, "sigma_max": 80.0, "report_to": "none"}
TEXT = {"sigma_max": 14.5, "recommended_sigmas": [14.5], "w_min": 1.0, "w_max": 5.0, "unet_time_cond_proj_dim": 16}
MATCHED = {
    "dmd_weight": 0.01,
    "sigma_min": 0.03,
    "tangent_warmup_steps": 1,
    "max_train_steps": 3,
    "checkpointing_steps": 1,
    "learning_rate": 1e-2,
    "dropout": 0.1,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("matched")
    image_folder(home / "data", 4)
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    torch.manual_seed(0)
    unet = UNet2DModel(8, 3, 3, **blocks, layers_per_block=1, norm_num_groups=4, add_attention=False)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(home / "images")
    tiny_pipeline().save_pretrained(home / "text")
    distil(home, "run")
    return home


def distil(home: Path, name: str, teacher: str = "images", **flags: object) -> Path:
    data = {"train_data_dir": home / "data"} | IMAGES
    if teacher == "text":
        data = data_flags(home / "data", home / "cache") | TEXT
    where = {"pretrained_teacher_model": home / teacher, "output_dir": home / name}
    run_script("distill_scd", **data | where | MATCHED | flags)
    return home / name


def test_resume_is_bit_exact_with_a_fake_score(home: Path) -> None:
    again = distil(home, "again", resume_from_checkpoint=home / "run" / "checkpoint-2")
    last = tensors(again / "checkpoint-3")
    assert_same(last, tensors(home / "run" / "checkpoint-3"))
    assert {name.partition("/")[0] for name in last} >= {"student", "critic", "optimizer-critic"}
    with pytest.raises(SystemExit, match=r"dmd_weight was 0.01, now 0.1"):
        distil(home, "other", resume_from_checkpoint=home / "run" / "checkpoint-2", dmd_weight=0.1)


def test_the_fake_score_begins_as_the_teacher_and_learns_once_the_tangent_is_warm(home: Path) -> None:
    teacher = UNet2DModel.from_pretrained(home / "images" / "unet", use_safetensors=True).state_dict()
    first, second = (tensors(home / "run" / f"checkpoint-{n}") for n in (1, 2))
    changed = [any(not torch.equal(t[f"critic/{k}"], v) for k, v in teacher.items()) for t in (first, second)]
    assert changed == [False, True]


def test_a_fake_score_that_is_the_teacher_changes_nothing(home: Path) -> None:
    """It is so in the first step with it; in the next it has learned."""
    plain = distil(home, "plain", dmd_weight=0.0)
    for step in (1, 2, 3):
        of_plain, of_run = (tensors(run / f"checkpoint-{step}") for run in (plain, home / "run"))
        assert not any(name.startswith("critic") for name in of_plain)
        student = [name for name in of_plain if name.startswith("student/")]
        assert all(torch.equal(of_plain[name], of_run[name]) for name in student) == (step < 3)


def test_the_student_alone_is_published(home: Path) -> None:
    pipe = ConsistencyPipeline.from_pretrained(home / "run" / "pipeline")
    assert pipe(output_type="pt").images.isfinite().all()
    assert {path.name for path in (home / "run" / "pipeline").iterdir() if path.is_dir()} == {"unet", "scheduler"}


def test_a_fake_score_is_told_the_guidance(home: Path) -> None:
    last = tensors(distil(home, "told", "text") / "checkpoint-3")
    assert last["critic/time_embedding.cond_proj.weight"].abs().max() > 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"lora": True}, "which --lora spares"),
        ({"segments": 2}, "with --segments 2 they end before"),
        ({"tangent_warmup_steps": 3}, "training ends at step 3"),
        ({"dmd_weight": -1.0}, "--dmd_weight must be at least 0"),
    ],
)
def test_wrong_input_ends_with_one_sentence(home: Path, flags: dict, sentence: str) -> None:
    with pytest.raises(SystemExit) as ended:
        distil(home, "wrong", **flags)
    assert str(ended.value).startswith("error: ")
    assert sentence in str(ended.value)
    assert "\n" not in str(ended.value)
    assert not (home / "wrong").exists()
