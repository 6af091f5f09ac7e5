"""`finetune_rlcm.py` end to end on tiny pipelines: a student and a diffusion model."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from scripts import models_folder, run_script
from toys import assert_same, tensors

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.record import read_record
from cm_diffusers.tasks.reward_runs import PromptConditions, RewardConfig, RewardModelConfig, load_tuned


STUDENT = Path(__file__).parents[2] / "assets" / "fashion_lcm"
SHARED = {
    "max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 1e-2, "report_to": "none", "resolution": 32,
    "samples_per_rollout": 4, "train_batch_size": 2, "sample_batch_size": 4, "gradient_accumulation_steps": 2,
    "num_inference_steps": 3, "buffer_size": 4, "min_count": 2, "guard_steps": 2, "guard_prompts": 2, "guard_samples": 2,
    "rewards": ["jpeg_compressibility"], "held_out_rewards": ["jpeg_incompressibility"], "prompts": ["a bag", "a coat", "a shirt"],
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = models_folder(tmp_path_factory.mktemp("rewards"))
    return home


def tune(home, name, model="student", **values):
    run_script("finetune_rlcm", pretrained_student_model=home / model, output_dir=home / name, **SHARED | values)
    return home / name


@pytest.fixture(scope="module")
def tuned(home):
    grids = {"validation_prompts": ["a bag"], "validation_steps": 4, "validation_seeds": [0], "validation_nfe": [2]}
    return tune(home, "tuned", **grids)


def drawn(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(
        "a bag", num_inference_steps=3, guidance_scale=1.0, generator=generator, height=32, width=32, output_type="np"
    ).images


def test_what_is_left_behind(home, tuned):
    content = json.loads((tuned / "rewards.json").read_text())
    assert [row["rollout"] for row in content["rollouts"]] == [0, 1]
    assert [row["step"] for row in content["looks"]] == [0, 2, 4]
    assert {"reward", "jpeg_incompressibility", "diversity"} <= set(content["looks"][0])
    assert content["looks"][0]["diversity"] == 1
    assert content["looks"][0]["jpeg_incompressibility"] == -content["looks"][0]["reward"]
    assert (tuned / "rewards.png").stat().st_size > 5000
    assert (tuned / "samples" / "step-000004.png").is_file()
    record = read_record(tuned / "lora")
    assert (record.method, record.base_model) == ("rlcm", "../../student")
    card = (tuned / "lora" / "README.md").read_text()
    assert "trained on its own samples, for jpeg_compressibility." in card
    assert [name for name in ("ema_decay", "eta", "validation_guidance_scale") if f"| {name} |" in card] == []


def test_the_lora_loads_in_a_stock_pipeline(home, tuned):
    stock = DiffusionPipeline.from_pretrained(home / "student")
    before = drawn(stock)
    stock.load_lora_weights(tuned / "lora", weight_name="pytorch_lora_weights.safetensors")
    with_lora = drawn(stock)
    assert abs(with_lora - before).max() > 1e-3
    ours = drawn(ConsistencyPipeline.from_pretrained(tuned / "lora"))
    assert abs(ours - with_lora).max() < 1e-4
    stock.unload_lora_weights()
    assert (drawn(stock) == before).all()


@pytest.mark.parametrize(
    "options", [{}, {"inner_epochs": 2, "final_step": "stochastic", "gradient_accumulation_steps": 3}]
)
def test_resume_is_bit_exact(home, tuned, options):
    """After two steps of four, where the second roll-out begins, and in the middle of the first."""
    whole = tune(home, f"whole-{len(options)}", **options)
    again = tune(home, f"again-{len(options)}", **options, resume_from_checkpoint=whole / "checkpoint-2")
    first, second = (tensors(folder / "checkpoint-4") for folder in (whole, again))
    for found in (first, second):
        found["source/history"][:, 2] = 0  # seconds
    assert_same(second, first)


def test_a_diffusion_model_is_tuned_by_the_same_code(home):
    folder = tune(
        home, "ddpo", "teacher", sampler="ddim", guidance_scale=2.0, eta=0.5, gradient_accumulation_steps=6,
        final_step="drop",
    )  # fmt: skip
    assert read_record(folder / "lora") is None
    card = (folder / "lora" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "load_lora_weights" in code
    assert "num_inference_steps=3, guidance_scale=2, eta=0.5" in code
    assert "[DDPO]" in card
    pipe = DiffusionPipeline.from_pretrained(home / "teacher")
    before = drawn(pipe)
    pipe.load_lora_weights(folder / "lora")
    assert abs(drawn(pipe) - before).max() > 1e-4


def test_pathwise_needs_a_gradient(home):
    with pytest.raises(
        SystemExit, match="--final_step pathwise needs the gradient of the reward, and jpeg_compressibility"
    ):
        tune(home, "none", final_step="pathwise")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"final_std": 0.2}, "--final_std has no effect with --final_step drop"),
        ({"eta": 0.5}, "--eta has no effect with --sampler consistency"),
        ({"loss": "reinforce", "clip_range": 0.1}, "--clip_range has no effect with --loss reinforce"),
        ({"baseline": "batch"}, "--buffer_size has no effect with --baseline batch"),
        ({"lora_dropout": 0.1}, "--lora_dropout would make the probabilities of samples random"),
        ({"stop_kl": 0.1}, "--stop_kl has no effect without --kl_in_advantage"),
        ({"validation_teacher_steps": 3}, "--validation_teacher_steps has no effect here"),
        ({"baseline": "group", "buffer_size": 32, "min_count": 16}, "so it needs --samples_per_prompt of at least 2"),
        ({"kl_coef": -0.1}, "--kl_coef must be at least 0, but it is -0.1"),
        ({"kl_in_advantage": -0.1}, "--kl_in_advantage must be at least 0, but it is -0.1"),
        ({"train_batch_size": 0}, "--train_batch_size must be at least 1, but it is 0"),
        ({"inner_epochs": 0}, "--inner_epochs must be at least 1, but it is 0"),
        ({"num_inference_steps": 0}, "--num_inference_steps must be at least 1, but it is 0"),
        ({"prompts": ["animals.txt"]}, "There is no file of prompts animals.txt"),
    ],
)
def test_no_flag_is_ignored(home, values, message):
    with pytest.raises(SystemExit, match=message):
        tune(home, "none", **values)


def test_a_long_prompt_is_no_file():
    """Longer than a name of a file may be."""
    text = "a bag " * 60
    assert RewardConfig(["jpeg_compressibility"], prompts=[text]).load_prompts() == [(text, {})]


def test_own_loop_is_the_pipeline(home):
    """A walk of the policy against the unmodified pipeline with the same noise."""
    tuned = load_tuned(RewardModelConfig(str(home / "student"), num_inference_steps=3), 0.0)
    cond, _ = PromptConditions.of(tuned, ["a bag"], 32, torch.device("cpu"))(torch.tensor([0]))
    generator = torch.Generator().manual_seed(0)
    noise = torch.stack([torch.randn(1, *tuned.shape(32), generator=generator) for _ in range(3)])
    with torch.no_grad():
        states = [end for *_, end in tuned.policy.walk(tuned.network, torch.cat([noise, noise[:1]]), cond)]
    pipe, seen = DiffusionPipeline.from_pretrained(home / "student"), []
    pipe.scheduler = LCMScheduler.from_config(tuned.pipe.scheduler.config)

    def record(pipe, step, t, tensors):
        seen.append(tensors["latents"])
        return tensors

    pipe(
        "a bag", num_inference_steps=3, guidance_scale=1.0, height=32, width=32, output_type="latent",
        generator=torch.Generator().manual_seed(0), callback_on_step_end=record,
    )  # fmt: skip
    for own, stock in zip(states, seen, strict=True):
        assert torch.allclose(own, stock, atol=2e-6)


def test_own_loop_tells_the_network_the_guidance():
    """As `test_own_loop_is_the_pipeline`, of the bundled student, which takes guidance as an input."""
    tuned = load_tuned(RewardModelConfig(str(STUDENT), num_inference_steps=3, guidance_scale=4.0), 0.0)
    cond, _ = PromptConditions.of(tuned, ["a photo of a bag"], 32, torch.device("cpu"))(torch.tensor([0]))
    generator = torch.Generator().manual_seed(0)
    noise = torch.stack([torch.randn(1, *tuned.shape(32), generator=generator) for _ in range(3)])
    with torch.no_grad():
        states = [end for *_, end in tuned.policy.walk(tuned.network, torch.cat([noise, noise[:1]]), cond)]
    pipe, seen = DiffusionPipeline.from_pretrained(STUDENT, dtype=torch.float32), []
    pipe(
        "a photo of a bag", num_inference_steps=3, guidance_scale=4.0, height=32, width=32, output_type="latent",
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=lambda pipe, step, t, tensors: seen.append(tensors["latents"]) or tensors,
    )  # fmt: skip
    for own, stock in zip(states, seen, strict=True):
        assert torch.allclose(own, stock, atol=2e-5)
