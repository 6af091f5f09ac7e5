"""`distill_scd.py` on text-to-image teachers: full students and LoRAs, told their guidance or with it in their weights."""

from pathlib import Path

import pytest
from scripts import data_flags, image_folder, run_script
from tiny import tiny_pipeline
from tiny_xl import tiny_xl_pipeline

from cm_diffusers.record import read_record


STEPS = {"max_train_steps": 2, "checkpointing_steps": 1, "learning_rate": 1e-2, "tangent_warmup_steps": 1}
LEVELS = {"sigma_min": 0.03, "sigma_max": 14.5, "recommended_sigmas": [14.5, 1.0]}
EMBEDDED = {"w_min": 1.0, "w_max": 5.0, "unet_time_cond_proj_dim": 16}
BAKED = {"w_min": 3.0, "w_max": 3.0}
LORA = {"lora": True, "lora_rank": 2, "lora_alpha": 4.0, "lora_dropout": 0.5}
KINDS = {"embedded": EMBEDDED, "baked": BAKED, "lora": BAKED | LORA}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("scd")
    image_folder(home / "data")
    tiny_pipeline().save_pretrained(home / "teacher")
    tiny_xl_pipeline().save_pretrained(home / "xl")
    return home


def distil(home: Path, name: str, teacher: str = "teacher", **values: object) -> Path:
    data = data_flags(home / "data", home / "cache" / teacher)
    run_script(
        "distill_scd",
        **data | STEPS | LEVELS | {"pretrained_teacher_model": home / teacher, "output_dir": home / name} | values,
    )
    return home / name


@pytest.mark.parametrize("kind", KINDS)
def test_x(home, kind):
    run = distil(home, kind, **KINDS[kind])
    print(read_record(run / ("lora" if kind == "lora" else "pipeline")))
