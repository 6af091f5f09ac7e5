"""A LoRA of a flow transformer gives, from its shared file and the stock loader, the network that was trained."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_flow import tiny_sd3
from tiny_flow_a import tiny_sana, tiny_wan
from tiny_flow_b import tiny_flux, tiny_flux2, tiny_qwen_image, tiny_z_image
from torch import Tensor, nn

from cm_diffusers.models.adapters import adapter_layers
from cm_diffusers.pipelines.lora import load_lora
from cm_diffusers.publishing.lora_export import Lora
from cm_diffusers.publishing.pipelines import lcm_record, save_lora
from cm_diffusers.schedulers import FlowConsistencyScheduler


TOP = "pytorch_lora_weights.safetensors"
RANK, ALPHA = 4, 8
NAMES = {  # pipeline -> a layer, its name in the shared file, endings of the file's names
    tiny_sd3: ("transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_q", False),
    tiny_sana: ("transformer_blocks.0.attn1.to_q", "transformer.transformer_blocks.0.attn1.to_q", False),
    tiny_flux: ("transformer_blocks.0.ff.net.2", "transformer.transformer_blocks.0.ff.net.2", False),
    tiny_flux2: ("transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_q", False),
    tiny_qwen_image: ("transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.attn.to_out.0", True),
    tiny_z_image: ("layers.0.feed_forward.w1", "diffusion_model.layers.0.feed_forward.w1", True),
    tiny_wan: ("blocks.1.attn2.to_out.0", "diffusion_model.blocks.1.cross_attn.o", True),
}
ALL = pytest.mark.parametrize("make", NAMES, ids=lambda make: make.__name__)


def linear(network: nn.Module, inside: str = "") -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and inside in name]


def adapted(make: Callable[[], DiffusionPipeline], inside: str = "", **config: object) -> nn.Module:
    network = make().transformer
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": linear(network, inside), "init_lora_weights": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network.add_adapter(LoraConfig(**{**settings, **config}))
    return network.eval()


def deltas(network: nn.Module) -> dict[str, Tensor]:
    """What each adapted layer adds to its weights."""
    layers = {path: one for path, one in network.named_modules() if one in set(adapter_layers(network))}
    return {path: layer.get_delta_weight(next(iter(layer.lora_A))) for path, layer in layers.items()}


def published(network: nn.Module, folder: Path, fp16: bool = False) -> Path:
    record = lcm_record("somebody/base", "distilled", 6.0, 6.0, 1.0, FlowConsistencyScheduler(shift=3.0))
    save_lora(network, folder, record, fp16=fp16)
    return folder


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert max(value.abs().max() for value in wanted.values()) > 1e-3
    for path, value in wanted.items():
        torch.testing.assert_close(found[path], value, atol=1e-7, rtol=1e-6)


@ALL
def test_the_stock_loader_puts_every_layer_back(make: Callable[[], DiffusionPipeline], tmp_path: Path) -> None:
    network = adapted(make, "blocks." if make is tiny_wan else "")
    folder = published(network, tmp_path / "lora")
    stock = make()
    stock.load_lora_weights(folder, weight_name=TOP)
    assert_same(deltas(stock.transformer), deltas(network))
    path, name, alphas = NAMES[make]
    down = f"{name}.lora_{'down' if alphas else 'A'}.weight"
    tensors = load_file(folder / TOP)
    assert torch.equal(tensors[down], network.get_submodule(path).lora_A["default"].weight)
    assert sum(key.endswith(".alpha") for key in tensors) == (len(deltas(network)) if alphas else 0)


@ALL
def test_ours_take_the_exact_form(make: Callable[[], DiffusionPipeline], tmp_path: Path) -> None:
    network = adapted(make, rank_pattern={r"\d.*to_q": 2}, alpha_pattern={r"\d.*to_k": 3})
    folder = published(network, tmp_path / "lora", fp16=True)
    pipe = make()
    load_lora(pipe, folder)
    found, wanted = deltas(pipe.transformer), deltas(network)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[path], value) for path, value in wanted.items())
    shared = {name: value.dtype for name, value in load_file(folder / TOP).items()}
    assert {dtype for name, dtype in shared.items() if "lora_" in name} == {torch.bfloat16}  # float16 ends at 65504


@pytest.mark.parametrize("make", [tiny_sd3, tiny_flux, tiny_qwen_image, tiny_z_image], ids=lambda make: make.__name__)
def test_ranks_and_alphas_of_single_layers_survive(make: Callable[[], DiffusionPipeline], tmp_path: Path) -> None:
    network = adapted(make, rank_pattern={r"\d.*to_q": 2}, alpha_pattern={r"\d.*to_k": 3})
    stock = make()
    stock.load_lora_weights(published(network, tmp_path / "lora"), weight_name=TOP)
    assert_same(deltas(stock.transformer), deltas(network))


def test_upstream_knows_only_some_of_flux_layers_by_names_with_alphas(tmp_path: Path) -> None:
    """Why Flux has the form without alphas. When this fails, upstream has mended it."""
    lora = Lora.of(adapted(tiny_flux))
    names = {path: f"lora_transformer_{path.replace('.', '_')}" for path in lora.alphas}
    save_file(lora._replace(names=names).kohya(torch.float32), tmp_path / TOP)
    with pytest.raises(KeyError):
        tiny_flux().load_lora_weights(tmp_path, weight_name=TOP)


def test_wan_outside_its_blocks_gets_the_form_without_alphas(tmp_path: Path) -> None:
    network = adapted(tiny_wan)
    folder = published(network, tmp_path / "lora")
    assert all(name.startswith("transformer.") for name in load_file(folder / TOP))
    stock = tiny_wan()
    stock.load_lora_weights(folder, weight_name=TOP)
    assert_same(deltas(stock.transformer), deltas(network))


def test_the_header_says_nothing_of_unets(tmp_path: Path) -> None:
    folder = published(adapted(tiny_sd3), tmp_path / "lora")
    with safe_open(folder / TOP, "pt") as file:
        told = file.metadata()
    assert told["modelspec.title"] == "lcm_lora_base"
    assert not [name for name in told if name.startswith("ss_") or "prediction" in name]
    config = json.loads((folder / "peft/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
