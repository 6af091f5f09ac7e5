"""Pipelines of ours are saved as publishing saves them: what diffusers alone loads, with record, card and the scheduler's settings."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, LCMScheduler, TCDScheduler, UNet2DModel
from peft import LoraConfig
from publishing.test_model_card import PROVENANCE_OF_IT
from tiny import tiny_pipeline, tiny_unet
from tiny_xl import tiny_xl_pipeline

from cm_diffusers import (
    ConsistencyImagesPipeline,
    ConsistencyImg2ImgPipeline,
    ConsistencyInpaintPipeline,
    ConsistencyPipeline,
    ConsistencyScheduler,
    EDMConsistencyScheduler,
)
from cm_diffusers.publishing.folders import write_result
from cm_diffusers.publishing.lora_export import Lora
from cm_diffusers.publishing.pipelines import lcm_record, lcm_scheduler, lora_writer
from cm_diffusers.publishing.provenance import read_provenance
from cm_diffusers.record import RECORD, read_record
from pipelines.test_pipelines import STUDENT
from pipelines.test_pipelines_video import ours as video


pytestmark = pytest.mark.filterwarnings("ignore:There is no safety checker")
PICTURE = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
MASK = (torch.arange(32 * 32).reshape(1, 1, 32, 32) % 3 > 0).float()


def ours(cls: type[ConsistencyPipeline], make: Callable = tiny_pipeline, **config: object) -> ConsistencyPipeline:
    pipe = cls.from_pipe(make(), requires_safety_checker=False)
    guidance = "embedded" if pipe.unet.config.time_cond_proj_dim else "distilled"
    entry = asdict(lcm_record("ada/base", guidance, 2.0, 2.0, 1.0, lcm_scheduler(make(), 20, 5.0)))
    pipe.register_to_config(record=entry)
    pipe.scheduler = ConsistencyScheduler.from_config(entry["scheduler"] | config)
    return pipe


def embedded() -> DiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_pipeline(unet=tiny_unet(time_cond_proj_dim=16))


def unprompted(**scheduler: object) -> ConsistencyImagesPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        unet = UNet2DModel(8, layers_per_block=1, norm_num_groups=2, add_attention=False, **shape).eval()
    return ConsistencyImagesPipeline(unet, EDMConsistencyScheduler(**scheduler))


def sampled(pipe: DiffusionPipeline, **options: object) -> np.ndarray:
    prompt = () if isinstance(pipe, ConsistencyImagesPipeline) else ("a photo of a bag",)
    result = pipe(
        *prompt, generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np", **options
    )
    return result.frames if hasattr(result, "frames") else result.images


PIPELINES = {  # how it is made, the class in the index, what a call needs
    "text": (lambda: ours(ConsistencyPipeline), "StableDiffusionPipeline", {}),
    "embedded": (lambda: ours(ConsistencyPipeline, embedded), "LatentConsistencyModelPipeline", {}),
    "xl": (lambda: ours(ConsistencyPipeline, tiny_xl_pipeline), "StableDiffusionXLPipeline", {}),
    "img2img": (lambda: ours(ConsistencyImg2ImgPipeline), "StableDiffusionPipeline", {"image": PICTURE}),
    "inpaint": (
        lambda: ours(ConsistencyInpaintPipeline),
        "StableDiffusionPipeline",
        {"image": PICTURE, "mask_image": MASK},
    ),
    "video": (lambda: video(), "AnimateDiffPipeline", {"num_frames": 2}),
    "unprompted": (
        lambda: unprompted(boundary_scalings="cm", noise_conditioning="adm", gamma=1.0),
        "ConsistencyModelPipeline",
        {},
    ),
}


@pytest.mark.parametrize("kind", PIPELINES)
def test_diffusers_alone_loads_what_is_saved(kind: str, tmp_path: Path) -> None:
    make, name, options = PIPELINES[kind]
    pipe = make()
    expected, scheduler = sampled(pipe, **options), pipe.scheduler
    pipe.save_pretrained(tmp_path)
    assert pipe.scheduler is scheduler
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == name
    assert {entry[0] for entry in index.values() if isinstance(entry, list)} <= {"diffusers", "transformers", None}
    assert "_name_or_path" not in index
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock).__module__.startswith("diffusers.")
    assert type(stock.scheduler) is getattr(diffusers, index["scheduler"][1])
    again = type(pipe).from_pretrained(tmp_path)
    np.testing.assert_array_equal(sampled(again, **options), expected)
    assert again.record == pipe.record == read_record(tmp_path)
    if kind in ("text", "xl", "embedded"):
        alone = sampled(stock, guidance_scale=1.0, height=32, width=32)
        np.testing.assert_allclose(alone, sampled(pipe, guidance_scale=1.0), atol=1e-4)


def test_the_index_is_that_of_the_stock_class(tmp_path: Path) -> None:
    pipe = ours(ConsistencyPipeline)
    pipe.save_pretrained(tmp_path / "ours")
    stock = tiny_pipeline(scheduler=LCMScheduler.from_config(pipe.scheduler.config))
    stock.save_pretrained(tmp_path / "stock")
    assert json.loads((tmp_path / "ours/model_index.json").read_text()) == json.loads(
        (tmp_path / "stock/model_index.json").read_text()
    )


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, LCMScheduler),
        ({"gamma": 0.3}, LCMScheduler),
        ({"sigma_data": 0.7}, LCMScheduler),
        ({"gamma": 0.0, "boundary_scalings": "none"}, TCDScheduler),
        ({"gamma": 1.0, "boundary_scalings": "none"}, TCDScheduler),
    ],
)
def test_settings_of_the_scheduler_survive(settings: dict, kind: type, tmp_path: Path) -> None:
    """Also a gamma that the user set after the record was written."""
    pipe = ours(ConsistencyPipeline, **settings)
    pipe.save_pretrained(tmp_path)
    again = ConsistencyPipeline.from_pretrained(tmp_path)
    names = set(ConsistencyScheduler().config)
    assert {n: again.scheduler.config[n] for n in names if n[0] != "_"} == {
        n: pipe.scheduler.config[n] for n in names if n[0] != "_"
    }
    np.testing.assert_array_equal(sampled(again), sampled(pipe))
    saved = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    assert saved["_class_name"] == kind.__name__
    assert ("gamma" in saved) == bool(settings)  # nothing that diffusers would warn of without need


@pytest.mark.parametrize("kind", [LCMScheduler, TCDScheduler, EulerDiscreteScheduler])
def test_a_stock_scheduler_of_the_user_is_saved_as_it_is(kind: type, tmp_path: Path) -> None:
    pipe = ours(ConsistencyPipeline)
    pipe.scheduler = kind.from_config(tiny_pipeline().scheduler.config)
    pipe.save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock.scheduler) is kind
    assert stock.scheduler.config.timestep_spacing == pipe.scheduler.config.timestep_spacing


@pytest.fixture
def _forgotten() -> Iterator[None]:
    """diffusers runs every `pipeline.py` as the same module, in which the classes of the one before still are."""
    sys.modules.pop("diffusers_modules.local.pipeline", None)
    yield
    sys.modules.pop("diffusers_modules.local.pipeline", None)


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("make", [lambda: unprompted(gamma=0.5), lambda: ours_in_sigma()], ids=["unprompted", "text"])
def test_the_single_file_lies_beside_what_no_stock_class_samples(make: Callable, tmp_path: Path) -> None:
    pipe = make()
    pipe.register_to_config(record=ours(ConsistencyPipeline).config.record)
    expected = sampled(pipe)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"][0] == "diffusers"
    again = type(pipe).from_pretrained(tmp_path)
    np.testing.assert_array_equal(sampled(again), expected)
    alone = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True)
    assert not type(alone).__module__.startswith("cm_diffusers.")
    assert type(alone.scheduler).__module__.startswith("diffusers.")


def ours_in_sigma() -> ConsistencyPipeline:
    """A student of Stable Diffusion in EDM's coordinates."""
    pipe = ConsistencyPipeline.from_pipe(tiny_pipeline(), requires_safety_checker=False)
    pipe.scheduler = EDMConsistencyScheduler(network="vp", prediction_type="epsilon", sigma_min=0.03, sigma_max=14.0)
    return pipe


def test_a_card_goes_along_where_the_training_is_known(tmp_path: Path) -> None:
    pipe = ConsistencyPipeline.from_pretrained(STUDENT)
    pipe = ConsistencyImg2ImgPipeline.from_pipe(pipe)  # which knows as much
    pipe.save_pretrained(tmp_path / "mine")
    known, given = read_provenance(tmp_path / "mine"), read_provenance(STUDENT)
    assert known == replace(given, name="mine")
    card = (tmp_path / "mine/README.md").read_text()
    assert 'from_pretrained("mine")' in card
    assert given.command in card
    files = [path for path in (tmp_path / "mine").rglob("*") if path.is_file()]
    assert [path.name for path in files if str(tmp_path).encode() in path.read_bytes()] == []
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}


def test_a_card_of_somebody_else_stays_and_one_of_another_student_goes(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My own\n")
    student = ConsistencyPipeline.from_pretrained(STUDENT)
    student.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My own\n"
    (tmp_path / "README.md").unlink()
    student.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").is_file()
    ours(ConsistencyPipeline).save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    assert not (tmp_path / "training.json").exists()
    assert (tmp_path / RECORD).is_file()


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A published LoRA with its base model beside it, which is named by its path."""
    tiny_pipeline().save_pretrained(tmp_path / "base")
    pipe = tiny_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "conv1"], init_lora_weights=False))
    record = lcm_record(str(tmp_path / "base"), "distilled", 2.0, 2.0, 1.0, lcm_scheduler(pipe, 20, 5.0))
    settings = {**PROVENANCE_OF_IT.settings, "lora": True}
    write = lora_writer(Lora.of(pipe.unet), record, False)
    write_result(tmp_path / "lora", [write], record, replace(PROVENANCE_OF_IT, settings=settings))
    return tmp_path / "lora"


def test_a_fused_lora_is_a_whole_student(lora: Path, tmp_path: Path) -> None:
    pipe = ConsistencyPipeline.from_pretrained(lora, requires_safety_checker=False)
    with pytest.raises(ValueError, match=r"call fuse_lora\(\) and then unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "whole")
    again = ConsistencyPipeline.from_pretrained(tmp_path / "whole")
    np.testing.assert_array_equal(sampled(again), sampled(pipe))
    assert not np.allclose(sampled(again), sampled(ours(ConsistencyPipeline)), atol=1e-2)
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "whole")).__name__ == "StableDiffusionPipeline"
    assert read_provenance(tmp_path / "whole").fused
    card = (tmp_path / "whole/README.md").read_text()
    assert "put into the weights of the model it belongs on" in card
    assert "load_lora_weights" not in card
    assert "base_model_relation: finetune" in card
    again.save_pretrained(tmp_path / "twice")
    assert "load_lora_weights" not in (tmp_path / "twice/README.md").read_text()


def test_a_lora_that_goes_takes_its_card_along(lora: Path, tmp_path: Path) -> None:
    pipe = ConsistencyPipeline.from_pretrained(lora, requires_safety_checker=False)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "base again")
    assert not [name for name in ("README.md", "training.json", RECORD) if (tmp_path / "base again" / name).exists()]


def test_training_json_of_no_meaning_is_passed_over(tmp_path: Path) -> None:
    ours(ConsistencyPipeline).save_pretrained(tmp_path / "a")
    odd = json.dumps(asdict(PROVENANCE_OF_IT) | {"settings": 3})
    for content in ("{", "[]", '{"name": "x"}', "\xff", odd):
        (tmp_path / "a/training.json").write_text(content, "latin-1")
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        ConsistencyPipeline.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
        assert not (tmp_path / "b/README.md").exists()
