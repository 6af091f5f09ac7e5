"""Reward fine-tuning of students of flows: the policy is their pipeline's loop, and both scripts tune and publish them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from flow_models import SHIFT, W, lora_student, whole_student
from scripts import data_flags, image_folder, run_script
from tiny_flow import tiny_sd3
from tiny_flow_a import tiny_sana, tiny_sprint
from tiny_flow_b import tiny_flux, tiny_qwen_image

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.diffusion.guidance import combine_linear
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation.sampling import generate
from cm_diffusers.models.families.base import family_of
from cm_diffusers.models.families.shared import pack
from cm_diffusers.record import read_record
from cm_diffusers.schedulers import FlowConsistencyScheduler
from cm_diffusers.tasks.reward_runs import PromptConditions, RewardModelConfig, distillation_of, load_tuned
from cm_diffusers.types import Batch, Networks


STEPS = {
    "max_train_steps": 2, "checkpointing_steps": 2, "learning_rate": 1e-2, "report_to": "none", "num_inference_steps": 2,
    "guard_steps": 2, "guard_prompts": 1, "guard_samples": 2, "prompts": ["a bag", "a coat"],
}  # fmt: skip
RLCM = STEPS | {"rewards": ["jpeg_compressibility"], "resolution": 32, "samples_per_rollout": 4, "train_batch_size": 2}
RLCM |= {"sample_batch_size": 4, "gradient_accumulation_steps": 2, "buffer_size": 4, "min_count": 2}
DIRECT = STEPS | {"rewards": ["differentiable_rewards:Red"], "resolution": 32, "train_batch_size": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("flow-rewards")
    image_folder(home / "data")
    for name, make in {"sd3": tiny_sd3, "sana": tiny_sana, "qwen": tiny_qwen_image}.items():
        whole_student(make(), home / name)
    lora_student(tiny_flux(), home / "flux")
    tiny_sprint().save_pretrained(home / "sprint" / "student")
    return home


def tuned_of(model: Path, **options: object):
    return load_tuned(RewardModelConfig(str(model), num_inference_steps=2, **options), 0.0)


def drawn(pipe: DiffusionPipeline, scale: float) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return generate(pipe, ["a bag"], [1], 2, scale, 1, 32)[0].numpy()


@pytest.mark.parametrize(
    ("model", "scale"),
    [("sd3/student", 1.0), ("sd3/student", 3.0), ("flux/lora", 2.0), ("sana/student", 2.0), ("qwen/student", 12.0), ("sprint/student", 4.5)],
)  # fmt: skip
def test_own_loop_is_the_pipeline(home: Path, model: str, scale: float) -> None:
    """With its guidance: of two branches, as the family combines them, or told."""
    tuned = tuned_of(home / model, guidance_scale=scale, lora=False)
    assert tuned.guidance_scale == scale
    generator = torch.Generator().manual_seed(0)
    noise = torch.stack([torch.randn(1, *tuned.shape(32), generator=generator) for _ in range(3)])
    with torch.no_grad():
        conditions = PromptConditions.of(tuned, ["a bag"], 32, torch.device("cpu"))(torch.tensor([0]))
        *_, (_, _, _, end) = tuned.policy.walk(tuned.network, noise, *conditions)
        own = family_of(tuned.network).latents(tuned.pipe.vae).decode(tuned.pipe.vae, end)
    pipe = tuned.pipe
    if isinstance(pipe.scheduler, FlowConsistencyScheduler):
        pipe.scheduler.noise_sampler = lambda *_: _as_given(model, noise[1])
    else:
        pipe.scheduler.step = _with_noise(pipe.scheduler, noise[1])
    pipe.set_progress_bar_config(disable=True)
    asked = {"latents": _as_given(model, noise[0]), "height": 32, "width": 32, "num_inference_steps": 2}
    asked |= family_of(tuned.network).guided(scale)
    stock = pipe("a bag", **asked, output_type="pt").images
    assert (stock - (own / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-4


def _as_given(model: str, noise: torch.Tensor) -> torch.Tensor:
    """Latents as the call of the pipeline takes them."""
    if model.startswith(("flux", "qwen")):
        return pack(noise)
    return noise


def _with_noise(scheduler, noise: torch.Tensor):
    """SCMScheduler's step with this noise between two times."""

    def step(output, timestep, sample, return_dict=False, **_):
        index = int((scheduler.timesteps == timestep.flatten()[0]).nonzero())
        t, s = scheduler.timesteps[index : index + 2]
        x0 = t.cos() * sample - t.sin() * output
        return s.cos() * x0 + s.sin() * scheduler.config.sigma_data * noise, x0

    return step


def test_guidance_that_is_not_linear(home: Path) -> None:
    """Qwen-Image's keeps the lengths of the conditional velocity: the linear one is far from it."""
    tuned = tuned_of(home / "qwen" / "student", guidance_scale=12.0)
    noise = torch.randn(1, *tuned.shape(32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conditions = PromptConditions.of(tuned, ["a bag"], 32, torch.device("cpu"))(torch.tensor([0]))
        rescaled = tuned.policy.transition(tuned.network, 0, noise, *conditions).mean
        tuned.policy.combine = combine_linear
        linear = tuned.policy.transition(tuned.network, 0, noise, *conditions).mean
    assert (rescaled - linear).abs().max() > 1e-3


def test_rlcm_of_a_whole_student(home: Path) -> None:
    grids = {"validation_prompts": ["a bag"], "validation_steps": 2, "validation_nfe": [2]}
    model = home / "sd3" / "student"
    run_script("finetune_rlcm", **RLCM | grids, pretrained_student_model=model, output_dir=home / "rlcm")
    assert (home / "rlcm" / "samples" / "step-000002.png").is_file()
    result = home / "rlcm" / "lora"
    pipe = ConsistencyPipeline.from_pretrained(result)
    assert (pipe.record.method, pipe.record.base_model) == ("rlcm", "../../sd3/student")
    assert pipe.scheduler.config.shift == SHIFT
    base = ConsistencyPipeline.from_pretrained(model)
    before, tuned = drawn(base, 1.0), drawn(pipe, 1.0)
    assert abs(tuned - before).max() > 1e-3
    base.load_lora_weights(result, weight_name="pytorch_lora_weights.safetensors")
    np.testing.assert_allclose(drawn(base, 1.0), tuned, atol=1e-4)


def test_rlcm_of_a_fused_lora_that_is_told_its_guidance(home: Path) -> None:
    model = home / "flux" / "lora"
    run_script("finetune_rlcm", **RLCM, no_lora=True, pretrained_student_model=model, output_dir=home / "rlcm-flux")
    result = home / "rlcm-flux" / "pipeline"
    record = read_record(result)
    assert (record.method, record.guidance, record.recommended_guidance_scale) == ("rlcm", "embedded", W + 1)
    after = drawn(ConsistencyPipeline.from_pretrained(result), W + 1)
    assert abs(after - drawn(ConsistencyPipeline.from_pretrained(model), W + 1)).max() > 1e-3


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("sd3/student", {"through": "last_step"}),
        ("flux/lora", {"through": "trajectory", "no_lora": True, "kl_coef": 0.1, "gradient_checkpointing": True}),
        ("sd3/student", {"through": "single_step", "reward_weight": 1000.0, "max_train_steps": 12, "guard_steps": 12}),
        (
            "flux/lora",
            {
                "through": "single_step",
                "no_lora": True,
                "reward_weight": 1000.0,
                "max_train_steps": 12,
                "guard_steps": 12,
            },
        ),
        ("sana/student", {"through": "trajectory", "gradient_checkpointing": True}),
    ],
)
def test_direct_rewards_rise(home: Path, model: str, options: dict[str, object]) -> None:
    flags = DIRECT | {"max_train_steps": 6, "guard_steps": 6, "learning_rate": 0.05, "train_batch_size": 4} | options
    if options.get("no_lora"):
        flags["learning_rate"] = 3e-3 if options["through"] == "trajectory" else 2e-2
    if options["through"] == "single_step":
        flags = data_flags(home / "data", home / "cache" / model.replace("/", "-")) | flags
    name = f"{model.replace('/', '-')}-{options['through']}"
    run_script("finetune_direct_reward", **flags, pretrained_student_model=home / model, output_dir=home / name)
    start, end = (look["reward"] for look in json.loads((home / name / "rewards.json").read_text())["looks"])
    assert end - start > 0.002
    result = home / name / ("pipeline" if options.get("no_lora") else "lora")
    record = read_record(result)
    assert (record.method, record.scheduler["shift"]) == ("direct_reward", SHIFT)
    assert ConsistencyPipeline.from_pretrained(result).scheduler.config.shift == SHIFT


@pytest.mark.parametrize("model", ["sd3/student", "flux/lora"])
def test_the_distillation_tells_teacher_and_student_alike(home: Path, model: str) -> None:
    """The loss of a student that is its teacher is that of the teacher against itself, guided as the record says."""
    config = RewardModelConfig(str(home / model), lora=False)
    tuned = tuned_of(home / model, lora=False)
    nets = Networks(tuned.network)
    objective = distillation_of(tuned, nets, config, None)
    assert type(nets.teacher) is type(tuned.network)
    teaching = objective.teaching
    assert (teaching.guiding.told is not None) == (model == "flux/lora")
    assert teaching.guiding.kind == ("embedded" if model == "flux/lora" else "cfg")
    assert teaching.grid[-1] == 1
    assert teaching.grid[24] == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))
    with torch.no_grad():
        cond, uncond = PromptConditions.of(tuned, ["a bag"], 32, torch.device("cpu"))(torch.tensor([0, 0]))
        cond.pop("guidance", None), uncond.pop("guidance", None)
        x0 = torch.randn(2, *tuned.shape(32), generator=torch.Generator().manual_seed(0))
        online, target, w = objective.pair(nets, Batch(x0, cond, uncond))
    assert ((w >= W - 1) & (w <= W + 1)).all()
    assert online.shape == target.shape == x0.shape


def test_ddim_is_not_for_flows(home: Path) -> None:
    with pytest.raises(
        UserError, match=r"--sampler ddim is for models with alphas_cumprod, but .* is a flow with a SD3Tr"
    ):
        tuned_of(home / "sd3" / "teacher", sampler="ddim")
