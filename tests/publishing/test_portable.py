"""Published files are read by older releases, too."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_pipeline, tiny_unet
from tiny_xl import tiny_xl_pipeline
from transformers import CLIPTextModel

from cm_diffusers.publishing.pipelines import lcm_record, lcm_scheduler, save_lora, save_pipeline


ASSETS = Path(__file__).parents[2] / "assets"


def names(weights: Path) -> list[str]:
    with safe_open(weights, "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
def test_text_encoders_keep_the_names_every_transformers_reads(make, tmp_path: Path) -> None:
    pipe = make()
    save_pipeline(pipe, tmp_path / "pipeline", fp16=False)
    for weights in (tmp_path / "pipeline").glob("text_encoder*/model.safetensors"):
        assert {name.split(".")[0] for name in names(weights)} <= {"text_model", "text_projection"}
    loaded, tokens = CLIPTextModel.from_pretrained(tmp_path / "pipeline" / "text_encoder"), torch.arange(16)[None]
    assert torch.equal(loaded(tokens)[0], pipe.text_encoder(tokens)[0])


def test_a_saved_pipeline_tells_no_place_of_the_machine(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "teacher")
    save_pipeline(DiffusionPipeline.from_pretrained(tmp_path / "teacher"), tmp_path / "student", fp16=False)
    files = [path for path in (tmp_path / "student").rglob("*") if path.is_file()]
    assert len(files) > 8
    assert [path.name for path in files if str(tmp_path).encode() in path.read_bytes()] == []


def test_bundled_pipelines_tell_no_place_of_a_machine() -> None:
    configs = [*ASSETS.rglob("config.json"), *ASSETS.rglob("model_index.json")]
    assert len(configs) == 34
    assert [path for path in configs if "_name_or_path" in path.read_text()] == []


def test_lora_metadata_has_no_field_of_a_newer_peft(tmp_path: Path) -> None:
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["to_q", "to_v"]))
    record = lcm_record("base", "none", 0.0, 0.0, 1.0, lcm_scheduler(tiny_pipeline(), 50, 10.0))
    save_lora(unet, tmp_path / "lora", record)
    found = lora_fields(tmp_path / "lora")
    layers = found.pop("target_modules")
    assert found == {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    assert layers == sorted(name for name, _ in tiny_unet().named_modules() if name.endswith(("to_q", "to_v")))
    pipe = tiny_pipeline()
    pipe.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    config = pipe.unet.peft_config["default_0"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.0)


def lora_fields(folder: Path) -> dict:
    fields = json.loads((folder / "peft/adapter_config.json").read_text())
    assert (fields.pop("peft_type"), fields.pop("inference_mode")) == ("LORA", True)
    return fields


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
def test_the_same_pipeline_gives_the_same_bytes(make, tmp_path: Path) -> None:
    """Whatever was done with it in between: tokenizers note the last call, and a folder where it was loaded from."""
    pipe = make()
    save_pipeline(pipe, tmp_path / "first", fp16=False)
    pipe.tokenizer(["a bag"], padding="max_length", truncation=True, max_length=9)
    save_pipeline(pipe, tmp_path / "called", fp16=False)
    pipe.save_pretrained(tmp_path / "stock")
    save_pipeline(DiffusionPipeline.from_pretrained(tmp_path / "first"), tmp_path / "loaded", fp16=False)
    wanted = contents(tmp_path / "first")
    assert len(wanted) > 8
    assert contents(tmp_path / "called") == wanted
    assert contents(tmp_path / "loaded") == wanted


def test_the_same_lora_gives_the_same_bytes(tmp_path: Path) -> None:
    """safetensors writes its metadata in another order each time."""
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"]))
    record = lcm_record("base", "none", 0.0, 0.0, 1.0, lcm_scheduler(tiny_pipeline(), 50, 10.0))
    found = []
    for name in "abcd":
        save_lora(unet, tmp_path / name, record)
        found.append(contents(tmp_path / name))
    assert all(one == found[0] for one in found)
    assert load_file(tmp_path / "a/pytorch_lora_weights.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["fashion_teacher", "fashion_lcm"])
def test_bundled_text_encoders(name: str) -> None:
    assert {key.split(".")[0] for key in names(ASSETS / name / "text_encoder" / "model.safetensors")} == {"text_model"}


def test_bundled_lora() -> None:
    entries = lora_fields(ASSETS / "fashion_lcm_lora")
    assert set(entries) == {"r", "lora_alpha", "lora_dropout", "target_modules"}
    assert (entries["r"], entries["lora_alpha"]) == (16, 16)
