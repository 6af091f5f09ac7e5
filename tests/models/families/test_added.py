"""The family of the page "Add a family", through everything: trained, published, loaded with and without this package."""

import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from flow_checks import branches, euler
from scripts import CAPTIONS, data_flags, image_folder, run_script
from tiny import tiny_vae
from tiny_flow_a import tiny_t5_tokenizer, tiny_umt5

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.evaluation.sampling import generate
from cm_diffusers.models.families import base
from cm_diffusers.record import read_record


PAGE = Path(__file__).parents[3] / "docs" / "guides" / "add_family.md"


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> base.Family:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (row,) = re.findall(r"```text\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    kind, name = re.findall(r'"(\w+)"', row)
    module = ModuleType(f"{base.__package__}.{name}")
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(base.FAMILIES, kind, name)
    return module.FAMILY


def tiny_aura_flow() -> AuraFlowPipeline:
    sizes = {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    text = {"joint_attention_dim": 16, "caption_projection_dim": 16, "pos_embed_max_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = AuraFlowPipeline(
            tiny_t5_tokenizer(), tiny_umt5(), tiny_vae(), AuraFlowTransformer2DModel(8, 2, 4, **sizes, **text),
            FlowMatchEulerDiscreteScheduler(shift=1.73),
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_its_loop_is_that_of_the_stock_pipeline(family: base.Family, scale: float) -> None:
    pipe, noise = tiny_aura_flow(), torch.randn(2, 4, 8, 8)
    settings = {"num_inference_steps": 3, "guidance_scale": scale, "output_type": "latent", "height": 32, "width": 32}
    expected = pipe(["a photo of a bag", "an ankle boot"], latents=noise, **settings).images
    found = euler(family, pipe.transformer, noise, pipe.scheduler.sigmas, *branches(family, pipe), scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "pipeline"])
def test_it_goes_through_everything(family: base.Family, tmp_path: Path, kind: str) -> None:
    tiny_aura_flow().save_pretrained(tmp_path / "teacher")
    flags = data_flags(image_folder(tmp_path / "data"), tmp_path / "cache")
    adapters = {"lora": True, "lora_rank": 4, "lora_alpha": 8.0} if kind == "lora" else {}
    run_script(
        "distill_lcm", **flags, **adapters, pretrained_teacher_model=tmp_path / "teacher", output_dir=tmp_path / "run",
        max_train_steps=2, learning_rate=1e-2, w_min=1.0, w_max=3.0, validation_prompts=[CAPTIONS[0]], validation_nfe=[2],
    )  # fmt: skip
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    result = tmp_path / "run" / kind
    record, pipe = read_record(result), ConsistencyPipeline.from_pretrained(result)
    assert (record.guidance, record.scheduler["shift"]) == ("distilled", 1.73)
    alone = DiffusionPipeline.from_pretrained(tmp_path / "teacher" if kind == "lora" else result)
    if kind == "lora":
        alone.load_lora_weights(result, weight_name="pytorch_lora_weights.safetensors")
    alone.scheduler = pipe.scheduler
    images = [generate(each, list(CAPTIONS[:2]), [1, 2], 2, 1.0, 2, 32)[0].numpy() for each in (pipe, alone)]
    np.testing.assert_allclose(*images, atol=1e-4)
    before = generate(tiny_aura_flow(), list(CAPTIONS[:2]), [1, 2], 2, 1.0, 2, 32)[0].numpy()
    assert np.abs(images[0] - before).max() > 0.02
