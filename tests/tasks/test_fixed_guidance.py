"""A full student with guidance in its weights: distilled, shared in one file, read again and tuned from there."""

from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from scripts import data_flags, image_folder, run_script
from tiny import tiny_pipeline

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.record import read_record


STEPS = {"max_train_steps": 1, "checkpointing_steps": 10}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A student of guidance scale 7.5 in `runs/fixed`."""
    home = tmp_path_factory.mktemp("fixed")
    tiny_pipeline().save_pretrained(home / "teacher")
    image_folder(home / "images")
    distilled = {
        "pretrained_teacher_model": home / "teacher",
        "unet_time_cond_proj_dim": 0,
        "w_min": 6.5,
        "w_max": 6.5,
    }
    data = data_flags(home / "images", home / "cache")
    run_script("distill_lcm", output_dir=home / "runs" / "fixed", **distilled, **data, **STEPS)
    return home


def test_the_teacher_s_pipeline_samples_it(home) -> None:
    folder = home / "runs" / "fixed" / "pipeline"
    record, pipe = read_record(folder), DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is StableDiffusionPipeline
    assert pipe.unet.config.time_cond_proj_dim is None
    assert (record.guidance, record.w_min, record.w_max, record.recommended_guidance_scale) == (
        "distilled",
        6.5,
        6.5,
        1,
    )
    assert "Guidance (`guidance_scale` 7.5) is in the weights: sample with `guidance_scale` 1." in card(folder)


def test_it_is_shared_in_one_file_and_tuned_from_there(home) -> None:
    folder = home / "runs" / "fixed" / "pipeline"
    run_script("share", folder=folder, single_file=True, single_file_fp16=True)
    file = folder / "single_file" / "fixed.safetensors"
    assert f"`single_file/{file.name}` as the checkpoint, with the sampler `lcm`, 4 steps and CFG 1." in card(folder)
    single = {"pretrained_student_model": file, "single_file_config": home / "teacher"}
    data = data_flags(home / "images", home / "cache")
    run_script("finetune_lcf", output_dir=home / "runs" / "tuned", lora=True, lora_rank=2, **single, **data, **STEPS)
    tuned = home / "runs" / "tuned" / "lora"
    assert read_record(tuned).base_model == "../../fixed/pipeline/single_file/fixed.safetensors"
    assert read_record(tuned).guidance == "distilled"
    pipe = ConsistencyPipeline.from_pretrained(tuned, config=str(home / "teacher"))
    assert len(pipe("a bag", num_inference_steps=1).images) == 1


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()
