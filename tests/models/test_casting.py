"""A network in another precision than its files' is what diffusers would make of them, in less memory."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import save_file
from tiny import tiny_pipeline, tiny_unet

from cm_diffusers.models.students import StudentConfig, make_networks
from cm_diffusers.models.teachers import TeacherConfig, load_teacher
from cm_diffusers.publishing.single_file import original_layout


SHARDS = {"max_shard_size": "200KB"}
LAYOUTS = {
    "one": {},
    "shards": SHARDS,
    "variant": {"variant": "half"},
    "shards of a variant": SHARDS | {"variant": "half"},
}
STATUS = Path("/proc/self/status")


def stored(folder: Path, pipe: StableDiffusionPipeline, **layout: str) -> TeacherConfig:
    pipe.save_pretrained(folder, **layout)
    return TeacherConfig(str(folder), teacher_variant=layout.get("variant"))


def in_one_file(folder: Path, pipe: StableDiffusionPipeline) -> TeacherConfig:
    pipe.save_pretrained(folder)
    weights = {name: value.contiguous() for name, value in original_layout(pipe).items()}
    save_file(weights, folder / "model.safetensors")
    return TeacherConfig(str(folder / "model.safetensors"), single_file_config=str(folder))


@pytest.mark.parametrize("layout", [*LAYOUTS, "single file"])
def test_it_is_what_the_files_hold(layout: str, tmp_path) -> None:
    asked = torch.float32 if "variant" in layout else torch.bfloat16
    kept = torch.float16 if "variant" in layout else torch.float32
    pipe = tiny_pipeline()
    pipe.unet.to(kept)
    config = in_one_file(tmp_path, pipe) if layout == "single file" else stored(tmp_path, pipe, **LAYOUTS[layout])
    if "shards" in layout:
        assert len(list((tmp_path / "unet").glob("*-of-*.safetensors"))) > 1
    loaded = load_teacher(config, asked)
    weights = loaded.unet.state_dict()
    assert weights.keys() == pipe.unet.state_dict().keys()
    assert all(torch.equal(weights[name], value.to(asked)) for name, value in pipe.unet.state_dict().items())
    assert {value.dtype for value in weights.values()} == {asked}
    assert {p.dtype for p in loaded.vae.parameters()} == {torch.float32}
    assert not any(module.training for module in loaded.unet.modules())
    assert not any(p.requires_grad for p in loaded.unet.parameters())
    assert json.loads(loaded.unet.to_json_string()) == json.loads(pipe.unet.to_json_string())


def test_stale_weights_beside_shards_are_not_read(tmp_path) -> None:
    """As in diffusers, the shards count."""
    stored(tmp_path, tiny_pipeline(seed=1))
    stale = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    content, pipe = stale.read_bytes(), tiny_pipeline()
    config = stored(tmp_path, pipe, **SHARDS)
    stale.write_bytes(content)
    assert torch.equal(load_teacher(config, torch.bfloat16).unet.conv_in.weight, pipe.unet.conv_in.weight.bfloat16())


def test_files_of_the_hub(tmp_path, monkeypatch) -> None:
    """Fetched first, then cast from where they lie."""
    stored(tmp_path, tiny_pipeline())
    asked = []

    def download(source: str, **options: object) -> str:
        asked.append((source, options["revision"], options["use_safetensors"]))
        return str(tmp_path)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    loaded = load_teacher(TeacherConfig("nobody/teacher", teacher_revision="v1"), torch.bfloat16)
    assert loaded.unet.dtype == torch.bfloat16
    assert set(asked) == {("nobody/teacher", "v1", True)}


@pytest.mark.skipif(not STATUS.exists(), reason="the peak is told by Linux")
def test_no_whole_file_lies_beside_what_is_made_of_it(tmp_path, mapped) -> None:
    one = in_one_file(tmp_path, tiny_pipeline(unet=tiny_unet(block_out_channels=(32, 384))))
    (file,) = (tmp_path / "unet").glob("*.safetensors")
    for config in (TeacherConfig(str(tmp_path)), one):
        start = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak so far is forgotten
        teacher = load_teacher(config, torch.bfloat16)
        make_networks(teacher.unet, StudentConfig(lora=True, lora_rank=4, cast_teacher_unet="bf16"))
        assert resident("VmHWM") - start < file.stat().st_size, "half of it stays; its map would be another whole"


def resident(name: str) -> int:
    """Bytes."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text("ascii"))[1])
