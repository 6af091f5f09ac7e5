"""`distill_scd.py` on text-to-image teachers: full students and LoRAs, told their guidance or with it in their weights."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from scripts import data_flags, image_folder, run_script
from tiny import tiny_pipeline
from tiny_xl import tiny_xl_pipeline
from toys import assert_same, tensors

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.diffusion.guidance import guidance_embedding
from cm_diffusers.diffusion.trigflow import TrigFlowView, trigflow_denoiser
from cm_diffusers.evaluation.grids import image_grid
from cm_diffusers.evaluation.sampling import generate, load_pipeline
from cm_diffusers.models.time_weight import weights_without_head
from cm_diffusers.pipelines.manners import IN_SIGMA
from cm_diffusers.record import read_record
from cm_diffusers.tasks.image_models import StartConfig, load_image_model


STEPS = {"max_train_steps": 2, "checkpointing_steps": 1, "learning_rate": 1e-2, "tangent_warmup_steps": 1}
LEVELS = {"sigma_min": 0.03, "sigma_max": 14.5, "recommended_sigmas": [14.5, 1.0]}
SHOWN = {"validation_prompts": ["a coat"], "validation_images": 2, "validation_steps": 2}
EMBEDDED = {"w_min": 1.0, "w_max": 5.0, "unet_time_cond_proj_dim": 16}
BAKED = {"w_min": 3.0, "w_max": 3.0}
LORA = {"lora": True, "lora_rank": 2, "lora_alpha": 4.0, "lora_dropout": 0.5}
KINDS = {"embedded": EMBEDDED, "baked": BAKED, "lora": BAKED | LORA}
SINGLE_FILE = Path(__file__).parents[2] / "pipelines" / "consistency_text_to_image.py"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("scd")
    image_folder(home / "data")
    tiny_pipeline().save_pretrained(home / "teacher")
    tiny_xl_pipeline().save_pretrained(home / "xl")
    return home


def distil(home: Path, name: str, teacher: str = "teacher", **values: object) -> Path:
    shared = data_flags(home / "data", home / "cache" / teacher) | STEPS | LEVELS
    where = {"pretrained_teacher_model": home / teacher, "output_dir": home / name}
    run_script("distill_scd", **shared | where | values)
    return home / name


@pytest.fixture(scope="module")
def runs(home) -> dict[str, Path]:
    return {kind: distil(home, kind, **flags, **SHOWN) for kind, flags in KINDS.items()}


def result(run: Path) -> Path:
    return run / ("lora" if (run / "lora").exists() else "pipeline")


def published(run: Path) -> ConsistencyPipeline:
    pipe = ConsistencyPipeline.from_pretrained(result(run))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: DiffusionPipeline, **asked: object) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("a coat", generator=torch.Generator().manual_seed(3), output_type="latent", **asked).images


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("embedded", ("embedded", 1.0, 5.0, 4.0)),
        ("baked", ("distilled", 3.0, 3.0, 1.0)),
        ("lora", ("distilled", 3.0, 3.0, 1.0)),
    ],
)
def test_the_record_tells_the_guidance(runs, kind, expected) -> None:
    record = read_record(result(runs[kind]))
    assert (record.guidance, record.w_min, record.w_max, record.recommended_guidance_scale) == expected
    assert (record.method, record.recommended_num_inference_steps, record.resolution) == ("scd", 2, 32)
    assert record.scheduler["recommended_sigmas"] == [14.5, 1.0]
    card = (result(runs[kind]) / "README.md").read_text()
    assert ("sCD, LoRA" in card) == ("custom_pipeline" not in card) == (kind == "lora")
    wanted = (
        "`guidance_scale` 2 to 6 (4 is a good value)"
        if kind == "embedded"
        else "(`guidance_scale` 4) is in the weights"
    )
    assert wanted in card


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_jump_that_was_trained(home, runs, kind) -> None:
    """f = cos(t) x - sin(t) sigma_data F, with the weights of the last checkpoint."""
    pipe, sigma, w = published(runs[kind]), 14.5, 2.0
    weights = load_file(runs[kind] / "checkpoint-2" / "student.safetensors")
    network = weights_without_head(weights)
    assert weights.keys() - {f"network.{name}" for name in network} == {"head.weight", "head.bias"}
    if kind == "lora":
        network = {k.replace(".default.", ".default_0."): v for k, v in network.items()}
    state = pipe.unet.state_dict()
    assert_same({name: state[name] for name in network}, network)
    cond = {"encoder_hidden_states": pipe.encode_prompt(["a coat"] * 2, "cpu", 1, False)[0]}
    if kind == "embedded":
        cond["timestep_cond"] = guidance_embedding(torch.full((2,), w), 16)
    noise, t = torch.randn(2, 4, 8, 8), torch.full((2,), math.atan(sigma), dtype=torch.float64)
    view = TrigFlowView.of(load_image_model(StartConfig(str(home / "teacher"))).view)
    with torch.no_grad():
        expected = trigflow_denoiser(view, pipe.unet)(math.sin(t[0]) * noise, t, cond).x0
    scale = {"guidance_scale": w + 1} if kind == "embedded" else {}
    found = pipe(["a coat"] * 2, latents=noise, sigmas=[sigma], output_type="latent", **scale).images
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_published_is_what_the_grid_showed(runs, kind) -> None:
    pipe, scale = published(runs[kind]), 4.0 if kind == "embedded" else 1.0
    rows = [generate(pipe, ["a coat"] * 2, range(2), steps, scale, 2, 32)[0] for steps in (1, 2)]
    grid = image_grid(rows, ["1 step", "2 steps"], ["a coat"] * 2)
    shown = Image.open(runs[kind] / "samples" / "step-000002.png").convert("RGB")
    assert np.abs(np.asarray(grid.convert("RGB"), int) - np.asarray(shown, int)).max() <= 1


def test_guidance_acts_where_it_is_told(runs) -> None:
    pipe = published(runs["embedded"])
    few, usual, many = (drawn(pipe, **scale) for scale in ({"guidance_scale": 2.0}, {}, {"guidance_scale": 6.0}))
    assert (few - many).abs().max() > 1e-3
    torch.testing.assert_close(usual, drawn(pipe, guidance_scale=4.0))
    with pytest.warns(UserWarning, match="outside the 2 to 6 that"):
        drawn(pipe, guidance_scale=9.0)


def test_a_full_student_samples_by_the_single_file(runs) -> None:
    folder = runs["embedded"] / "pipeline"
    alone = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(SINGLE_FILE), trust_remote_code=True)
    torch.testing.assert_close(drawn(alone), drawn(published(runs["embedded"])), rtol=1e-4, atol=1e-5)


def test_a_lora_brings_its_scheduler_and_takes_it_away(home, runs) -> None:
    record, pipe = read_record(runs["lora"] / "lora"), ConsistencyPipeline.from_pretrained(home / "teacher")
    before = type(pipe.scheduler)
    pipe.load_lora_weights(runs["lora"] / "lora")
    assert type(pipe.scheduler).__name__ == record.scheduler["_class_name"]
    assert type(pipe.scheduler).__name__ in IN_SIGMA
    torch.testing.assert_close(drawn(pipe), drawn(published(runs["lora"])))
    pipe.unload_lora_weights()
    assert type(pipe.scheduler) is before
    assert pipe.record is None


def test_a_lora_samples_in_evaluations_and_from_its_other_form(home, runs) -> None:
    ours = published(runs["lora"])
    expected = generate(ours, ["a coat"], [3], 2, 1.0, 1, 32)[0]
    stock = load_pipeline(str(runs["lora"] / "lora"))
    assert (generate(stock, ["a coat"], [3], 2, 1.0, 1, 32)[0] - expected).abs().max() <= 1.01 / 255
    kohya = ConsistencyPipeline.from_pretrained(home / "teacher")
    kohya.load_lora_weights(runs["lora"] / "lora", weight_name="pytorch_lora_weights.safetensors")
    assert (generate(kohya, ["a coat"], [3], 2, 1.0, 1, 32)[0] - expected).abs().max() <= 1.01 / 255


def test_checkpoints_of_a_lora_hold_adapters_and_the_weight_alone(runs) -> None:
    names = load_file(runs["lora"] / "checkpoint-2" / "student.safetensors").keys()
    assert {name for name in names if not (".lora_A." in name or ".lora_B." in name)} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("kind", ["embedded", "lora"])
def test_resume_is_bit_exact_with_the_learned_weight(home, runs, tmp_path, kind) -> None:
    distil(home, tmp_path, **KINDS[kind], resume_from_checkpoint=runs[kind] / "checkpoint-1")
    last = tensors(tmp_path / "checkpoint-2")
    assert_same(last, tensors(runs[kind] / "checkpoint-2"))
    assert last["student/head.weight"].abs().max() > 0


def test_another_guidance_is_another_run(home, runs, tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"w_max was 5.0, now 6.0"):
        distil(home, tmp_path, **EMBEDDED | {"w_max": 6.0}, resume_from_checkpoint=runs["embedded"] / "checkpoint-1")


@pytest.mark.parametrize("kind", ["embedded", "lora"])
def test_gradient_checkpointing_changes_memory_alone(home, runs, tmp_path, kind) -> None:
    distil(home, tmp_path, **KINDS[kind], max_train_steps=1, gradient_checkpointing=True)
    assert_same(tensors(tmp_path / "checkpoint-1"), tensors(runs[kind] / "checkpoint-1"))


@pytest.mark.parametrize("kind", ["embedded", "lora"])
def test_autocast_leaves_the_derivative_in_float32(home, tmp_path, kind) -> None:
    """Which would not pass on a CPU in half precision; the teacher of a full student may be cast besides."""
    cast = {"cast_teacher_unet": "bf16"} if kind == "embedded" else {}
    distil(home, tmp_path / "run", **KINDS[kind], **cast, mixed_precision="bf16", max_train_steps=1)
    assert all(value.isfinite().all() for value in tensors(tmp_path / "run" / "checkpoint-1").values())


def test_the_evaluation_to_come_is_at_a_guidance_that_was_trained(home, tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    distil(home, tmp_path / "run", **EMBEDDED, max_train_steps=1)
    (measure,) = re.findall(r"measure +(.*)", caplog.text)
    assert "--guidance_scales 4 " in measure


def test_another_average_becomes_a_pipeline(home, tmp_path) -> None:
    run = distil(home, tmp_path / "run", **BAKED, ema_sigma_rels=[0.05, 0.1])
    run_script("export_average", run_dir=run, sigma_rel=0.1, output_dir=tmp_path / "average")
    kept = weights_without_head(load_file(run / "averages" / "step-2" / "0.1.safetensors"))
    found = ConsistencyPipeline.from_pretrained(tmp_path / "average").unet.state_dict()
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in kept.items())
    assert len(kept) == len(found)


@pytest.mark.parametrize("kind", ["embedded", "lora"])
def test_sdxl(home, tmp_path, kind) -> None:
    run = distil(home, tmp_path, "xl", **KINDS[kind], max_train_steps=1, **SHOWN | {"validation_steps": 1})
    pipe, scale = published(run), 4.0 if kind == "embedded" else 1.0
    rows = [generate(pipe, ["a coat"] * 2, range(2), steps, scale, 2, 32)[0] for steps in (1, 2)]
    grid = image_grid(rows, ["1 step", "2 steps"], ["a coat"] * 2)
    shown = Image.open(run / "samples" / "step-000001.png").convert("RGB")
    assert np.abs(np.asarray(grid.convert("RGB"), int) - np.asarray(shown, int)).max() <= 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (BAKED | LORA | {"cast_teacher_unet": "bf16", "mixed_precision": "bf16"}, "derivative in half precision"),
        (BAKED | {"unet_time_cond_proj_dim": 16}, "such guidance goes into the weights"),
        (EMBEDDED | {"unet_time_cond_proj_dim": 3}, "an even number from 4 on"),
        (EMBEDDED | {"lora": True}, "--unet_time_cond_proj_dim has no effect with --lora"),
        (BAKED | {"lora_rank": 4}, "--lora_rank has no effect without --lora"),
        ({"w_min": 3.0, "w_max": 1.0}, "--w_min 3.0 is above --w_max 1.0"),
        ({"sigma_max": 80.0, "recommended_sigmas": [80.0]}, "--sigma_max 80.0 is more noise than the network knows"),
        ({"ema_decay": 0.9}, "--ema_decay has no effect with scd"),
    ],
)
def test_wrong_input_ends_with_one_sentence(home, tmp_path, flags, sentence) -> None:
    with pytest.raises(SystemExit) as ended:
        distil(home, tmp_path / "run", **flags)
    assert str(ended.value).startswith("error: ")
    assert sentence in str(ended.value)
    assert "\n" not in str(ended.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (BAKED, "UNet2DModel without a null condition, which guidance needs (--w_min 3.0, --w_max 3.0)"),
        (LORA, "has no effect for a teacher that reads no text"),
    ],
)
def test_a_teacher_without_text_can_neither_guide_nor_bear_a_lora(home, tmp_path, flags, sentence) -> None:
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    unet = UNet2DModel(32, 3, 3, **blocks, layers_per_block=1, norm_num_groups=4)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(SystemExit) as ended:
        distil(home, tmp_path / "run", tmp_path / "ddpm", **flags)
    assert sentence in str(ended.value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_was_told_another_time_is_distilled_as_it_is(home) -> None:
    """Stable Diffusion tuned to TrigFlow's time: from the folder a student starts as it, and is told that time, too."""
    flags = {"max_train_steps": 1, "learning_rate": 1e-6, "sigma_min": 0.03, "sigma_max": 14.5}
    data = data_flags(home / "data", home / "cache" / "teacher")
    where = {"pretrained_teacher_model": home / "teacher", "output_dir": home / "tuned"}
    run_script("tune_time", **data | flags | where)
    tuned = load_image_model(StartConfig(str(home / "tuned" / "pipeline")))
    assert (tuned.view.noise_conditioning, tuned.view.prediction_type, tuned.view.sigma_data) == (
        "trigflow",
        "epsilon",
        1,
    )
    view, t = TrigFlowView.of(tuned.view), torch.tensor([0.5, 1.5], dtype=torch.float64)
    assert view.told(t).tolist() == t.tolist()
    run = distil(home, "of_tuned", "tuned/pipeline", **BAKED | {"learning_rate": 1e-9})
    student = published(run)
    assert (student.scheduler.config.network, student.scheduler.config.noise_conditioning) == ("vp", "trigflow")
    cond = {"encoder_hidden_states": student.encode_prompt(["a coat"] * 2, "cpu", 1, False)[0]}
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        found, wanted = (view(unet, x, t, cond) for unet in (student.unet, tuned.network))
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-4)
    with pytest.raises(SystemExit, match="is a consistency model already"):
        distil(home, "again", "of_tuned/pipeline")
