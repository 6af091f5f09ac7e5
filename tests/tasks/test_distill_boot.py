"""`distill_boot.py` end to end on random pipelines: trained on prompts alone, published, sampled in one step and no other."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline, LCMScheduler
from scripts import run_script
from tiny import tiny_pipeline
from tiny_flow import tiny_sd3
from tiny_xl import tiny_xl_pipeline

from cm_diffusers import ConsistencyImg2ImgPipeline, ConsistencyPipeline
from cm_diffusers.evaluation.candidates import Candidate
from cm_diffusers.pipelines.stock import stock_entry
from cm_diffusers.record import RECORD, read_record
from cm_diffusers.tasks import summary


PROMPTS = ["a photo of a bag", "a coat", "an ankle boot"]
ONE_STEP = r"^This student makes its images in one step, which no other can follow: .* give 1, not {}\.$"
PORTABLE = Path(__file__).parents[2] / "pipelines" / "consistency_text_to_image.py"


def distil(home: Path, teacher: str, name: str, **values: object) -> Path:
    settings = {
        "pretrained_teacher_model": home / teacher,
        "prompts": PROMPTS,
        "resolution": 32,
        "train_batch_size": 2,
        "latent_cache_dir": home / "cache" / teacher,
        "num_ddim_timesteps": 10,
        "max_train_steps": 2,
        "checkpointing_steps": 2,
        "learning_rate": 1e-3,
        "output_dir": home / name,
    }
    run_script("distill_boot", **settings | values)
    return home / name


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("boot")
    teachers = {"sd": tiny_pipeline, "xl": tiny_xl_pipeline, "sd3": tiny_sd3}
    for name, make in teachers.items():
        make().save_pretrained(home / name)
    distil(home, "sd", "full", validation_prompts=PROMPTS[:1], validation_steps=2, validation_teacher_steps=2)
    return home


def drawn(pipe: DiffusionPipeline, **asked: object) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return pipe(PROMPTS[0], generator=generator, output_type="np", height=32, width=32, **asked).images


def test_the_record_says_one_step(home: Path) -> None:
    record = read_record(home / "full" / "pipeline")
    assert (record.method, record.one_step, record.recommended_num_inference_steps) == ("boot", True, 1)
    assert (record.guidance, record.w_min, record.w_max, record.resolution) == ("embedded", 2.0, 14.0, 32)
    card = (home / "full" / "pipeline" / "README.md").read_text()
    assert "Makes images in one step. It was distilled from" in card
    assert "after [BOOT](https://arxiv.org/abs/2306.05544), and trained on prompts alone." in card
    assert "It answers pure noise with its image, and nothing else" in card
    assert "num_inference_steps=1, guidance_scale=8.0, height=32, width=32" in card
    assert (home / "full" / "samples" / "step-000002.png").is_file()


def test_stock_diffusers_draws_the_same(home: Path) -> None:
    folder = home / "full" / "pipeline"
    stock, ours = DiffusionPipeline.from_pretrained(folder), ConsistencyPipeline.from_pretrained(folder)
    assert type(stock) is LatentConsistencyModelPipeline
    images = drawn(stock, num_inference_steps=1, guidance_scale=8.0)
    np.testing.assert_array_equal(drawn(ours), images)
    np.testing.assert_array_equal(drawn(ours, num_inference_steps=1, guidance_scale=8.0), images)


@pytest.mark.parametrize("asked", [{"num_inference_steps": 2}, {"timesteps": [999, 499]}])
def test_more_steps_are_refused(home: Path, asked: dict) -> None:
    with pytest.raises(ValueError, match=ONE_STEP.format(2)):
        drawn(ConsistencyPipeline.from_pretrained(home / "full" / "pipeline"), **asked)


def test_so_is_an_image_to_start_from(home: Path) -> None:
    pipe = ConsistencyImg2ImgPipeline.from_pretrained(home / "full" / "pipeline")
    with pytest.raises(
        ValueError, match=r"^This student makes images of pure noise alone, in one step: it cannot change"
    ):
        pipe(PROMPTS[0], torch.rand(1, 3, 32, 32), num_inference_steps=1)


def test_the_file_that_travels_refuses_them_too(home: Path) -> None:
    folder = home / "full" / "pipeline"
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(PORTABLE), trust_remote_code=True)
    np.testing.assert_array_equal(drawn(pipe), drawn(ConsistencyPipeline.from_pretrained(folder)))
    for asked in ({"num_inference_steps": 2}, {"timesteps": [999, 499]}):
        with pytest.raises(ValueError, match=r"^This student makes its images in one step: .* give 1\.$"):
            drawn(pipe, **asked)


def test_it_is_measured_in_one_step(home: Path) -> None:
    folder = str(home / "full" / "pipeline")
    Candidate.of(folder).check_steps([1])
    with pytest.raises(
        ValueError, match=r"makes its images in one step: measure it by itself, with 1 step and no other\.$"
    ):
        Candidate.of(folder).check_steps([1, 2])
    assert " ".join(summary._next(Path(folder), {})["measure"]).count("--num_inference_steps 1") == 1


def test_older_readers_read_the_record_and_older_records_are_read(home: Path, tmp_path: Path) -> None:
    told = json.loads((home / "full" / "pipeline" / RECORD).read_text())
    assert told.pop("one_step") is True
    (tmp_path / RECORD).write_text(json.dumps(told))
    assert read_record(tmp_path).one_step is False
    (tmp_path / RECORD).write_text(json.dumps(told | {"one_step": "yes"}))
    with pytest.raises(ValueError, match="one_step must be true or false, got 'yes'"):
        read_record(tmp_path)


def test_a_lora_with_the_guidance_in_it(home: Path) -> None:
    folder = distil(home, "sd", "lora", lora=True, lora_rank=2, w_min=6.5, w_max=6.5, learning_rate=1e-2) / "lora"
    record, pipe = read_record(folder), ConsistencyPipeline.from_pretrained(folder)
    assert (record.one_step, record.guidance, record.recommended_guidance_scale) == (True, "distilled", 1.0)
    stock = DiffusionPipeline.from_pretrained(home / "sd")
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config, original_inference_steps=10)
    before = drawn(stock, num_inference_steps=1, guidance_scale=1.0)
    stock.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    images = drawn(stock, num_inference_steps=1, guidance_scale=1.0)
    assert abs(images - before).max() > 1e-4
    np.testing.assert_allclose(drawn(pipe), images, atol=1e-5)
    with pytest.raises(ValueError, match=ONE_STEP.format(4)):
        drawn(pipe, num_inference_steps=4)
    assert "original_inference_steps=10" in (folder / "README.md").read_text()


def test_xl_is_told_its_sizes(home: Path) -> None:
    folder = distil(home, "xl", "xl-full", solver="heun", max_train_steps=1, checkpointing_steps=1) / "pipeline"
    stock = DiffusionPipeline.from_pretrained(folder)
    images = drawn(stock, num_inference_steps=1, guidance_scale=read_record(folder).recommended_guidance_scale)
    np.testing.assert_allclose(drawn(ConsistencyPipeline.from_pretrained(folder)), images, atol=1e-5)


def test_a_student_of_a_flow(home: Path) -> None:
    folder = distil(home, "sd3", "flow", shift=3.0, w_min=1.0, w_max=3.0) / "pipeline"
    pipe = ConsistencyPipeline.from_pretrained(folder)
    index = DiffusionPipeline.load_config(folder)
    stock = DiffusionPipeline.from_pretrained(folder, **{k: None for k, v in index.items() if v == [None, None]})
    asked = stock_entry(pipe.scheduler, 1, "accepted").arguments
    np.testing.assert_allclose(drawn(stock, guidance_scale=1.0, **asked), drawn(pipe), atol=1e-4)
    for more in ({"num_inference_steps": 2}, {"sigmas": [1.0, 0.5]}):
        with pytest.raises(ValueError, match=ONE_STEP.format(2)):
            drawn(pipe, **more)


def test_it_is_taken_up_where_it_was_left(home: Path) -> None:
    whole = distil(home, "sd", "whole", max_train_steps=4, checkpointing_steps=2)
    half = {"max_train_steps": 4, "checkpointing_steps": 2, "resume_from_checkpoint": "checkpoint-2"}
    (whole / "checkpoint-4").rename(home / "aside")
    first = (whole / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    again = distil(home, "sd", "whole", **half)
    assert (again / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == first


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"prompts": ["no_such.txt"]}, "There is no file of prompts no_such.txt; give one, or one of simple_animals"),
        ({"prompts": ["a bag", " "]}, "The list must hold at least one prompt, and none that is empty or no text."),
        ({"resolution": 36}, "--resolution 36 is not a multiple of 8, as the teacher's pipeline needs."),
        ({"validation_nfe": [1, 2]}, "--validation_nfe has no effect here: the student makes its images in one step"),
        ({"shift": 3.0}, "--shift has no effect for a teacher that is no flow"),
        ({"num_ddim_timesteps": 2000}, "The grid has 2000 steps"),
        ({"lora": True, "unet_time_cond_proj_dim": 16}, "--unet_time_cond_proj_dim has no effect with --lora"),
    ],
)
def test_bad_inputs_get_a_sentence(home: Path, values: dict, sentence: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        distil(home, "sd", "bad", **values)
    assert not (home / "bad" / "pipeline").exists()


def test_the_watch_looks_at_one_step(home: Path, tmp_path: Path) -> None:
    look = tmp_path / "look.args"
    look.write_text(f"--train_data_dir {home} --resolution 32 --num_inference_steps 1 2\n")
    with pytest.raises(SystemExit, match=re.escape("--num_inference_steps [1, 2], but BOOT's student takes one step")):
        distil(home, "sd", "bad", stop_when="fid", stop_evaluation=look)


def test_help_names_what_it_does(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_script("distill_boot", help=True)
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--prompts", "--boundary_weight", "--num_ddim_timesteps", "--solver"))
    assert "--train_data_dir" not in shown
