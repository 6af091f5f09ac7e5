"""What is gathered by itself, what is refused, and the whole copy that is published; processes are in `test_distributed.py`."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny import tiny_unet, tiny_vae
from torch import nn
from toys import assert_same, toy_networks

from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.parts import filled, skeleton
from cm_diffusers.engine.sharding import Sharding
from cm_diffusers.models.adapters import add_lora
from cm_diffusers.models.time_weight import WithTimeWeight
from cm_diffusers.objectives.autoencoder import AutoencoderWithPosterior


ANY = Sharding(mesh=None, dtype=None, units=frozenset(), offloads=False)
NAMED = Sharding(mesh=None, dtype=None, units=frozenset(["Linear"]), offloads=False)


def test_blocks_come_from_the_inside_out() -> None:
    unet = tiny_unet()
    blocks = ANY.blocks(unet)
    kinds = {type(block).__name__ for block in blocks}
    listed = {"BasicTransformerBlock", "ResnetBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}  # ours, and diffusers'
    assert kinds == listed | {"Transformer2DModel"}  # a network in the network
    places = {id(block): place for place, block in enumerate(blocks)}
    inside = [
        (places[id(one)], places[id(b)]) for b in blocks for one in b.modules() if id(one) in places and one is not b
    ]
    assert len(inside) > 0
    assert all(inner < outer for inner, outer in inside)
    assert all(block is not unet for block in blocks)


def test_a_network_in_a_wrapper_is_gathered_by_itself_and_a_vae_is_not() -> None:
    unet, vae = tiny_unet(), tiny_vae()
    assert ANY.blocks(WithTimeWeight(unet))[-1] is unet  # pipelines call it without the wrapper
    found = ANY.blocks(AutoencoderWithPosterior(vae))
    assert {type(block).__name__ for block in found} == {"ResnetBlock2D"}  # encode and decode are no forward
    assert {type(block).__name__ for block in NAMED.blocks(unet)} == {"Linear", "Transformer2DModel"}


@pytest.mark.parametrize("name", ["adamw_8bit", "adamp"])
def test_optimizers_of_whole_weights_are_refused(name) -> None:
    with pytest.raises(ValueError, match=f"--optimizer {name} looks at whole weights, but they are sharded"):
        ANY.check(toy_networks(), [OptimConfig(), OptimConfig(optimizer=name)], False)


def test_blocks_that_no_network_has_are_refused() -> None:
    NAMED.check(toy_networks(), [OptimConfig()], False)
    odd = Sharding(mesh=None, dtype=None, units=frozenset(["Linera"]), offloads=False)
    with pytest.raises(ValueError, match="names Linera, but no network of this run has such blocks"):
        odd.check(toy_networks(), [OptimConfig()], False)


def test_quantized_networks_are_refused() -> None:
    nets = toy_networks()
    nets.teacher = nn.Linear(2, 2)
    nets.teacher.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="The teacher is quantized, which cannot be sharded"):
        ANY.check(nets, [OptimConfig()], False)


def test_a_skeleton_has_no_weights_until_it_is_filled() -> None:
    network = add_lora(tiny_unet(), 2, 2.0, 0.0)
    empty = skeleton(network)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    whole = filled(empty, weights)
    assert_same(dict(whole.state_dict()), weights)
    assert type(whole) is UNet2DConditionModel
    assert whole.peft_config.keys() == network.peft_config.keys()
    trains = {name for name, p in network.named_parameters() if p.requires_grad}
    assert {name for name, p in whole.named_parameters() if p.requires_grad} == trains
    assert network.training
    assert not whole.training
    assert {p.device.type for p in empty.parameters()} == {"meta"}, "to be filled again"
