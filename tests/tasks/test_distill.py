"""`distill_lcm.py` end to end on a random Stable Diffusion pipeline: what it learns from, leaves behind and resumes."""

import json
import os
import subprocess
import sys
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline
from huggingface_hub import ModelCard
from latent_objectives import lcm_of
from PIL import Image
from safetensors.torch import load_file
from scripts import CAPTIONS, data_flags, image_folder, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_pipeline
from torch import Tensor
from toys import assert_same, tensors

from cm_diffusers.diffusion.preconditioning import lcm_scalings
from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.evaluation.grids import MARGIN, image_grid
from cm_diffusers.evaluation.sampling import generate
from cm_diffusers.models.students import StudentConfig, make_networks
from cm_diffusers.models.teachers import release_encoders
from cm_diffusers.objectives.lcm import LCMConfig
from cm_diffusers.pipelines.lora import PEFT_PREFIX, PEFT_WEIGHTS
from cm_diffusers.tasks import text_to_image


GUIDANCE, SEEDS, NFE, TEACHER_STEPS = 6.0, [3, 4], [1, 2, 4, 8], 5
SHARED = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "export_ema_decay": 0.5,
    "num_ddim_timesteps": 20,
    "timestep_scaling_factor": 5.0,
    "w_min": 1.0,
    "w_max": 7.0,
    "proportion_empty_prompts": 0.2,
}
VALIDATION = {
    "validation_prompts": [CAPTIONS[0]],
    "validation_steps": 2,
    "validation_seeds": SEEDS,
    "validation_nfe": NFE,
    "validation_guidance_scale": GUIDANCE,
    "validation_teacher_steps": TEACHER_STEPS,
    "report_to": "tensorboard",
}
KINDS = {
    "full": {"unet_time_cond_proj_dim": 32},
    "lora": {"lora": True, "lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.5},
}
UNCONNECTED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "cm_diffusers":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import json, torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
images = [
    pipe("a photo of a bag", num_inference_steps=4, guidance_scale=scale, generator=torch.Generator().manual_seed(3),
         output_type="np").images[0].tolist()
    for scale in (6.0, 2.0)
]
assert "cm_diffusers" not in sys.modules
json.dump({"class": type(pipe).__name__, "images": images}, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("distill")
    image_folder(home / "data")
    tiny_pipeline().save_pretrained(home / "teacher")
    return home


def distil(home: Path, name: str, teacher: str = "teacher", **values: object) -> Path:
    folder = home / name
    shared = data_flags(home / "data", home / "cache") | SHARED
    run_script("distill_lcm", **shared | {"pretrained_teacher_model": home / teacher, "output_dir": folder} | values)
    return folder


@pytest.fixture(scope="module")
def full(home) -> Path:
    return distil(home, "full", **KINDS["full"], **VALIDATION)


@pytest.fixture(scope="module")
def lora(home) -> Path:
    return distil(home, "lora", **KINDS["lora"], **VALIDATION)


@pytest.fixture(params=["full", "lora"])
def either(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def teacher(home) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(home / "teacher")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def published(either, teacher) -> DiffusionPipeline:
    """The student as a user gets it."""
    if either.name == "full":
        pipe = DiffusionPipeline.from_pretrained(either / "pipeline")
    else:
        pipe = teacher
        pipe.scheduler = LCMScheduler.from_config(
            pipe.scheduler.config, original_inference_steps=20, timestep_scaling=5.0
        )
        pipe.load_lora_weights(either / "lora")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def result(folder: Path) -> dict[str, Tensor]:
    weights = folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    if weights.exists():
        return load_file(weights)
    return {f"unet.{k.removeprefix(PEFT_PREFIX)}": v for k, v in load_file(folder / "lora" / PEFT_WEIGHTS).items()}


def inputs(network) -> dict[str, Tensor]:
    found = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([19, 999]),
        "encoder_hidden_states": torch.randn(2, 16, 32),
    }
    if network.config.time_cond_proj_dim:
        found["timestep_cond"] = torch.randn(2, network.config.time_cond_proj_dim)
    return found


@torch.no_grad()
def outputs(network, **values: Tensor) -> Tensor:
    return network(**values, return_dict=False)[0]


def test_resume_is_bit_exact(home, either) -> None:
    kind = either.name
    checkpoint = either / "checkpoint-2"
    resumed = distil(home, f"{kind}-resumed", **KINDS[kind], **VALIDATION, resume_from_checkpoint=checkpoint)
    assert_same(tensors(resumed / "checkpoint-4"), tensors(either / "checkpoint-4"))
    assert_same(result(resumed), result(either))
    published = "lora" if kind == "lora" else "pipeline"
    files = [path.relative_to(either) for path in (either / published).rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [str(path) for path in files if (resumed / path).read_bytes() != (either / path).read_bytes()] == []


def test_the_cache_changes_nothing(home, full) -> None:
    plain = distil(home, "uncached", **KINDS["full"], no_cache_latents=True)
    assert_same(tensors(plain / "checkpoint-4"), tensors(full / "checkpoint-4"))


def test_every_trained_weight_moved(either) -> None:
    early, late = (load_file(either / f"checkpoint-{step}" / "student.safetensors") for step in (2, 4))
    assert [name for name, value in early.items() if torch.equal(value, late[name])] == []


def test_the_average_is_published(full, lora) -> None:
    assert_same(result(full), load_file(full / "checkpoint-4" / "export_ema.safetensors"))
    average = load_file(lora / "checkpoint-4" / "export_ema.safetensors")
    assert_same(result(lora), {f"unet.{name.replace('.default.', '.')}": value for name, value in average.items()})


def test_student_is_the_teacher_before_training(teacher) -> None:
    nets = make_networks(teacher.unet, StudentConfig(unet_time_cond_proj_dim=32))
    given = inputs(nets.student)
    expected = outputs(nets.teacher, **{name: value for name, value in given.items() if name != "timestep_cond"})
    torch.testing.assert_close(outputs(nets.student.eval(), **given), expected)


def test_adapters_leave_the_teacher_inside_alone(teacher) -> None:
    given = inputs(teacher.unet)
    expected = outputs(teacher.unet, **given)
    nets = make_networks(teacher.unet, StudentConfig(lora=True, lora_rank=2, lora_dropout=0.5))
    for p in nets.student.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    assert torch.equal(outputs(nets.teacher, **given), expected)
    assert nets.student.training
    assert not torch.allclose(outputs(nets.student, **given), expected)


def test_pipeline_loads_without_this_package(tmp_path, full) -> None:
    command = [sys.executable, "-I", "-c", UNCONNECTED, str(full / "pipeline"), str(tmp_path / "found.json")]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["class"] == "LatentConsistencyModelPipeline"
    images = torch.tensor(found["images"])
    assert images.shape == (2, 32, 32, 3)
    assert (images[0] - images[1]).abs().max() > 1e-6, "the guidance scale is an input"
    here = DiffusionPipeline.from_pretrained(full / "pipeline")
    again = here(
        CAPTIONS[0],
        num_inference_steps=4,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    )
    torch.testing.assert_close(images[0], torch.from_numpy(again.images[0]), rtol=0, atol=1e-4)


def test_adapters_load_into_the_stock_pipeline(teacher, lora) -> None:
    given = inputs(teacher.unet)
    before = outputs(teacher.unet, **given)
    nets = make_networks(load_teacher_of(lora), StudentConfig(lora=True, lora_rank=4, lora_alpha=8.0))
    average = load_file(lora / "checkpoint-4" / "export_ema.safetensors")
    assert not nets.student.load_state_dict(average, strict=False).unexpected_keys
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        teacher.load_lora_weights(lora / "lora")
    config = next(iter(teacher.unet.peft_config.values()))
    assert (config.r, config.lora_alpha) == (4, 8)
    loaded = [name for name, _ in teacher.unet.named_parameters() if ".lora_" in name]
    assert len(loaded) == len(average) == len(load_file(lora / "lora" / PEFT_WEIGHTS))
    assert any("attn1.to_q" in name for name in loaded)
    found = outputs(teacher.unet, **given)
    assert torch.equal(found, outputs(nets.student.eval(), **given))
    assert not torch.allclose(found, before, atol=1e-4)


def load_teacher_of(folder: Path):
    return StableDiffusionPipeline.from_pretrained(folder.parent / "teacher").unet


def test_sampler_and_objective_agree(full) -> None:
    scheduler = DiffusionPipeline.from_pretrained(full / "pipeline").scheduler
    objective = lcm_of(
        LCMConfig(20, timestep_scaling_factor=5.0), DiscreteVP.from_scheduler(scheduler), "epsilon", None
    )
    assert (scheduler.config.original_inference_steps, scheduler.config.timestep_scaling) == (20, 5.0)
    for steps in (1, 2, 3, 4, 8, 20):
        scheduler.set_timesteps(steps)
        assert set(scheduler.timesteps.tolist()) <= set(objective.teaching.grid.tolist())
    for t in objective.teaching.grid:
        expected = [float(c) for c in scheduler.get_scalings_for_boundary_condition_discrete(t)]
        assert [float(c) for c in lcm_scalings(t, 5.0)] == pytest.approx(expected, rel=1e-6)


def test_record_says_how_to_sample(home, either, published) -> None:
    record = json.loads((either / ("pipeline" if either.name == "full" else "lora") / "cm_diffusers.json").read_text())
    scheduler = record.pop("scheduler")
    embedded = either.name == "full"
    assert record == {
        "method": "lcm",
        "base_model": "../../teacher",
        "guidance": "embedded" if embedded else "distilled",
        "w_min": 1.0,
        "w_max": 7.0,
        "recommended_guidance_scale": GUIDANCE if embedded else 1.0,
        "recommended_num_inference_steps": 4,
        "resolution": 32,
        "num_frames": None,
        "target_dim": None,
        "one_step": False,
    }
    assert scheduler["_class_name"] == "LCMScheduler"
    for name in ("original_inference_steps", "timestep_scaling", "prediction_type", "beta_schedule", "steps_offset"):
        assert scheduler[name] == published.scheduler.config[name]


def test_card_needs_no_filling_in(either) -> None:
    text = (either / ("pipeline" if either.name == "full" else "lora") / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "diffusers"
    assert {"text-to-image", "lcm", "cm_diffusers"} <= set(card.data.tags)
    assert ("lora" in card.data.tags) == (either.name == "lora")
    assert "todo" not in text.lower()
    assert "{" not in card.text
    for row in ("| learning_rate | 0.01 |", "| w_max | 7.0 |", "| num_ddim_timesteps | 20 |", "| seed | 0 |"):
        assert row in text
    assert f"guidance_scale={GUIDANCE if either.name == 'full' else 1.0}" in text


def tile(grid: Image.Image, row: int, column: int, size: tuple[int, int]) -> Tensor:
    """One 32 x 32 image of a grid of the given numbers of rows and columns, as (3, 32, 32) in [0, 1]."""
    x = grid.width - (size[1] - column) * (96 + MARGIN)
    y = grid.height - (size[0] - row) * (96 + MARGIN)
    pixels = np.asarray(grid.crop((x, y, x + 96, y + 96)))[1::3, 1::3]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255


def test_grid_shows_teacher_and_student(home, either, published) -> None:
    names = sorted(path.name for path in (either / "samples").iterdir())
    assert names == ["step-000002.png", "step-000004.png"]
    grid = Image.open(either / "samples" / "step-000004.png").convert("RGB")
    labels = [f"teacher, {TEACHER_STEPS}", *(f"{n} steps" for n in NFE)]
    blank = torch.zeros(2, 3, 32, 32)
    assert grid.size == image_grid([blank] * 5, labels, [f"{CAPTIONS[0]} ({seed})" for seed in SEEDS]).size
    pipe = StableDiffusionPipeline.from_pretrained(home / "teacher")
    prompts = [CAPTIONS[0]] * 2
    expected = [generate(pipe, prompts, SEEDS, TEACHER_STEPS, GUIDANCE, 2)[0]]
    scale = GUIDANCE if either.name == "full" else 1.0
    expected += [generate(published, prompts, SEEDS, n, scale, 2)[0] for n in NFE]
    for row, images in enumerate(expected):
        for column, image in enumerate(images):
            difference = (tile(grid, row, column, (5, 2)) - image).abs().max().item()
            assert difference < 1.5 / 255, f"{labels[row]}, seed {SEEDS[column]}: off by {difference:.3f}"


def test_grid_reaches_the_tracker(either) -> None:
    events = EventAccumulator(str(next(either.rglob("events.out.tfevents.*")).parent)).Reload()
    assert events.Tags()["images"] == ["samples"]
    shown = events.Images("samples")
    assert [image.step for image in shown] == [2, 4]
    tracked = np.asarray(Image.open(BytesIO(shown[1].encoded_image_string)))
    assert np.array_equal(tracked, np.asarray(Image.open(either / "samples" / "step-000004.png").convert("RGB")))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_predictions_distil(home, prediction_type) -> None:
    name = f"teacher-{prediction_type}"
    tiny_pipeline(prediction_type=prediction_type).save_pretrained(home / name)
    folder = distil(home, f"from-{name}", name, max_train_steps=2, **KINDS["full"])
    pipe = DiffusionPipeline.from_pretrained(folder / "pipeline")
    assert isinstance(pipe, LatentConsistencyModelPipeline)
    assert pipe.scheduler.config.prediction_type == prediction_type
    moved = (
        result(folder)["conv_out.weight"] - StableDiffusionPipeline.from_pretrained(home / name).unet.conv_out.weight
    )
    assert moved.isfinite().all()
    assert moved.abs().max() > 1e-4


def test_a_teacher_in_half_precision(home) -> None:
    precision = {"cast_teacher_unet": "bf16", "mixed_precision": "bf16", "max_train_steps": 2}
    small = {"validation_nfe": [1], "validation_teacher_steps": 2, "report_to": "none"}
    folder = distil(home, "half", **KINDS["full"], **VALIDATION | precision | small)
    assert {value.dtype for value in result(folder).values()} == {torch.float32}
    pixels = np.asarray(Image.open(folder / "samples" / "step-000002.png").convert("L").crop((150, 60, 230, 120)))
    assert pixels.std() > 1, "the teacher's row is an image"


@pytest.mark.parametrize("watched", [True, False])
def test_adapters_on_a_teacher_in_half_precision(home, watched, monkeypatch) -> None:
    """The network is loaded in it; VAE and text tower are given back where no grid needs them."""
    released = []
    monkeypatch.setattr(
        text_to_image, "release_encoders", lambda pipe: released.append(pipe) or release_encoders(pipe)
    )
    precision = {"cast_teacher_unet": "bf16", "mixed_precision": "bf16", "max_train_steps": 2, "report_to": "none"}
    small = VALIDATION | {"validation_nfe": [1], "validation_teacher_steps": 2} if watched else {}
    folder = distil(home, f"half-adapters-{watched}", **KINDS["lora"], **small | precision)
    adapters = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    assert {value.dtype for value in adapters.values()} == {torch.float32}
    assert any(value.any() for name, value in adapters.items() if ".lora_up." in name)
    grids = list((folder / "samples").glob("*.png"))
    assert (len(grids), len(released)) == ((1, 0) if watched else (0, 1))
    for pipe in released:
        assert pipe.unet.dtype == torch.bfloat16
        assert {p.device.type for part in (pipe.vae, pipe.text_encoder) for p in part.parameters()} == {"meta"}
    card = (folder / "lora" / "README.md").read_text()
    assert "- stable-diffusion\n" in card, "the family is known without the tower"
