"""`finetune_direct_reward.py` end to end on tiny pipelines: a student by all three gradients, and a diffusion model."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from scripts import data_flags, image_folder, models_folder, run_script
from tiny import tiny_pipeline
from toys import assert_same, tensors

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.record import read_record
from cm_diffusers.tasks.reward_runs import RewardModelConfig, distillation_of, load_tuned
from cm_diffusers.types import Networks


SHARED = {
    "max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 1e-2, "report_to": "none", "resolution": 32,
    "train_batch_size": 2, "num_inference_steps": 2, "guard_steps": 2, "guard_prompts": 2, "guard_samples": 2,
    "rewards": ["differentiable_rewards:Red"], "held_out_rewards": ["jpeg_compressibility"], "prompts": ["a bag", "a coat"],
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = models_folder(tmp_path_factory.mktemp("direct"))
    image_folder(home / "images")
    return home


def tune(home, name, model="student", **values):
    flags = SHARED | {"output_dir": home / name} | values
    run_script("finetune_direct_reward", pretrained_student_model=home / model, **flags)
    return home / name


def single_step(home) -> dict:
    return {"through": "single_step", **data_flags(home / "images", home / "cache")}


def drawn(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(
        "a bag", num_inference_steps=2, guidance_scale=1.0, generator=generator, height=32, width=32, output_type="np"
    ).images


def redness(folder) -> list[float]:
    return [look["reward"] for look in json.loads((folder / "rewards.json").read_text())["looks"]]


@pytest.mark.parametrize("through", ["last_step", "trajectory", "single_step"])
def test_the_reward_rises_in_both_directions(home, through):
    """`single_step` trains the whole student with its averaged target."""
    options = {"max_train_steps": 8, "guard_steps": 8, "train_batch_size": 4, "through": through, "learning_rate": 0.1}
    if through == "single_step":
        options = single_step(home) | options | {"no_lora": True, "learning_rate": 3e-3, "reward_weight": 100.0}
        options |= {"max_train_steps": 24, "guard_steps": 24}
    folders = {w: tune(home, f"{through}{w:+}", **options, reward_weights=[w]) for w in (1.0, -1.0)}
    (start, more), (turned, less) = (redness(folders[w]) for w in (1.0, -1.0))
    assert start == -turned
    assert more - start > 0.002
    assert less - turned > 0.002
    result = folders[1.0] / ("pipeline" if through == "single_step" else "lora")
    record = read_record(result)
    assert (record.method, record.base_model) == ("direct_reward", "../../student")
    assert ("its own samples" in (result / "README.md").read_text()) == (through != "single_step")


def test_the_lora_loads_in_a_stock_pipeline(home):
    folder = tune(home, "tuned")
    stock = DiffusionPipeline.from_pretrained(home / "student")
    before = drawn(stock)
    stock.load_lora_weights(folder / "lora", weight_name="pytorch_lora_weights.safetensors")
    with_lora = drawn(stock)
    assert abs(with_lora - before).max() > 1e-3
    assert abs(drawn(ConsistencyPipeline.from_pretrained(folder / "lora")) - with_lora).max() < 1e-4
    stock.unload_lora_weights()
    assert (drawn(stock) == before).all()


@pytest.mark.parametrize("through", ["trajectory", "single_step"])
def test_resume_is_bit_exact(home, through):
    options = single_step(home) if through == "single_step" else {"through": through, "kl_coef": 0.1}
    whole = tune(home, f"whole-{through}", **options)
    again = tune(home, f"again-{through}", **options, resume_from_checkpoint=whole / "checkpoint-2")
    first, second = (tensors(folder / "checkpoint-4") for folder in (whole, again))
    for found in (first, second):
        found["source/history"][:, 2] = 0  # seconds
    assert_same(second, first)
    assert [look["step"] for look in json.loads((again / "rewards.json").read_text())["looks"]] == [0, 2, 4]


def test_passes_are_those_of_all_images(home):
    folder = tune(home, "passes", max_train_steps=2, gradient_accumulation_steps=3)
    rollouts = json.loads((folder / "rewards.json").read_text())["rollouts"]
    assert [row["passes"] for row in rollouts] == [2 * 3 * (1 + 3), 2 * 2 * 3 * (1 + 3)]


def test_the_distillation_of_a_tuned_student_has_the_first_teacher(home):
    """Not the student that it was tuned from, which its record names."""
    whole = tune(home, "once", no_lora=True) / "pipeline"
    again = shutil.copytree(whole, home / "twice" / "pipeline")
    once, after = (RewardModelConfig(str(path), lora=False) for path in (whole, again))
    tuned_once = load_tuned(once, 0.0)
    tuned_twice = replace(tuned_once, record=replace(tuned_once.record, base_model=str(whole)))
    teacher = UNet2DConditionModel.from_pretrained(home / "teacher", subfolder="unet").state_dict()
    assert any((value != teacher[name]).any() for name, value in tuned_once.network.state_dict().items())
    for tuned, source in ((tuned_once, once), (tuned_twice, after)):
        nets = Networks(tuned.network)
        distillation_of(tuned, nets, source, None)
        assert_same(nets.teacher.state_dict(), teacher)


def test_a_teacher_that_predicts_something_else_is_refused(home):
    other = home / "other"
    tiny_pipeline(prediction_type="v_prediction").save_pretrained(other)
    with pytest.raises(SystemExit, match="predicts v_prediction and the student epsilon; give the diffusion model"):
        tune(home, "none", **single_step(home), pretrained_teacher_model=other)


def test_a_diffusion_model_by_its_last_step(home):
    folder = tune(home, "draft", "teacher", sampler="ddim", num_inference_steps=4, guidance_scale=2.0)
    assert read_record(folder / "lora") is None
    assert "[DRaFT]" in (folder / "lora" / "README.md").read_text()
    pipe = DiffusionPipeline.from_pretrained(home / "teacher")
    before = drawn(pipe)
    pipe.load_lora_weights(folder / "lora")
    assert abs(drawn(pipe) - before).max() > 1e-4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rewards": ["jpeg_compressibility"]}, "finetune_direct_reward.py needs the gradient of the reward, and jpeg_compr"),
        ({"reward_weight": 2.0}, "--reward_weight has no effect with --through last_step"),
        ({"kl_coef": 2.0}, "--kl_coef has no effect with --through last_step"),
        ({"random_flip": True}, "--random_flip has no effect with --through last_step, which needs no images"),
        ({"ema_decay": 0.9}, "--ema_decay has no effect here"),
        ({"stop_kl": 0.1}, "--stop_kl has no effect without --kl_coef"),
        ({"through": "single_step", "sampler": "ddim"}, "--through single_step is for a student"),
        ({"validation_teacher_steps": 3}, "--validation_teacher_steps has no effect here"),
        ({"train_batch_size": 0}, "--train_batch_size must be at least 1, but it is 0"),
        ({"guard_prompts": 0}, "--guard_steps has no effect without --guard_prompts"),
    ],
)  # fmt: skip
def test_bad_input(home, values, message):
    with pytest.raises(SystemExit, match=message):
        tune(home, "none", **values)
