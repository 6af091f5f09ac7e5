"""`distill_pcm.py` and `distill_tcd.py` end to end on random pipelines: trained, resumed, published, sampled with and without this package."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, TCDScheduler
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from scripts import CAPTIONS, data_flags, image_folder, run_script
from tiny import tiny_pipeline
from tiny_flow import tiny_sd3
from tiny_xl import tiny_xl_pipeline
from toys import assert_same, tensors

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.evaluation.sampling import generate, load_pipeline
from cm_diffusers.models.target_input import TARGET_DIM, TARGET_INPUT
from cm_diffusers.pipelines.lora import PEFT_WEIGHTS
from cm_diffusers.pipelines.stock import stock_entry
from cm_diffusers.record import read_record
from cm_diffusers.schedulers import FlowConsistencyScheduler


SHARED = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "export_ema_decay": 0.5,
    "w_min": 1.0,
    "w_max": 3.0,
    "proportion_empty_prompts": 0.2,
    "num_ddim_timesteps": 50,
    "validation_prompts": [CAPTIONS[0]],
    "validation_steps": 4,
    "validation_seeds": [3],
    "validation_nfe": [1, 2],
    "validation_teacher_steps": 2,
    "validation_guidance_scale": 3.0,
}
FULL, LORA = {"unet_time_cond_proj_dim": 32}, {"lora": True, "lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.5}
CRITIC = {"critic_learning_rate": 1e-3, "adversarial_start": 1, "adversarial_ramp": 2}
KINDS = {
    "pcm-full": ("pcm", FULL | CRITIC | {"phases": 2}),
    "pcm-lora": ("pcm", LORA | {"critic": "none"}),
    "tcd-full": ("tcd", FULL),
    "tcd-lora": ("tcd", LORA | {"order": 2}),
    "tcd-full-told": ("tcd", FULL | {"target_time": "embedded"}),
    "tcd-lora-told": ("tcd", LORA | {"target_time": "embedded"}),
}
FLOWS = {"flow-pcm-lora": KINDS["pcm-lora"], "flow-tcd-full": ("tcd", {})}
STARTS = {"pcm-full": [999, 499], "pcm-lora": [999, 739, 499, 239]}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("trajectories")
    image_folder(home / "data")
    tiny_pipeline().save_pretrained(home / "teacher")
    return home


def distil(home: Path, kind: str, name: str, teacher: str = "teacher", **values: object) -> Path:
    method, settings = (KINDS | FLOWS)[kind]
    shared = data_flags(home / "data", home / f"cache-{teacher}") | SHARED
    shared |= {"pretrained_teacher_model": home / teacher, "output_dir": home / name}
    run_script(f"distill_{method}", **shared | settings | values)
    return home / name


@pytest.fixture(scope="module", params=KINDS)
def finished(request, home) -> Path:
    return distil(home, request.param, request.param)


def result(run: Path) -> Path:
    return next(run / name for name in ("lora", "pipeline") if (run / name).is_dir())


def sampled(pipe: DiffusionPipeline, steps: int = 3, scale: float = 1.0, **asked: object) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    ways = asked if "timesteps" in asked else {"num_inference_steps": steps} | asked
    seed = torch.Generator().manual_seed(3)
    return pipe(
        CAPTIONS[0], height=32, width=32, guidance_scale=scale, generator=seed, output_type="np", **ways
    ).images


def scale_of(run: Path) -> float:
    return read_record(result(run)).recommended_guidance_scale


def alone(home: Path, run: Path) -> StableDiffusionPipeline:
    """By diffusers, as the card says."""
    if (run / "pipeline").is_dir():
        return DiffusionPipeline.from_pretrained(run / "pipeline")
    pipe = StableDiffusionPipeline.from_pretrained(home / "teacher")
    pipe.scheduler = TCDScheduler.from_config(pipe.scheduler.config, original_inference_steps=50)
    pipe.load_lora_weights(run / "lora", weight_name="pytorch_lora_weights.safetensors")
    return pipe


def test_resume_is_bit_exact(home, finished) -> None:
    kind = finished.name
    again = distil(home, kind, f"{kind}-again", resume_from_checkpoint=finished / "checkpoint-2")
    assert_same(tensors(again / "checkpoint-4"), tensors(finished / "checkpoint-4"))


def test_every_trained_weight_moved(finished) -> None:
    early, late = (load_file(finished / f"checkpoint-{step}" / "student.safetensors") for step in (2, 4))
    assert [name for name, value in early.items() if torch.equal(value, late[name])] == []


def test_record_says_how_to_sample(finished) -> None:
    record, kind = read_record(result(finished)), finished.name
    starts = STARTS.get(kind)
    assert record.method == kind.partition("-")[0]
    assert record.guidance == ("distilled" if "lora" in kind else "embedded")
    assert record.target_dim == (TARGET_DIM if "told" in kind else None)
    assert record.recommended_num_inference_steps == (len(starts) if starts else 4)
    known = {"_class_name": "TCDScheduler", "recommended_timesteps": starts, "gamma": 0.0 if starts else 0.3}
    known |= {"boundary_scalings": "none", "set_alpha_to_one": False, "original_inference_steps": 50}
    assert {name: record.scheduler[name] for name in known} == known


def test_the_pipeline_follows_the_record(finished) -> None:
    pipe, starts = ConsistencyPipeline.from_pretrained(result(finished)), STARTS.get(finished.name)
    images = sampled(pipe, len(starts) if starts else 4, scale_of(finished))
    assert pipe.scheduler.gamma == (0.0 if starts else 0.3)
    assert pipe.scheduler.timesteps.tolist() == (starts or [999, 759, 499, 259])
    assert np.isfinite(images).all()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_diffusers_alone_draws_the_same(home, finished, gamma) -> None:
    if "told" in finished.name:
        pytest.skip("diffusers alone does not tell where a step goes")
    pipe, stock = ConsistencyPipeline.from_pretrained(result(finished)), alone(home, finished)
    assert type(stock) is StableDiffusionPipeline
    assert type(stock.scheduler) is TCDScheduler
    asked = {"scale": scale_of(finished), "eta": gamma}
    if starts := STARTS.get(finished.name):
        asked["timesteps"] = starts
    np.testing.assert_allclose(sampled(stock, **asked), sampled(pipe, **asked), atol=2e-4)


def test_gamma_and_the_evaluation_agree(finished) -> None:
    """What is measured, and drawn in grids, is what the record says."""
    ours, steps = ConsistencyPipeline.from_pretrained(result(finished)), 2
    scale, pipe = scale_of(finished), load_pipeline(str(result(finished)))
    measured = generate(pipe, [CAPTIONS[0]], [3], steps, scale, 1, 32)[0]
    expected = torch.from_numpy(sampled(ours, steps, scale)).permute(0, 3, 1, 2)
    assert (measured - expected).abs().max() < 1.5 / 255
    other = sampled(ours, steps, scale, eta=1.0)
    assert (torch.from_numpy(other).permute(0, 3, 1, 2) - expected).abs().max() > 1e-3


def test_card(finished) -> None:
    card, kind = ModelCard((result(finished) / "README.md").read_text()), finished.name
    assert {kind.partition("-")[0], "cm_diffusers"} <= set(card.data.tags)
    assert "lcm" not in card.data.tags
    assert "{" not in card.text.replace('{"', "")
    if "told" in kind:
        assert "told where each step goes" in card.text
        assert "TCDScheduler" not in card.text
    else:
        assert f"eta={0 if kind in STARTS else 0.3:g}" in card.text
    if starts := STARTS.get(kind):
        assert f"timesteps={starts}" in card.text
        trailing = "takes the same steps" if len(starts) == 2 else "[999, 749, 499, 249]"
        assert trailing in card.text


def test_keys_of_a_lora_are_those_in_use(finished) -> None:
    """The layout of published PCM-LoRAs; the layer for the target, which other programs do not know, is in PEFT's form alone."""
    if "lora" not in finished.name:
        pytest.skip("not a LoRA")
    shared, exact = (
        load_file(result(finished) / "pytorch_lora_weights.safetensors"),
        load_file(result(finished) / PEFT_WEIGHTS),
    )
    ends = {name.partition(".")[2] for name in shared}
    assert ends == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert all(name.startswith("lora_unet_") for name in shared)
    assert not any("cond_proj" in name for name in shared)
    assert any(f"{TARGET_INPUT}.lora_B" in name for name in exact) == ("told" in finished.name)
    layers = {name.rpartition(".lora_")[0] for name in exact if TARGET_INPUT not in name}
    assert len(layers) == len(shared) // 3


@pytest.fixture
def told(home) -> Path:
    return (
        home / "tcd-lora-told" if (home / "tcd-lora-told").exists() else distil(home, "tcd-lora-told", "tcd-lora-told")
    )


def test_the_input_comes_and_goes_with_the_lora(home, told) -> None:
    pipe = ConsistencyPipeline.from_pretrained(home / "teacher")
    before = sampled(pipe, scale=1.0)
    pipe.load_lora_weights(told / "lora")
    layer = pipe.unet.time_embedding.cond_proj
    assert layer.in_features == TARGET_DIM
    with_it = sampled(pipe)
    next(iter(layer.lora_B.values())).weight.data.zero_()
    assert np.abs(sampled(pipe) - with_it).max() > 1e-4, "where a step goes is told, and heard"
    pipe.unload_lora_weights()
    assert pipe.unet.time_embedding.cond_proj is None
    assert pipe.record is None
    np.testing.assert_array_equal(sampled(pipe, scale=1.0), before)


def test_a_fused_lora_keeps_the_input(tmp_path, told) -> None:
    pipe = ConsistencyPipeline.from_pretrained(told / "lora")
    expected = sampled(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    np.testing.assert_allclose(sampled(pipe), expected, atol=1e-4)
    pipe.save_pretrained(tmp_path / "fused")
    again = ConsistencyPipeline.from_pretrained(tmp_path / "fused")
    np.testing.assert_allclose(sampled(again), expected, atol=1e-4)


def test_a_network_without_the_input_is_not_taken_for_one(home, told) -> None:
    pipe = ConsistencyPipeline.from_pretrained(home / "teacher")
    with pytest.warns(UserWarning, match="no input for that; its scheduler and recommendations are not taken over"):
        pipe.load_lora_weights(told / "lora", weight_name="pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("kind", FLOWS)
def test_a_flow(home, kind) -> None:
    if not (home / "sd3").exists():
        tiny_sd3().save_pretrained(home / "sd3")
    run = distil(home, kind, kind, "sd3", shift=3.0)
    record, pipe = read_record(result(run)), ConsistencyPipeline.from_pretrained(result(run))
    assert isinstance(pipe.scheduler, FlowConsistencyScheduler)
    starts = [1.0, 0.74, 0.5, 0.24] if "pcm" in kind else None
    assert record.scheduler["recommended_sigmas"] == starts
    assert pipe.scheduler.config.gamma == (0.0 if starts else 0.3)
    assert record.recommended_num_inference_steps == 4
    ours = sampled(pipe, 4)
    index = DiffusionPipeline.load_config(home / "sd3")
    absent = {name: None for name, value in index.items() if value == [None, None]}
    stock = DiffusionPipeline.from_pretrained(home / "sd3" if "lora" in kind else run / "pipeline", **absent)
    if "lora" in kind:
        entry = stock_entry(pipe.scheduler, 4, "accepted")
        stock.load_lora_weights(run / "lora", weight_name="pytorch_lora_weights.safetensors")
        stock.scheduler = entry.scheduler
        np.testing.assert_allclose(sampled(stock, 4, **entry.arguments), ours, atol=1e-4)
    assert np.isfinite(ours).all()


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("pcm", {"phases": 21, "num_ddim_timesteps": 20}, "--phases 21 do not fit on 20 points"),
        ("tcd", {"phases": 21, "num_ddim_timesteps": 20}, "--phases 21 do not fit on 20 points"),
        ("pcm", {"critic": "vision"}, "--critic vision judges images without noise, and jumps end in noise"),
        (
            "pcm",
            {"critic": "none", "adversarial_weight": 0.3},
            "--adversarial_weight has no effect with --critic none",
        ),
        (
            "pcm",
            {"adversarial_start": 4, "max_train_steps": 4},
            "of 4: give it an earlier step, the run more --max_train_steps, or",
        ),
        ("tcd", {"lora": True, "unet_time_cond_proj_dim": 16}, "--unet_time_cond_proj_dim has no effect with --lora"),
    ],
)
def test_bad_requests_end_before_anything_is_loaded(home, method, values, message) -> None:
    given = data_flags(home / "data", home / "cache") | {"pretrained_teacher_model": home / "absent"}
    with pytest.raises(SystemExit, match=re.escape(message)):
        run_script(f"distill_{method}", **given | {"output_dir": home / "refused"} | values)
    assert not (home / "refused").exists()


def test_only_a_unet_is_told_where_its_jumps_end(home) -> None:
    if not (home / "sd3").exists():
        tiny_sd3().save_pretrained(home / "sd3")
    with pytest.raises(SystemExit, match=r"--target_time embedded is for a UNet, but .* is a SD3Transformer2DModel"):
        distil(home, "flow-tcd-full", "refused", "sd3", shift=3.0, target_time="embedded")


def test_a_student_of_xl(home) -> None:
    tiny_xl_pipeline().save_pretrained(home / "xl")
    run = distil(home, "tcd-full", "xl-tcd", "xl", max_train_steps=2, export_ema_decay=0.0)
    pipe, stock = (
        ConsistencyPipeline.from_pretrained(run / "pipeline"),
        DiffusionPipeline.from_pretrained(run / "pipeline"),
    )
    asked = {"scale": scale_of(run), "eta": 0.3}
    np.testing.assert_allclose(sampled(stock, **asked), sampled(pipe, **asked), atol=2e-4)
