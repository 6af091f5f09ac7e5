"""`finetune_lcf.py` end to end on random students of flows: whole, as LoRA, and SANA-Sprint."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, SanaSprintPipeline, SCMScheduler
from flow_models import SHIFT, W, lora_student, whole_student
from scripts import CAPTIONS, data_flags, image_folder, run_script
from tiny_flow import tiny_sd3
from tiny_flow_a import tiny_sprint
from tiny_flow_b import tiny_flux

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.diffusion.process import diffuse
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation.sampling import generate
from cm_diffusers.models.families.base import family_of, network_of
from cm_diffusers.models.teachers import load_stock
from cm_diffusers.record import read_record
from cm_diffusers.schedulers import FlowConsistencyScheduler
from cm_diffusers.tasks.finished_students import FinetuneConfig, load_student
from cm_diffusers.tasks.teachings import teaching_of_student


STEPS = {"max_train_steps": 2, "checkpointing_steps": 2, "learning_rate": 1e-2}
LORA = {"lora": True, "lora_rank": 2, "lora_alpha": 4.0}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("flow-lcf")
    image_folder(home / "data")
    whole_student(tiny_sd3(), home / "sd3")
    lora_student(tiny_flux(), home / "flux")
    tiny_sprint().save_pretrained(home / "sprint")
    return home


def tune(home: Path, student: str, name: str, **values: object) -> Path:
    flags = data_flags(home / "data", home / "cache" / student.replace("/", "-")) | STEPS
    run_script("finetune_lcf", pretrained_student_model=home / student, output_dir=home / name, **flags | values)
    return home / name


def drawn(pipe: DiffusionPipeline, steps: int, scale: float) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return generate(pipe, list(CAPTIONS[:2]), [1, 2], steps, scale, 2, 32)[0].numpy()


def weights(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    return network_of(pipe).state_dict()


def test_a_whole_student_keeps_scheduler_and_record(home: Path) -> None:
    grids = {"validation_prompts": [CAPTIONS[0]], "validation_steps": 2, "validation_nfe": [1, 2]}
    run = tune(home, "sd3/student", "sd3-whole", **grids)
    pipe, record = ConsistencyPipeline.from_pretrained(run / "pipeline"), read_record(run / "pipeline")
    assert (run / "samples" / "step-000002.png").is_file()
    assert (record.method, record.guidance, record.scheduler["shift"]) == ("lcf", "distilled", SHIFT)
    assert isinstance(pipe.scheduler, FlowConsistencyScheduler)
    before = weights(load_stock(home / "sd3" / "student"))
    assert any(not torch.equal(before[name], value) for name, value in weights(pipe).items())


def test_a_lora_on_a_whole_student(home: Path) -> None:
    run = tune(home, "sd3/student", "sd3-lora", **LORA)
    pipe = ConsistencyPipeline.from_pretrained(run / "lora")
    assert (pipe.record.method, pipe.record.base_model) == ("lcf", "../../sd3/student")
    assert pipe.scheduler.config.shift == SHIFT
    base = ConsistencyPipeline.from_pretrained(home / "sd3" / "student")
    tuned = drawn(pipe, 2, 1.0)
    assert abs(tuned - drawn(base, 2, 1.0)).max() > 1e-3
    base.load_lora_weights(run / "lora", weight_name="pytorch_lora_weights.safetensors")
    np.testing.assert_allclose(drawn(base, 2, 1.0), tuned, atol=1e-4)


def test_a_lora_is_fused_first(home: Path) -> None:
    """Its pipeline then has the base's weights with the adapters in them, and trains as a whole."""
    pipe, record = load_student(FinetuneConfig(str(home / "flux" / "lora")))
    with_lora = ConsistencyPipeline.from_pretrained(home / "flux" / "lora")
    np.testing.assert_allclose(drawn(pipe, 2, W + 1), drawn(with_lora, 2, W + 1), atol=1.01 / 255)
    run = tune(home, "flux/lora", "flux-whole")
    found = read_record(run / "pipeline")
    assert (record.guidance, found.guidance, found.w_min, found.w_max) == ("embedded", "embedded", W - 1, W + 1)
    with pytest.raises(UserError, match="is a LoRA, and one LoRA on another cannot be published"):
        load_student(FinetuneConfig(str(home / "flux" / "lora"), lora=True))


@pytest.mark.parametrize("lora", [False, True])
def test_sprint(home: Path, lora: bool) -> None:
    """Without a record. What comes of it has Sprint's pipeline and scheduler."""
    grids = {"validation_prompts": [CAPTIONS[0]], "validation_steps": 2, "validation_nfe": [1, 2]}
    run = tune(home, "sprint", f"sprint-{lora}", **grids, **(LORA if lora else {}))
    result = run / ("lora" if lora else "pipeline")
    pipe, record = ConsistencyPipeline.from_pretrained(result), read_record(result)
    assert isinstance(pipe, SanaSprintPipeline)
    assert type(pipe.scheduler) is SCMScheduler
    assert (record.method, record.w_min, record.w_max, record.recommended_num_inference_steps) == ("lcf", 3.0, 4.0, 2)
    images = drawn(pipe, 2, 4.5)
    stock = DiffusionPipeline.from_pretrained(home / "sprint" if lora else result)
    before = drawn(DiffusionPipeline.from_pretrained(home / "sprint"), 2, 4.5)
    if lora:
        stock.load_lora_weights(result, weight_name="pytorch_lora_weights.safetensors")
    np.testing.assert_allclose(drawn(stock, 2, 4.5), images, atol=1e-4)
    assert abs(images - before).max() > 1e-3
    own = pipe(CAPTIONS[0], height=32, width=32, generator=torch.Generator().manual_seed(1), output_type="np").images
    np.testing.assert_allclose(own[0].transpose(2, 0, 1), images[0], atol=3e-3)  # as recommended; rounded to 8 bits
    card = (result / "README.md").read_text()
    assert "LCMScheduler" not in card
    assert "num_inference_steps=2, guidance_scale=4.5" in card


def test_training_jumps_as_the_pipeline_of_sprint(home: Path) -> None:
    """The jump of LCF from noise is what one step of the stock pipeline makes of it."""
    pipe, record = load_student(FinetuneConfig(str(home / "sprint")))
    teaching, cond = teaching_of_student(pipe), _conditions(pipe)
    noise, one = (
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.ones(1, dtype=torch.float64),
    )
    assert torch.equal(diffuse(teaching.process, torch.zeros_like(noise), noise, one), noise)
    w = torch.tensor([record.recommended_guidance_scale - 1])
    with torch.no_grad():
        jump = teaching.jump(network_of(pipe), noise, one, cond, w)
    pipe.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 1, "intermediate_timesteps": None, "guidance_scale": w.item() + 1}
    size = {"height": 32, "width": 32, "use_resolution_binning": False}
    stock = pipe(CAPTIONS[0], latents=noise, **asked, **size, output_type="latent").images
    assert (stock - jump).abs().max() < 2e-5


def test_what_is_no_student(home: Path) -> None:
    with pytest.raises(
        UserError, match=r"is a StableDiffusion3Pipeline with FlowMatchEuler.* and no record: nothing says"
    ):
        load_student(FinetuneConfig(str(home / "sd3" / "teacher")))
    with pytest.raises(UserError, match=r"is a FluxPipeline with FlowMatchEuler.* and no record: nothing says"):
        load_student(FinetuneConfig(str(home / "flux" / "teacher")))


def _conditions(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return family_of(network_of(pipe)).encode(pipe, [CAPTIONS[0]])
