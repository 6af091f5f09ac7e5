"""`distill_scott.py` end to end on random pipelines, and SCott in two processes."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline, StableDiffusionXLPipeline
from huggingface_hub import ModelCard
from processes import run_worker
from safetensors.torch import load_file
from scott_worker import KINDS as PAIRS
from scripts import CAPTIONS, data_flags, image_folder, run_script
from tiny import tiny_pipeline
from tiny_xl import tiny_xl_pipeline
from toys import assert_same, tensors


SHARED = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "critic_learning_rate": 1e-3,
    "export_ema_decay": 0.5,
    "w_min": 1.0,
    "w_max": 7.0,
    "adversarial_start": 1,
    "adversarial_ramp": 2,
    "proportion_empty_prompts": 0.2,
}
PAPER = {"critic": "lora_decoder", "critic_lora_rank": 4, "critic_inputs": "clean", "adversarial_weight": 0.4}
KINDS = {
    "full": {"unet_time_cond_proj_dim": 32},
    "paper": {"unet_time_cond_proj_dim": 32} | PAPER,
    "lora": {"lora": True, "lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.5, "sde": "ddim", "eta": 0.3},
    "none": {"unet_time_cond_proj_dim": 32, "critic": "none", "solver_steps": 1, "noise_scale": "ode"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("scott")
    image_folder(home / "data")
    tiny_pipeline().save_pretrained(home / "teacher")
    tiny_xl_pipeline().save_pretrained(home / "teacher-xl")
    return home


def distil(home: Path, name: str, teacher: str = "teacher", **values: object) -> Path:
    shared = data_flags(home / "data", home / f"cache-{teacher}") | SHARED
    if values.get("critic") == "none":
        shared = {name: value for name, value in shared.items() if not name.startswith(("critic_", "adversarial_"))}
    shared |= {"pretrained_teacher_model": home / teacher, "output_dir": home / name}
    run_script("distill_scott", **shared | values)
    return home / name


@pytest.fixture(scope="module", params=KINDS)
def finished(request, home) -> Path:
    return distil(home, request.param, **KINDS[request.param])


def test_resume_is_bit_exact(home, finished) -> None:
    kind = finished.name
    again = distil(home, f"{kind}-again", **KINDS[kind], resume_from_checkpoint=finished / "checkpoint-2")
    expected = tensors(finished / "checkpoint-4")
    assert ("critic" in {name.split("/")[0] for name in expected}) == (kind != "none")
    assert_same(tensors(again / "checkpoint-4"), expected)


def test_both_players_moved(finished) -> None:
    """But for the last bias of a critic: while the hinge is open, real and fake pull at it equally."""
    players = ["student"] if finished.name == "none" else ["student", "critic"]
    for player in players:
        early, late = (load_file(finished / f"checkpoint-{step}" / f"{player}.safetensors") for step in (2, 4))
        still = [name for name, value in early.items() if torch.equal(value, late[name])]
        assert [name for name in still if not (player == "critic" and name.endswith("bias"))] == []


def test_the_student_is_published_with_its_record(finished) -> None:
    lora = finished.name == "lora"
    folder = finished / ("lora" if lora else "pipeline")
    record = json.loads((folder / "cm_diffusers.json").read_text())
    assert (record["method"], record["guidance"]) == ("scott", "distilled" if lora else "embedded")
    assert record["scheduler"]["_class_name"] == "LCMScheduler"
    card = ModelCard((folder / "README.md").read_text())
    assert {"scott", "cm_diffusers"} <= set(card.data.tags)
    assert "2403.01505" in card.text
    assert "| solver_steps | 1 |" in card.text or "| solver_steps | 3 |" in card.text
    if not lora:
        pipe = DiffusionPipeline.from_pretrained(folder)
        assert isinstance(pipe, LatentConsistencyModelPipeline)
        image = pipe(CAPTIONS[0], num_inference_steps=2, guidance_scale=4.0, output_type="np").images[0]
        assert image.shape == (32, 32, 3)


@pytest.mark.parametrize("kind", ["full", "paper", "lora"])
def test_sdxl_teachers(home, kind) -> None:
    folder = distil(home, f"xl-{kind}", "teacher-xl", **KINDS[kind], max_train_steps=3)
    assert (folder / "checkpoint-3" / "critic.safetensors").exists()
    if kind != "lora":
        assert isinstance(DiffusionPipeline.from_pretrained(folder / "pipeline"), StableDiffusionXLPipeline)


def test_checkpointing_and_a_half_teacher(home) -> None:
    half = {"cast_teacher_unet": "bf16", "mixed_precision": "bf16", "gradient_checkpointing": True}
    folder = distil(home, "half", **KINDS["full"], **half, max_train_steps=3)
    assert all(value.isfinite().all() for value in tensors(folder / "checkpoint-3").values())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"eta": 1.5, "sde": "ddim"}, "--eta must be at least 0 and at most 1, but it is 1.5"),
        ({"eta": 0.3}, "--eta has no effect with --sde er_sde"),
        ({"sde": "ddim", "noise_scale": "sde"}, "--noise_scale has no effect with --sde ddim"),
        ({"critic_lora_rank": 4}, "--critic_lora_rank has no effect with --critic heads"),
        ({"critic": "none", "adversarial_weight": 0.4}, "--adversarial_weight has no effect with --critic none"),
        ({"adversarial_start": 4}, "The critic would start at step 4 (--adversarial_start) of 4: give it an earlier"),
        ({"critic_inputs": "clean", "renoise_below": 9}, "--renoise_below has no effect with --critic_inputs clean"),
        ({"critic_adam_beta1": 1.5}, "--critic_adam_beta1 must be at least 0 and below 1, but it is 1.5"),
        ({"critic_channels": 0}, "--critic_channels must be at least 1, but it is 0"),
        ({"critic_learning_rate": -1.0}, "--critic_learning_rate must be at least 0, but it is -1.0"),
        ({"lora_rank": 8}, "--lora_rank has no effect without --lora"),
        ({"solver_steps": 0}, "--solver_steps must be at least 1, but it is 0"),
    ],
)
def test_a_wrong_flag_is_one_sentence(home, values, words) -> None:
    with pytest.raises(SystemExit) as error:
        distil(home, "wrong", **values)
    assert str(error.value.code).startswith(f"error: {words}")
    assert not (home / "wrong").exists()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_worker("scott_worker.py", folder)
    return folder


@pytest.mark.parametrize("kind", PAIRS)
def test_two_processes_resume_bit_exact(two_processes, kind) -> None:
    expected = tensors(two_processes / kind / "checkpoint-4")
    assert {"student", "critic", "optimizer-critic"} <= {name.split("/")[0] for name in expected}
    assert_same(tensors(two_processes / f"{kind}-resumed" / "checkpoint-4"), expected)


@pytest.mark.parametrize("player", ["student", "critic"])
@pytest.mark.parametrize("kind", PAIRS)
def test_two_processes_hold_the_same_weights(two_processes, kind, player) -> None:
    ranks = [load_file(two_processes / f"rank-{rank}.safetensors") for rank in (0, 1)]
    one, two = ({n: v for n, v in found.items() if n.startswith(f"{kind}/{player}/")} for found in ranks)
    assert_same(two, one)
