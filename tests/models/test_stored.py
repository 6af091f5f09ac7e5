"""No loader fills gaps of a checkpoint by chance, takes integers for weights, or believes a record that does not fit."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scripts import models_folder
from tiny import tiny_pipeline
from tiny_flow_a import tiny_umt5

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation.sampling import load_pipeline
from cm_diffusers.models.stored import check_stored, check_weights, header
from cm_diffusers.models.teachers import TeacherConfig, load_teacher
from cm_diffusers.record import read_record, write_record
from cm_diffusers.tasks.finished_students import FinetuneConfig, load_student


LOADERS = {
    "teacher": lambda folder: load_teacher(TeacherConfig(str(folder))),
    "student": lambda folder: load_student(FinetuneConfig(str(folder))),
    "pipeline": ConsistencyPipeline.from_pretrained,
    "evaluation": lambda folder: load_pipeline(str(folder)),
}
FAULTS: dict[str, tuple[str, Callable[[dict], object], str]] = {
    "missing": ("unet", lambda w: w.pop("conv_in.bias"), "lacks weights (1, such as conv_in.bias)"),
    "missing in the VAE": ("vae", lambda w: w.pop("quant_conv.bias"), "lacks weights (1, such as quant_conv.bias)"),
    "extra": ("unet", lambda w: w.update(extra=torch.ones(1)), "has unknown weights (1, such as extra)"),
    "integers": (
        "unet",
        lambda w: w.update({"conv_in.bias": w["conv_in.bias"].char()}),
        "has quantized weights (1, such as conv_in.bias)",
    ),
    "no text tower": ("text_encoder", lambda w: w.clear(), "The text_encoder of "),
    "another shape": ("unet", lambda w: w.update({"conv_in.bias": torch.ones(3)}), "does not load: "),
    "not a number": ("vae", lambda w: w["quant_conv.bias"].fill_(torch.nan), "such as vae.quant_conv.bias"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return models_folder(tmp_path_factory.mktemp("models"))


def broken(models: Path, kind: str, folder: Path, fault: str) -> str:
    """Puts such a model there; the sentence to expect."""
    part, edit, sentence = FAULTS[fault]
    shutil.copytree(models / kind, folder)
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, {"format": "pt"})
    return sentence


def refusal(load: Callable, folder: Path) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 the caller compares
        load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_teacher_that_is_not_whole(models, tmp_path, fault: str) -> None:
    sentence = broken(models, "teacher", tmp_path / "broken", fault)
    assert sentence in refusal(LOADERS["teacher"], tmp_path / "broken")


@pytest.mark.parametrize("loader", ["student", "pipeline", "evaluation"])
def test_every_loader_refuses_it(models, tmp_path, loader: str) -> None:
    sentence = broken(models, "student", tmp_path / "broken", "missing")
    assert sentence in refusal(LOADERS[loader], tmp_path / "broken")


@pytest.mark.parametrize("loader", ["student", "pipeline", "evaluation"])
def test_a_record_that_contradicts_its_network(models, tmp_path, loader: str) -> None:
    shutil.copytree(models / "student", tmp_path / "student")
    write_record(replace(read_record(tmp_path / "student"), guidance="embedded"), tmp_path / "student")
    assert refusal(LOADERS[loader], tmp_path / "student") == (
        f"{tmp_path / 'student'} is not as it was published: the record says that guidance is 'embedded', but this network takes "
        "no embedding of guidance; get it anew."
    )


def test_what_published_files_are_stored_with(tmp_path) -> None:
    """Shards, variants, positions among the weights, and the former names of a VAE's attention."""
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="200KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    text = tmp_path / "text_encoder" / "model.fp16.safetensors"
    state = pipe.text_encoder.state_dict()  # transformers before 5.6 has the prefix itself
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in state.items()}
    save_file(weights | {"text_model.embeddings.position_ids": torch.arange(16)[None]}, text, {"format": "pt"})
    (vae,) = (tmp_path / "vae").glob("*.safetensors")
    former = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = load_file(vae)
    for new, old in former.items():
        weights = {name.replace(new, old): value for name, value in weights.items()}
    save_file(weights, vae, {"format": "pt"})
    check_stored(pipe, tmp_path, "fp16")
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    save_file({"other": torch.ones(1)}, vae)
    check_stored(pipe, tmp_path, "fp16")  # of another network than the pipeline has


@pytest.mark.parametrize(
    "content", [b"", b"\x02", b"\x09" + bytes(7) + b"{", b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"\xff\xff"]
)
def test_a_header_that_is_none_is_one_sentence(tmp_path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.safetensors is no whole safetensors file \(.+\); get it anew\.$"):
        header(tmp_path / "a.safetensors")


def test_a_tensor_of_two_names_is_stored_once() -> None:
    tower = tiny_umt5()
    dtypes = dict.fromkeys(tower.state_dict(), "F32")
    for name in ("encoder.embed_tokens.weight", "shared.weight"):
        check_weights("T5", tower, {other: dtype for other, dtype in dtypes.items() if other != name})
    del dtypes["encoder.embed_tokens.weight"], dtypes["shared.weight"]
    with pytest.raises(UserError, match=r"T5 lacks weights \(1, such as encoder\.embed_tokens\.weight\)"):
        check_weights("T5", tower, dtypes)
