"""`distill_lcm.py` end to end on random pipelines of every family: trained, published, loaded with and without this package."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from scripts import CAPTIONS, data_flags, image_folder, run_script
from tiny_flow import tiny_sd3
from tiny_flow_a import tiny_sana
from tiny_flow_b import tiny_flux, tiny_klein, tiny_qwen_image, tiny_z_image

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.evaluation.sampling import generate
from cm_diffusers.models.adapters import adapter_layers
from cm_diffusers.models.families.base import guided, network_of
from cm_diffusers.pipelines.stock import stock_entry
from cm_diffusers.record import read_record
from cm_diffusers.schedulers import FlowConsistencyScheduler


TEACHERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd3": tiny_sd3,
    "sana": tiny_sana,
    "flux": tiny_flux,
    "flux2-klein": tiny_klein,
    "qwen-image": tiny_qwen_image,
    "z-image": tiny_z_image,
}
TOLD = "flux"  # its guidance
STEPS = {"max_train_steps": 2, "checkpointing_steps": 2, "learning_rate": 1e-2, "w_min": 1.0, "w_max": 3.0}
LORA = {"lora": True, "lora_rank": 4, "lora_alpha": 8.0}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("flows")
    image_folder(home / "data")
    return home


def distil(home: Path, family: str, name: str, **values: object) -> Path:
    teacher = home / family
    if not teacher.exists():
        TEACHERS[family]().save_pretrained(teacher)
    folder = home / f"{family}-{name}"
    shared = data_flags(home / "data", home / "cache" / family) | STEPS | {"shift": 3.0}
    run_script("distill_lcm", **shared | {"pretrained_teacher_model": teacher, "output_dir": folder} | values)
    return folder


@pytest.mark.parametrize("family", TEACHERS)
def test_a_lora_of_every_family(home: Path, family: str) -> None:
    folder = distil(home, family, "lora", **LORA) / "lora"
    record, pipe = read_record(folder), ConsistencyPipeline.from_pretrained(folder)
    assert record.guidance == ("embedded" if family == TOLD else "distilled")
    assert isinstance(pipe.scheduler, FlowConsistencyScheduler)
    assert pipe.scheduler.config.shift == 3.0
    learnt = [layer.lora_B for layer in adapter_layers(network_of(pipe))]
    assert learnt
    assert any(next(iter(b.values())).weight.abs().max() > 0 for b in learnt)
    ours = sampled(pipe, steps=2)
    stock = alone(home / family)
    stock.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    stock.scheduler = pipe.scheduler
    np.testing.assert_allclose(sampled(stock, steps=2), ours, atol=1e-4)


@pytest.mark.parametrize("family", ["sd3", "sana", "flux"])
def test_a_whole_student(home: Path, family: str) -> None:
    validation = {"validation_prompts": [CAPTIONS[0]], "validation_steps": 2, "validation_nfe": [1, 2]}
    run = distil(home, family, "full", **validation, validation_teacher_steps=2)
    pipe, stock = ConsistencyPipeline.from_pretrained(run / "pipeline"), alone(run / "pipeline")
    assert list((run / "samples").glob("step-*2.png"))
    before = network_of(alone(home / family)).state_dict()
    after = network_of(stock).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    sigmas = "passed" if family == "flux" else "accepted"
    asked = stock_entry(pipe.scheduler, 1, sigmas).arguments
    one = {"prompt": CAPTIONS[0], "output_type": "np", "height": 32, "width": 32}
    images = [
        each(**one, **asked, generator=torch.Generator().manual_seed(3), **guided(pipe, 1.0)).images
        for each in (pipe, stock)
    ]
    np.testing.assert_allclose(*images, atol=1e-4)


def alone(folder: Path) -> DiffusionPipeline:
    """By diffusers, which wants to be told of a Stable Diffusion 3 without T5."""
    index = DiffusionPipeline.load_config(folder)
    return DiffusionPipeline.from_pretrained(folder, **{k: None for k, v in index.items() if v == [None, None]})


def sampled(pipe: DiffusionPipeline, steps: int) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return generate(pipe, list(CAPTIONS[:2]), [1, 2], steps, 1.0, 2, 32)[0].numpy()
