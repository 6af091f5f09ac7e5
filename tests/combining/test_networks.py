"""Combinations in networks: all weights, and LoRAs by what they add, never by the average of their factors."""

from pathlib import Path

import pytest
import torch
from finished_runs import STEPS, TARGETS, snapshot
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tiny import tiny_unet
from torch import Tensor

from cm_diffusers.combining.networks import LoraNetwork, WholeNetwork, nearest
from cm_diffusers.combining.weights import Snapshots
from cm_diffusers.engine.snapshots import FOLDER, list_weights
from cm_diffusers.models.adapters import add_lora
from cm_diffusers.models.time_weight import WithTimeWeight


ALPHAS = [1.4, -0.7, 0.3]
RANK, SCALE = 2, 3.0


def output(unet: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, states = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 32, generator=generator)
    with torch.no_grad():
        return unet.eval()(x, torch.tensor([500]), states).sample


@pytest.mark.parametrize("with_head", [False, True], ids=["network", "network with the head of its loss"])
def test_a_whole_network_gets_the_sum(tmp_path: Path, with_head: bool) -> None:
    unet = tiny_unet()
    student = WithTimeWeight(unet) if with_head else unet
    for step in STEPS:
        snapshot(tmp_path, step, student)
    prefix, states = "network." if with_head else "", [load_file(one.path) for one in list_weights(tmp_path)]
    published = tiny_unet()
    WholeNetwork(published, Snapshots(list_weights(tmp_path))).put(ALPHAS)
    for name, value in published.state_dict().items():
        exact = sum(a * one[prefix + name].double() for a, one in zip(ALPHAS, states, strict=True))
        torch.testing.assert_close(value, exact.float(), atol=0, rtol=2**-23)


def test_what_did_not_train_stays(tmp_path: Path) -> None:
    unet = tiny_unet()
    frozen = unet.conv_in.weight.requires_grad_(False).clone()
    for step in STEPS:
        snapshot(tmp_path, step, unet)
    WholeNetwork(unet, Snapshots(list_weights(tmp_path))).put(ALPHAS)
    assert torch.equal(unet.conv_in.weight, frozen)


def test_snapshots_of_another_network_are_refused(tmp_path: Path) -> None:
    snapshot(tmp_path, 1, tiny_unet(cross_attention_dim=16))
    snapshots = Snapshots(list_weights(tmp_path))
    with pytest.raises(
        ValueError, match=r"step-1.* is of another network than the published pipeline: \d+ weights differ"
    ):
        WholeNetwork(tiny_unet(), snapshots)
    with pytest.raises(ValueError, match=r"is of another LoRA than the published one: \d+ layers differ, such as"):
        LoraNetwork(add_lora(tiny_unet(), RANK, 6.0, 0.0, TARGETS), snapshots)


def lora(run: Path, rank: int | None = None) -> LoraNetwork:
    """On three snapshots of random factors in `run`, all on one base."""
    torch.manual_seed(0)
    unet = add_lora(tiny_unet(), RANK, SCALE * RANK, 0.5, TARGETS).eval()
    if not (run / FOLDER).exists():
        for step in STEPS:
            snapshot(run, step, unet, 0.3)
    return LoraNetwork(unet, Snapshots(list_weights(run)), rank)


def layers(unet: torch.nn.Module) -> dict[str, BaseTunerLayer]:
    return {path: one for path, one in unet.named_modules() if isinstance(one, BaseTunerLayer)}


def updates(run: Path) -> dict[str, Tensor]:
    """sum_i alpha_i scale B_i A_i of each layer as PEFT itself computes them, with each snapshot loaded in turn."""
    network, total = lora(run).network, {}
    for alpha, one in zip(ALPHAS, list_weights(run), strict=True):
        network.load_state_dict(load_file(one.path), strict=False)
        for path, layer in layers(network).items():
            total[path] = total.get(path, 0) + alpha * layer.get_delta_weight("default").detach().double()
    return total


def bare(found: LoraNetwork) -> torch.nn.Module:
    """The network without adapters, with the weights of the layers below them."""
    unet, state = tiny_unet(), found.network.state_dict()
    unet.load_state_dict(
        {name.replace(".base_layer", ""): value for name, value in state.items() if "lora" not in name}
    )
    return unet


def test_in_the_search_the_layers_have_what_merged_loras_have(tmp_path: Path) -> None:
    found = lora(tmp_path)
    bases = {path: layer.base_layer.weight.clone() for path, layer in layers(found.network).items()}
    plain = output(bare(found))
    found.put([0.2, 0.2, 0.6])
    found.put(ALPHAS)  # nothing of what was there before is left
    wanted = updates(tmp_path)
    assert {layer.base_layer.weight.ndim for layer in layers(found.network).values()} == {2, 4}
    for path, layer in layers(found.network).items():
        torch.testing.assert_close(layer.base_layer.weight, (bases[path] + wanted[path]).float(), atol=1e-6, rtol=1e-5)
    assert (output(found.network) - plain).abs().max() > 0.01
    assert torch.equal(output(bare(found)), output(found.network))  # the adapters are off


def test_published_at_a_rank_for_all_it_is_the_same_network(tmp_path: Path) -> None:
    exact, published = lora(tmp_path), lora(tmp_path, 3 * RANK)
    exact.put(ALPHAS)
    published.put([1.0, 0.0, 0.0])
    published.put_published(ALPHAS)
    torch.testing.assert_close(output(published.network), output(exact.network), atol=1e-5, rtol=1e-4)
    for layer in layers(published.network).values():
        assert layer.scaling["default"] == SCALE
        assert layer.lora_A["default"].weight.shape[0] == layer.r["default"] == 3 * RANK
    assert (published.config.r, published.config.lora_alpha) == (6, 18.0)


@pytest.mark.parametrize("rank", [1, None, 4])
def test_published_at_a_lower_rank_it_is_the_nearest_lora(tmp_path: Path, rank: int | None) -> None:
    """Eckart and Young: what is lost are the smaller singular values; the average of the factors would lose more."""
    found = lora(tmp_path, rank)
    found.put_published(ALPHAS)
    states = [load_file(one.path) for one in list_weights(tmp_path)]
    for path, wanted in updates(tmp_path).items():
        layer, kept = layers(found.network)[path], rank or RANK
        flat = wanted.flatten(1)
        lost = torch.linalg.svdvals(flat)[kept:].square().sum().sqrt()
        error = (layer.get_delta_weight("default").double().flatten(1) - flat).norm()
        assert error.item() == pytest.approx(lost.item(), rel=1e-4)
        if rank is None:
            down, up = (
                sum(a * one[f"{path}.lora_{half}.default.weight"] for a, one in zip(ALPHAS, states, strict=True))
                for half in "AB"
            )
            averaged = SCALE * (up.flatten(1) @ down.flatten(1))
            assert (averaged - flat).norm() > 1.5 * error


def test_factors_of_fewer_singular_values_than_the_rank_are_filled_with_zeros() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 3, generator=generator).double(), torch.randn(4, 9, generator=generator).double()
    a, b = nearest(down, up, 8)
    assert a.shape == (8, 3)
    assert b.shape == (8, 9)
    torch.testing.assert_close(b.T @ a, up.T @ down)


def test_the_buffers_in_a_snapshot_of_a_lora_do_not_matter(tmp_path: Path) -> None:
    without = lora(tmp_path)
    without.put(ALPHAS)
    for one in list_weights(tmp_path):
        save_file(load_file(one.path) | {"pos_embed.pos_embed": torch.zeros(3)}, one.path)
    found = lora(tmp_path)
    found.put(ALPHAS)
    for path, layer in layers(found.network).items():
        assert torch.equal(layer.base_layer.weight, layers(without.network)[path].base_layer.weight)
