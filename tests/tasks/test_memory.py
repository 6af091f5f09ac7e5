"""What a distillation keeps in memory, and the estimate that recipes and the guide promise."""

import json
import re
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan, DiffusionPipeline
from flow_models import whole_student
from safetensors.torch import load_file
from scripts import FOLDER, data_flags, image_folder, run_script, script
from tiny import tiny_pipeline
from tiny_flow import tiny_sd3, tiny_sd3_transformer
from tiny_flow_a import tiny_sana, tiny_sana_transformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cm_diffusers.data.encoders import Encoders
from cm_diffusers.engine.cli import parse_words
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.errors import UserError
from cm_diffusers.models.adapters import add_lora
from cm_diffusers.models.students import StudentConfig
from cm_diffusers.tasks import memory, text_to_image
from cm_diffusers.tasks.memory import GIB, IMAGES, TEXT, TRAINING, Shape, adapter_parameters, network_bytes, peak


sys.path.append(str(FOLDER.parent / "benchmarks"))
import gpu_table


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
    _, _, student, data, _, clips, _, optim, train, *_ = configs = parse_words(
        script("estimate_memory").CONFIGS, "", given
    )
    shape = shape_of(SHAPES[recipe])
    return memory.estimate(shape, student, optim, train, data, clips, text_to_image.text_dtype(configs))


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
    assert found[TEXT]["T5-XXL"] / GIB == pytest.approx(8.87, abs=0.01)
    for words in (
        ["--mixed_precision", "no", "--cast_teacher", "no"],
        ["--validation_prompts", "a coat"],
        ["--streaming"],
    ):
        assert estimated("lcm_lora_flux_dev", *words)[TEXT]["T5-XXL"] / GIB == pytest.approx(17.74, abs=0.01)
    assert peak(found) == sum(found[TRAINING].values())
    four_bits = estimated("lcm_lora_flux_dev", "--quantize_teacher", "bnb_4bit")[TRAINING]
    assert four_bits["frozen base"] / GIB == pytest.approx(22.17 * 4.5 / 16, abs=0.02)
    plain = estimated("lcm_lora_flux_dev", "--gradient_checkpointing", "false")[TRAINING]["activations"]
    assert plain / found[TRAINING]["activations"] == pytest.approx(57 * 34 / (57 * 2 + 34))


def test_a_lora_of_wan_on_clips() -> None:
    clips, plain = (estimated("lcm_lora_wan_1_3b", *words)[TRAINING] for words in ([], ["--sample_n_frames", "5"]))
    # 30 x 30 tokens of width 1536 in each of 21 latent frames: 30 inputs of 2 bytes, and a block of 34
    assert clips["activations"] == 21 * 30 * 30 * 1536 * (30 * 2 + 34)
    assert clips["activations"] / plain["activations"] == 21 / 2
    with pytest.raises(UserError, match=r"--sample_n_frames 80 is not 4k .* take 77 or 81"):
        estimated("lcm_lora_wan_1_3b", "--sample_n_frames", "80")
    with pytest.raises(UserError, match="--sample_n_frames is for teachers of videos"):
        estimated("lcm_lora_flux_dev", "--sample_n_frames", "81")


@pytest.mark.parametrize("recipe", SHAPES)
def test_what_a_recipe_promises_is_the_sum(recipe: str) -> None:
    images, text, training = (sum(sizes.values()) / GIB for sizes in estimated(recipe).values())
    encoding = max(images, text)
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
    network = {"_class_name": "UNet2DConditionModel"}
    sizes = {"network": network, "text_towers": {}, "vae": 1, "vae_states": 1, "text_tokens": 0}
    (tmp_path / "a.json").write_text(json.dumps(sizes | {"pixels_per_token": 8}))
    with pytest.raises(SystemExit, match="transformers of equal blocks, not for UNet2DConditionModel"):
        run_script("estimate_memory", shape=tmp_path / "a.json", pretrained_teacher_model="a")


def test_the_command(capsys) -> None:
    run_script("estimate_memory", recipe="lcm_lora_flux_dev", shape="shape_flux_dev")  # bitsandbytes need not be here
    said = capsys.readouterr().out
    assert "| while it encodes images | activations | 2.50 |" in said
    assert "| while it trains | **sum** | **27.7** |" in said
    assert said.strip().endswith("| **peak** | | **27.7** |")


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are there, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> object:
        made = function(*args, **(kwargs or {}))
        for storage in [one.untyped_storage() for one in tree_leaves(made) if isinstance(one, torch.Tensor)]:
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage.nbytes())
        self.most = max(self.most, self.now)
        return made

    def forget(self, size: int) -> None:
        self.now -= size


LEVELS = (128, 256, 512, 512)
VAES = {
    "shape_flux_dev": (AutoencoderKL, {
        "block_out_channels": LEVELS, "layers_per_block": 2, "latent_channels": 16, "use_quant_conv": False,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_post_quant_conv": False,
    }),
    "shape_sana_600m": (AutoencoderDC, {
        "encoder_block_out_channels": (*LEVELS, 1024, 1024), "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
        "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)), "downsample_block_type": "conv",
    }),
    "shape_qwen_image": (AutoencoderKLQwenImage, {}),
    "shape_wan_1_3b": (AutoencoderKLWan, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", VAES)
def test_the_states_of_a_vae_are_counted(name: str) -> None:
    """Of the published configs, but for the decoder of Sana's; at the sizes of the guide the share of the edges is less."""
    (kind, config), side = VAES[name], 256
    shape, clips = shape_of(name), name in ("shape_qwen_image", "shape_wan_1_3b")
    with torch.device("meta"), torch.no_grad():
        vae = kind(**config).eval()
        if kind is not AutoencoderDC:
            assert sum(p.numel() for p in vae.parameters()) == shape.vae
        pixels = torch.zeros(1, 3, *([1] if clips else []), side, side)
        with Live() as live:
            vae.encode(pixels)
    assert live.most / 4 / side**2 == pytest.approx(shape.vae_states, rel=0.02)


def test_images_that_are_encoded_at_once_count() -> None:
    """The default, 32 of 1024 pixels, asks for more than all else."""
    found = estimated("lcm_lora_flux_dev", "--encode_batch_size", "32")
    assert found[IMAGES]["activations"] == 32 * 640 * 1024**2 * 4
    assert peak(found) == sum(found[IMAGES].values()) > 80 * GIB
    half = estimated("lcm_lora_flux_dev", "--encode_batch_size", "32", "--vae_dtype", "bfloat16")
    assert peak(half) == peak(found) / 2


@pytest.mark.parametrize("recipe", SHAPES)
def test_the_guide_says_which_gpu(recipe: str) -> None:
    assert gpu_table.row(recipe) in GUIDE


def test_a_gpu_has_a_little_to_spare() -> None:
    assert [gpu_table.enough(size * GIB) for size in (10.0, 14.1, 78.0)] == ["12 GB", "24 GB", "80 GB"]


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
