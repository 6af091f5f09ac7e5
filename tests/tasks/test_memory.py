"""What a distillation keeps in memory, and the estimate that recipes and the guide promise."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from flow_models import whole_student
from safetensors.torch import load_file
from scripts import FOLDER, data_flags, image_folder, run_script, script
from tiny import tiny_pipeline
from tiny_flow import tiny_sd3, tiny_sd3_transformer
from tiny_flow_a import tiny_sana, tiny_sana_transformer
from torch import nn

from cm_diffusers.data.encoders import Encoders
from cm_diffusers.engine.cli import parse_words
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.models.adapters import add_lora
from cm_diffusers.models.students import StudentConfig
from cm_diffusers.tasks import memory, text_to_image
from cm_diffusers.tasks.memory import ENCODING, GIB, TRAINING, Shape, adapter_parameters, network_bytes


RECIPES = FOLDER / "recipes"
GUIDE = (FOLDER.parent / "docs" / "guides" / "flow_teachers.md").read_text()
SHAPES = {  # recipe -> sizes of its teacher
    "lcm_lora_sd35_medium": "shape_sd35_medium",
    "lcm_sana_600m": "shape_sana_600m",
    "lcm_lora_flux_dev": "shape_flux_dev",
    "lcm_lora_qwen_image": "shape_qwen_image",
    "lcm_lora_z_image": "shape_z_image",
    "lcm_lora_wan_1_3b": "shape_wan_1_3b",
}
PUBLISHED = {  # billions of parameters, GiB in bfloat16
    "shape_sd35_medium": (2.24, 4.2),
    "shape_sana_600m": (0.59, 1.1),
    "shape_flux_dev": (11.90, 22.2),
    "shape_qwen_image": (20.43, 38.1),
    "shape_z_image": (6.15, 11.5),
    "shape_wan_1_3b": (1.42, 2.6),
}
LORA = {"lora": True, "lora_rank": 2, "max_train_steps": 1, "learning_rate": 1e-3, "report_to": "none"}


def shape_of(name: str) -> Shape:
    return Shape.from_config(json.loads((RECIPES / f"{name}.json").read_text()))


def estimated(recipe: str, *words: str) -> dict[str, dict[str, float]]:
    given = ["--recipe", str(RECIPES / f"{recipe}.args"), "--shape", SHAPES[recipe], *words]
    _, _, student, data, _, _, optim, train, _ = configs = parse_words(script("estimate_memory").CONFIGS, "", given)
    shape = shape_of(SHAPES[recipe])
    return memory.estimate(shape, student, optim, train, data, text_to_image.text_dtype(configs))


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_the_published_sizes(name: str) -> None:
    """Section 1 of the papers and model cards; the T5, UMT5 and Gemma towers are counted in the same way."""
    network = shape_of(name).network
    assert all(p.is_meta for p in network.parameters())
    billions, gib = PUBLISHED[name]
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)
    assert network_bytes(network, torch.bfloat16) / GIB == pytest.approx(gib, abs=0.06)


def test_a_lora_of_flux() -> None:
    found = estimated("lcm_lora_flux_dev")
    training = {name: size / GIB for name, size in found[TRAINING].items()}
    assert training["frozen base"] == pytest.approx(22.17, abs=0.01)
    # 179.3 M parameters of rank 64: 4 bytes each, as much for gradients, and 2 for 8-bit Adam
    assert training["adapters"] == training["gradients"] == pytest.approx(179306496 * 4 / GIB)
    assert training["optimizer"] == pytest.approx(179306496 * 2 / GIB)
    # 4096 + 512 tokens of width 3072, 2 images: 57 inputs of 2 bytes, and a block of 34
    assert training["activations"] == pytest.approx(4608 * 3072 * 2 * (57 * 2 + 34) / GIB)
    assert sum(training.values()) == pytest.approx(27.74, abs=0.01)
    assert found[ENCODING]["T5-XXL"] / GIB == pytest.approx(8.87, abs=0.01)
    for words in (
        ["--mixed_precision", "no", "--cast_teacher", "no"],
        ["--validation_prompts", "a coat"],
        ["--streaming"],
    ):
        assert estimated("lcm_lora_flux_dev", *words)[ENCODING]["T5-XXL"] / GIB == pytest.approx(17.74, abs=0.01)
    four_bits = estimated("lcm_lora_flux_dev", "--quantize_teacher", "bnb_4bit")[TRAINING]
    assert four_bits["frozen base"] / GIB == pytest.approx(22.17 * 4.5 / 16, abs=0.02)
    plain = estimated("lcm_lora_flux_dev", "--gradient_checkpointing", "false")[TRAINING]["activations"]
    assert plain / found[TRAINING]["activations"] == pytest.approx(57 * 34 / (57 * 2 + 34))


@pytest.mark.parametrize("recipe", SHAPES)
def test_what_a_recipe_promises_is_the_sum(recipe: str) -> None:
    training, encoding = (sum(estimated(recipe)[moment].values()) / GIB for moment in (TRAINING, ENCODING))
    told = f"--shape {SHAPES[recipe]}: {training:.1f} GiB while it trains, {encoding:.1f} GiB while it encodes"
    text = (RECIPES / f"{recipe}.args").read_text()
    assert told in text
    assert "Not run on real weights" in text
    assert re.search(rf"`{recipe}.args` .*\| {training:.1f} \| {encoding:.1f} \|", GUIDE)


def test_a_full_student_has_copies() -> None:
    parts, number = estimated("lcm_sana_600m")[TRAINING], 591_747_872
    assert parts["student"] == parts["target"] == parts["gradients"] == parts["averages"] == 4 * number
    assert (parts["frozen teacher"], parts["optimizer"]) == (2 * number, 2 * number)


@pytest.mark.parametrize("make", [tiny_sd3_transformer, tiny_sana_transformer, lambda: tiny_pipeline().unet])
def test_adapters_are_counted_as_they_are_made(make) -> None:
    config = StudentConfig(lora=True, lora_rank=3)
    expected = adapter_parameters(make(), config)
    network = add_lora(make(), 3, 3.0, 0.0)
    assert expected == sum(p.numel() for p in network.parameters() if p.requires_grad)


def test_unets_are_refused(tmp_path: Path) -> None:
    sizes = {"network": {"_class_name": "UNet2DConditionModel"}, "text_towers": {}, "vae": 1, "text_tokens": 0}
    (tmp_path / "a.json").write_text(json.dumps(sizes | {"pixels_per_token": 8}))
    with pytest.raises(SystemExit, match="transformers of equal blocks, not for UNet2DConditionModel"):
        run_script("estimate_memory", shape=tmp_path / "a.json", pretrained_teacher_model="a")


def test_the_command(capsys) -> None:
    run_script("estimate_memory", recipe="lcm_lora_flux_dev", shape="shape_flux_dev")  # bitsandbytes need not be here
    assert "| while it trains | **sum** | **27.7** |" in capsys.readouterr().out


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, int]]]:
    """Bytes of a teacher's parts that are in memory: while it encodes, and when training starts."""
    found, batches, fit = {}, text_to_image.training_batches, text_to_image.Trainer.fit
    pipes: list[DiffusionPipeline] = []

    def watch(data: object, generation: object, teacher: DiffusionPipeline, *others: object) -> object:
        pipes.append(teacher)
        found["encoding"] = bytes_of(teacher)
        return batches(data, generation, teacher, *others)

    def train(trainer: object, stream: object) -> None:
        found["training"] = bytes_of(pipes[0])
        fit(trainer, stream)

    monkeypatch.setattr(text_to_image, "training_batches", watch)
    monkeypatch.setattr(text_to_image.Trainer, "fit", train)
    return found


def bytes_of(pipe: DiffusionPipeline) -> dict[str, int]:
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    kept = {name: [p for key, p in part.named_parameters() if ".lora_" not in key] for name, part in modules.items()}
    return {name: sum(p.nbytes for p in own if not p.is_meta) for name, own in kept.items()}


@pytest.mark.parametrize(
    ("script", "make", "name", "watched"),
    [
        ("distill_lcm", tiny_pipeline, "unet", False),
        ("distill_lcm", tiny_sana, "transformer", False),
        ("distill_lcm", tiny_pipeline, "unet", True),
        ("distill_lcm", tiny_sana, "transformer", True),
        ("distill_scott", tiny_pipeline, "unet", False),
        ("distill_scott", tiny_sana, "transformer", False),
    ],
)
def test_encoders_and_network_are_never_there_together(script, make, name, watched, live, tmp_path: Path) -> None:
    """A transformer's text towers are in bfloat16, as the run is, where they are not needed again."""
    image_folder(tmp_path / "data")
    pipe = make()
    pipe.save_pretrained(tmp_path / "teacher")
    whole = bytes_of(pipe)
    half = {"cast_teacher": "bf16", "mixed_precision": "bf16", "pretrained_teacher_model": tmp_path / "teacher"}
    seen = {"validation_prompts": ["a bag"], "validation_nfe": [1], "validation_teacher_steps": 1} if watched else {}
    flags = data_flags(tmp_path / "data", tmp_path / "cache") | LORA | half | seen | {"output_dir": tmp_path / "run"}
    if script == "distill_scott":
        flags |= {"adversarial_start": 0, "adversarial_ramp": 0, "critic_channels": 16}
    run_script(script, **flags)
    others = sum(size for part, size in whole.items() if part != name)
    small = name == "transformer" and not watched
    assert live["encoding"][name] == 0
    assert sum(live["encoding"].values()) == others - small * whole["text_encoder"] // 2
    assert live["training"][name] == whole[name] // 2
    assert sum(live["training"].values()) == whole[name] // 2 + others * watched
    assert load_file(tmp_path / "run" / "lora" / "peft" / "adapter_model.safetensors")


@pytest.mark.parametrize(("name", "late"), [("finetune_lcf", True), ("distill_scd", False)])
def test_other_adapters_outlive_the_encoders(name: str, late: bool, monkeypatch, tmp_path: Path) -> None:
    """And the network of an LCM is not there before."""
    pipes, encoding, training = [], {}, {}
    encoders, fit = Encoders.from_pipeline, Trainer.fit

    def watch(pipe: DiffusionPipeline) -> Encoders:
        pipes.append(pipe)
        encoding.update(bytes_of(pipe))
        return encoders(pipe)

    def train(trainer: Trainer, stream: object) -> None:
        training.update(bytes_of(pipes[0]))
        fit(trainer, stream)

    monkeypatch.setattr(Encoders, "from_pipeline", watch)
    monkeypatch.setattr(Trainer, "fit", train)
    image_folder(tmp_path / "data")
    start = {"finetune_lcf": "student", "distill_scd": "teacher"}[name]
    whole_student(tiny_sd3(), tmp_path / "sd3")
    flags = data_flags(tmp_path / "data", tmp_path / "cache") | LORA | {"output_dir": tmp_path / "run"}
    run_script(name, **flags, **{f"pretrained_{start}_model": tmp_path / "sd3" / start})
    assert (encoding.pop("transformer") == 0) == late
    assert training.pop("transformer") > 0
    assert all(encoding.values())
    assert not any(training.values())
    assert load_file(tmp_path / "run" / "lora" / "peft" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            {"lora_target_modules": ["nowhere"], "lora": True},
            "names no layer of the UNet2DConditionModel with nowhere",
        ),
        ({"quantize_teacher": "torchao_int8"}, "add --lora"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_encoded(flags, sentence, monkeypatch, tmp_path: Path) -> None:
    image_folder(tmp_path / "data")
    tiny_pipeline().save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(text_to_image, "training_batches", lambda *_: pytest.fail("encoded"))
    monkeypatch.setattr("cm_diffusers.extras.find_spec", lambda name: name)
    flags |= data_flags(tmp_path / "data", tmp_path / "cache") | {"output_dir": tmp_path / "run"}
    with pytest.raises(SystemExit, match=sentence):
        run_script("distill_lcm", pretrained_teacher_model=tmp_path / "teacher", **flags)
