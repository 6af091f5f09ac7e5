"""Cards of students of flows: the code in them draws what the student is."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny_flow import tiny_sd3
from tiny_flow_a import tiny_sana, tiny_wan
from tiny_flow_b import tiny_flux, tiny_qwen_image, tiny_z_image

from cm_diffusers.models.adapters import add_lora
from cm_diffusers.models.families.base import tag_of
from cm_diffusers.publishing.model_card import model_card
from cm_diffusers.publishing.pipelines import lcm_pipeline, lcm_record, save_lora, save_pipeline
from cm_diffusers.publishing.provenance import Provenance, describe_run
from cm_diffusers.publishing.sharing import ShareConfig, prepare
from cm_diffusers.record import Record
from cm_diffusers.schedulers import FlowConsistencyScheduler


TAGS = {tiny_sd3: "sd3", tiny_sana: "sana", tiny_flux: "flux", tiny_qwen_image: "qwen-image"} | {
    tiny_z_image: "z-image",
    tiny_wan: "wan",
}


def record(guidance: str = "distilled", scale: float = 1.0, gamma: float = 1.0, **fields: object) -> Record:
    scheduler = FlowConsistencyScheduler(shift=3.0, gamma=gamma)
    return replace(lcm_record("ada/teacher", guidance, 2.0, 4.0, scale, scheduler), **fields)


def provenance(tag: str, lora: bool = False) -> Provenance:
    settings = {"lora": lora, "seed": 3}
    licence = {"license": "apache-2.0"}
    return Provenance("ada/student", "ada/teacher", tag, "ada/photos", licence, "python x.py", "abc1234", settings)


def codes(card: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for code in found:
        ast.parse(code)
    return found


@pytest.mark.parametrize("make", TAGS, ids=lambda make: make.__name__)
def test_the_family_is_a_tag(make, tmp_path: Path) -> None:
    teacher = make()
    assert tag_of(teacher.transformer) == TAGS[make]
    told = describe_run([], teacher, "ada/teacher", "ada/photos", "ada/student")
    assert told.family == TAGS[make]
    front = yaml.safe_load(model_card(record(), told).split("---\n")[1])
    assert front["tags"][-1] == TAGS[make]
    assert front["pipeline_tag"] == ("text-to-video" if make is tiny_wan else "text-to-image")


def test_calls_are_those_of_the_family() -> None:
    def alone(tag: str, lora: bool = False, **fields: object) -> str:
        return codes(model_card(record(**fields), provenance(tag, lora)))[1]

    assert "sigmas=[1.0, 0.75, 0.5, 0.25], guidance_scale=1.0" in alone("sd3")
    assert "sigmas=[1.0, 0.666667, 0.333333]" in alone("sana", recommended_num_inference_steps=3)
    assert "num_inference_steps=4, guidance_scale=1.0" in alone("sd3", gamma=0.0)
    assert "num_inference_steps=4, guidance_scale=3.5" in alone("flux", guidance="embedded", scale=3.5)
    assert "num_inference_steps=4, true_cfg_scale=1.0" in alone("qwen-image")
    assert "num_inference_steps=4, guidance_scale=0.0, height=64, width=64)" in alone("z-image", resolution=64)
    assert "num_inference_steps=5, guidance_scale=1.0, num_frames=9).frames[0]" in alone("wan", num_frames=9)
    assert "FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)" in alone("sd3", lora=True)
    assert "FlowMapEulerDiscreteScheduler(shift=3.0)" in alone("wan", lora=True, gamma=0.0)
    assert "frames = pipe(" in alone("wan", lora=True)


def test_guidance_is_told_in_the_words_of_the_pipeline() -> None:
    def card(tag: str, **fields: object) -> str:
        return model_card(record(**fields), provenance(tag))

    assert "(`guidance_scale` 3 to 5) is in the weights: sample with `guidance_scale` 1. Up to about 2" in card("sd3")
    assert "(`guidance_scale` 2 to 4) is in the weights: sample with `guidance_scale` 0. Up to about 1" in card(
        "z-image"
    )
    assert "(`true_cfg_scale` 3 to 5) is in the weights: sample with `true_cfg_scale` 1." in card("qwen-image")
    embedded = card("flux", guidance="embedded", scale=3.5)
    assert "trained on `guidance_scale` 3 to 5 (3.5 is a good" in embedded
    assert "there is no negative prompt" in embedded


def test_comfyui_is_named_where_its_table_has_the_names() -> None:
    card = model_card(record(), provenance("sd3", lora=True))
    shifted = "the scheduler `simple`, the node `{}` with {}, 4 steps"
    assert f"sampler `lcm`, {shifted.format('ModelSamplingSD3', 'shift 3')}, CFG 1 and strength 1" in card
    for tag, node in {"wan": "SD3", "qwen-image": "AuraFlow", "z-image": "AuraFlow"}.items():
        card = model_card(record(), provenance(tag, lora=True))
        assert shifted.format(f"ModelSampling{node}", "shift 3") in card
    told = model_card(record("embedded", 3.5, 0.0), provenance("flux", lora=True))
    flux = shifted.format("ModelSamplingFlux", "max_shift and base_shift 1.10")  # exp(1.10) = 3.00
    assert f"sampler `euler`, {flux}, guidance 3.5, CFG 1" in told
    assert "ComfyUI" not in model_card(record(), provenance("sana", lora=True))
    assert "ComfyUI" not in model_card(record(), provenance("sd3"))


@pytest.mark.parametrize(
    ("make", "layer", "known"),
    [
        (tiny_wan, "to_q", True),
        (tiny_wan, "time_embedder.linear_1", False),
        (tiny_sd3, "time_text_embed.timestep_embedder.linear_1", True),
    ],
)
def test_comfyui_is_named_where_every_layer_has_a_name(make, layer: str, known: bool, tmp_path: Path) -> None:
    network = add_lora(make().transformer, 4, 8.0, 0.0, [layer])
    told = replace(provenance(TAGS[make], lora=True), name="student")
    save_lora(network, tmp_path / "student", record(), told)
    assert ("ComfyUI" in (tmp_path / "student/README.md").read_text()) == known
    prepare(ShareConfig(str(tmp_path / "student")))
    assert ("ComfyUI" in (tmp_path / "student/README.md").read_text()) == known


def test_the_noise_of_stock_pipelines_is_told() -> None:
    assert "without your generator:" in model_card(record(), provenance("sd3"))
    assert "With diffusers alone:" in model_card(record(gamma=0.0), provenance("sd3"))


@pytest.mark.parametrize("lora", [False, True], ids=["student", "lora"])
def test_the_code_runs(lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    teacher, scheduler = tiny_z_image(), FlowConsistencyScheduler(shift=3.0)
    teacher.save_pretrained("teacher")
    told = replace(provenance("z-image", lora), name="student")
    made = record(base_model="teacher", resolution=32)
    if lora:
        save_lora(add_lora(teacher.transformer, 4, 8.0, 0.0), Path("student"), made, told)
    else:
        save_pipeline(lcm_pipeline(teacher, teacher.transformer, scheduler), Path("student"), False, made, told)
    blocks = codes(Path("student/README.md").read_text())
    assert len(blocks) == 2
    blocks[0] = blocks[0].replace('"your prompt"', '"your prompt", height=32, width=32')
    images = []
    for code in blocks:
        torch.manual_seed(0)
        names = {}
        exec(code, names)
        images.append(names["image"])
    assert [image.size for image in images] == [(32, 32), (32, 32)]
