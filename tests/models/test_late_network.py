"""A frozen base in half precision or fewer bits, loaded after the encoders have done their work, for every family."""

import importlib.metadata
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline, PipelineQuantizationConfig
from tiny import tiny_pipeline
from tiny_flow import tiny_sd3, tiny_sd3_transformer
from tiny_flow_a import tiny_sana, tiny_wan
from tiny_flow_b import tiny_flux, tiny_klein, tiny_qwen_image, tiny_z_image
from torch import Tensor, nn

from cm_diffusers.data.ragged import trimmed
from cm_diffusers.diffusion.guidance import Conditions
from cm_diffusers.models.casting import kept_whole
from cm_diffusers.models.families.base import family_of, network_of
from cm_diffusers.models.quantization import check_quantization, quantization_config
from cm_diffusers.models.recomputation import recompute_activations
from cm_diffusers.models.students import StudentConfig, make_networks
from cm_diffusers.models.teachers import TeacherConfig, is_late, load_network, load_teacher
from cm_diffusers.types import Networks


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "unet": tiny_pipeline,
    "sd3": tiny_sd3,
    "sana": tiny_sana,
    "wan": tiny_wan,
    "flux": tiny_flux,
    "flux2": tiny_klein,
    "qwen-image": tiny_qwen_image,
    "z-image": tiny_z_image,
}
HALF = {"lora": True, "lora_rank": 2, "lora_alpha": 2.0, "cast_teacher_unet": "bf16"}


def inputs(pipe: DiffusionPipeline) -> tuple[Tensor, Tensor, Conditions]:
    """Latents, times and conditions of two images."""
    family = family_of(network_of(pipe))
    with torch.no_grad():
        cond = family.encode(pipe, ["a photo of a bag", "a coat"])
        latents = family.latents(pipe.vae)
        x = latents.of_network(latents.encode(pipe.vae, torch.randn(2, 3, 32, 32))[0])
    if family.guidance(network_of(pipe)) == "embedded":
        cond = family.told(network_of(pipe))(cond, torch.tensor([1.0, 3.0]))
    process = family.process(pipe)
    t = torch.tensor([0.25, 0.75]) if not hasattr(process, "alphas_cumprod") else torch.tensor([250, 750])
    return x, t, cond


@pytest.mark.parametrize("name", ["unet", "sd3", "sana", "wan"])
def test_it_is_what_diffusers_loads(name: str, tmp_path: Path) -> None:
    """Also where a class keeps some of its modules in float32."""
    pipe = PIPELINES[name]()
    pipe.save_pretrained(tmp_path)
    config, kind = TeacherConfig(str(tmp_path)), type(network_of(pipe))
    teacher = load_teacher(config, torch.bfloat16, late=True)
    assert is_late(network_of(teacher))
    assert not any(p.is_meta for p in [*teacher.vae.parameters(), *teacher.text_encoder.parameters()])
    load_network(teacher, config, torch.bfloat16)
    stock = kind.from_pretrained(tmp_path, subfolder=family_of(network_of(pipe)).network, torch_dtype=torch.bfloat16)
    found, wanted = network_of(teacher).state_dict(), stock.state_dict()
    assert {key: value.dtype for key, value in found.items()} == {key: value.dtype for key, value in wanted.items()}
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    make_networks(network_of(teacher), StudentConfig(**HALF))
    kept = {value.dtype for key, value in wanted.items() if not kept_whole(kind).isdisjoint(key.split("."))}
    assert kept == ({torch.float32} if name == "wan" else set())
    after = {key.replace(".base_layer", ""): value for key, value in network_of(teacher).state_dict().items()}
    assert {key: after[key].dtype for key in wanted} == {key: value.dtype for key, value in wanted.items()}


@pytest.mark.parametrize("name", PIPELINES)
def test_what_is_made_without_weights_takes_those_of_another_process(name: str, tmp_path: Path) -> None:
    """Each tensor has the other's form, or sending it would hang; of those that are made, only buffers take memory."""
    PIPELINES[name]().save_pretrained(tmp_path)
    config = TeacherConfig(str(tmp_path))
    full = family_of(network_of(load_teacher(config, late=True))).student is not None
    for student in (
        StudentConfig(**HALF),
        StudentConfig(cast_teacher_unet="bf16") if full else StudentConfig(lora=True),
    ):
        late, whole = (load_teacher(config, student.loaded_dtype, late=True) for _ in range(2))
        load_network(whole, config, student.loaded_dtype)
        made, wanted = (make_networks(network_of(pipe), student) for pipe in (late, whole))
        assert forms(made) == forms(wanted)
        assert all(p.is_meta for _, network in made.items() for p in network.parameters())
        assert not any(p.is_meta for _, network in wanted.items() for p in network.parameters())


def forms(nets: Networks) -> list[tuple]:
    found = [
        (name, key, p) for name, net in nets.items() for key, p in [*net.named_parameters(), *net.named_buffers()]
    ]
    return [(name, key, p.shape, p.dtype, p.requires_grad) for name, key, p in found]


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_on_a_base_in_half_precision(name: str, checkpointing: bool) -> None:
    """Student = teacher at first, and only float32 adapters learn; recomputed activations give the same gradients."""
    torch.manual_seed(0)
    pipe = PIPELINES[name]()
    network, (x, t, cond) = network_of(pipe), inputs(pipe)
    nets = make_networks(network, StudentConfig(**HALF))
    plain = gradients(nets, x, t, cond)
    assert plain
    assert {grad.dtype for grad in plain.values()} == {torch.float32}
    assert all(".lora_" in key for key in plain)
    assert any(grad.abs().max() > 0 for grad in plain.values())
    if checkpointing:
        recompute_activations(network)
        assert network.is_gradient_checkpointing
        again = gradients(nets, x, t, cond)
        assert again.keys() == plain.keys()
        for key, grad in again.items():
            torch.testing.assert_close(grad, plain[key], rtol=1e-5, atol=1e-8)


def gradients(nets: Networks, x: Tensor, t: Tensor, cond: Conditions) -> dict[str, Tensor]:
    call = family_of(nets.student).call
    nets.student.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            taught = call(nets.teacher, x, t, cond)
        output = call(nets.student, x, t, cond)
    assert torch.equal(output, taught)
    output.float().square().mean().backward()
    return {key: p.grad.clone() for key, p in nets.student.named_parameters() if p.grad is not None}


def test_a_network_that_cannot_recompute() -> None:
    network = tiny_sd3_transformer()
    network._supports_gradient_checkpointing = False
    with pytest.raises(
        ValueError, match="--gradient_checkpointing is nothing that diffusers' SD3Transformer2DModel can do"
    ):
        recompute_activations(nn.ModuleList([network]))


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("bnb_8bit", {"load_in_8bit": True, "load_in_4bit": False}),
        (
            "bnb_4bit",
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
        ),
    ],
)
def test_what_diffusers_is_told(kind: str, wanted: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bitsandbytes, which needs a GPU to do it: the network alone is quantized, as it is read."""
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.50" if name == "bitsandbytes" else version(name)
    )
    tiny_sd3().save_pretrained(tmp_path)
    config, load, told = TeacherConfig(str(tmp_path)), DiffusionPipeline.from_pretrained, []
    teacher = load_teacher(config, torch.bfloat16, late=True)
    vae = teacher.vae

    def listen(source: str, quantization_config: PipelineQuantizationConfig, **options: object) -> DiffusionPipeline:
        told.append((quantization_config, options["dtype"]["transformer"], options["vae"], "transformer" in options))
        return load(source, **options)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", listen)
    load_network(teacher, config, torch.bfloat16, quantization_config(kind, torch.bfloat16, "transformer"))
    ((given, dtype, part, is_given),) = told
    assert list(given.quant_mapping) == ["transformer"]
    quantizer = given.quant_mapping["transformer"]
    assert isinstance(quantizer, BitsAndBytesConfig)
    assert {name: getattr(quantizer, name) for name in wanted} == wanted
    assert (dtype, part is vae, is_given) == (torch.bfloat16, True, False)


@pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
def test_int8_weights_on_a_cpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipe = tiny_sd3()
    pipe.save_pretrained(tmp_path)
    x, t, cond = inputs(pipe)
    config = TeacherConfig(str(tmp_path))
    teacher = load_teacher(config, torch.bfloat16, late=True)
    load_network(teacher, config, torch.bfloat16, quantization_config("torchao_int8", torch.bfloat16, "transformer"))
    network = network_of(teacher)
    assert type(network.transformer_blocks[0].attn.to_q.weight).__name__ == "Int8Tensor"
    nets = make_networks(network, StudentConfig(**HALF, quantize_teacher="torchao_int8"))
    assert all(".lora_" in key for key in gradients(nets, x, t, cond))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted, found = (
            family_of(pipe.transformer).call(n, x, t, cond).float() for n in (pipe.transformer, nets.teacher)
        )
    assert 1e-4 < (found - wanted).norm() / wanted.norm() < 0.03


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
def test_text_towers_in_bfloat16_say_nearly_the_same(make: Callable[[], DiffusionPipeline], tmp_path: Path) -> None:
    """Those of a UNet stay in float32, and so does every VAE."""
    whole = make()
    whole.save_pretrained(tmp_path)
    pipe = load_teacher(TeacherConfig(str(tmp_path)), late=True, text_dtype=torch.bfloat16)
    towers = [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None]
    family = family_of(network_of(pipe))
    assert {tower.dtype for tower in towers} == {torch.float32 if family.network == "unet" else torch.bfloat16}
    assert pipe.vae.dtype == torch.float32
    with torch.no_grad():
        found, wanted = (trimmed(family.encode(p, ["a photo of a bag", ""])) for p in (pipe, whole))
    for name, value in wanted.items():
        off = found[name].float() - (value[:, : found[name].shape[1]] if value.ndim == 3 else value).float()
        assert off.norm() <= (0 if family.network == "unet" else 0.05) * value.float().norm()


@pytest.mark.parametrize(
    ("kind", "lora", "cast", "sentence"),
    [
        ("bnb_4bit", False, "bf16", "a full student is a copy of them: add --lora"),
        ("bnb_8bit", True, "no", "--cast_teacher is no: give --cast_teacher bf16"),
        ("torchao_int8", True, "fp16", "--cast_teacher is fp16: give --cast_teacher bf16"),
        ("bnb_4bit", True, "bf16", "--quantize_teacher bnb_4bit needs a GPU"),
    ],
)
def test_what_cannot_be_quantized(
    kind: str, lora: bool, cast: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    with pytest.raises(ValueError, match=sentence):
        check_quantization(kind, lora, cast)


def test_what_may_be_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for kind in ("no", "bnb_8bit", "bnb_4bit", "torchao_int8"):
        check_quantization(kind, lora=True, cast="bf16")
    check_quantization("no", lora=False, cast="no")
