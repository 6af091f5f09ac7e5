"""What holds for every family, as functions that its tests call."""

from itertools import pairwise

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cm_diffusers.diffusion.guidance import Conditions, guide
from cm_diffusers.diffusion.process import Prediction, diffuse, interpret
from cm_diffusers.models.adapters import WithoutAdapters, add_lora
from cm_diffusers.models.families.base import Family, Latents


PROMPTS = ["a photo of a bag", "an ankle boot"]


def network_of(family: Family, pipe: DiffusionPipeline) -> nn.Module:
    return getattr(pipe, family.network)


def branches(family: Family, pipe: DiffusionPipeline) -> tuple[Conditions, Conditions]:
    """Of the prompts, and of as many empty ones, padded to the same length."""
    with torch.no_grad():
        both = family.encode(pipe, [*PROMPTS, "", ""])
    return {name: value[:2] for name, value in both.items()}, {name: value[2:] for name, value in both.items()}


@torch.no_grad()
def euler(family: Family, pipe: DiffusionPipeline, noise: Tensor, cond: Conditions, scale: float = 1.0) -> Tensor:
    """Latents by steps along the grid that the pipeline's last call left in its scheduler.

    Args:
        cond: Of the prompts, and told what it has to be told.
        scale: Of guidance by a second pass; 1 is none.
    """
    network, process = network_of(family, pipe), family.process(pipe)

    def denoise(x_t: Tensor, t: Tensor, cond: Conditions) -> Prediction:
        return interpret(process, family.call(network, x_t, t, cond), x_t, t, "flow_prediction")

    guided = lambda x_t, t: denoise(x_t, t, cond)  # noqa: E731
    if scale > 1:
        guided = guide(denoise, cond, branches(family, pipe)[1], torch.full((len(noise),), scale - 1), family.combine)
    x_t, grid = noise, pipe.scheduler.sigmas
    for t, s in pairwise(grid):
        x_t = diffuse(process, *guided(x_t, t.expand(len(x_t))), s.expand(len(x_t)))
    return x_t


def brief(cond: Conditions) -> Conditions:
    """With the first of the text's states alone."""
    return cond | {name: cond[name][:, :32] for name in ("prompt_embeds", "prompt_embeds_mask") if name in cond}


def check_latents(latents: Latents, vae: nn.Module) -> None:
    """Encoded sizes are the images' over `downscale`, and decoding undoes shift and scale."""
    with torch.no_grad():
        pixels = torch.rand(2, 3, 32, 32) * 2 - 1
        mean, std = latents.encode(vae, pixels)
        seen = (mean - latents.shift) * latents.scale
        assert mean.shape == std.shape == (2, mean.shape[1], 32 // latents.downscale, 32 // latents.downscale)
        assert (std > 0).all()
        assert latents.decode(vae, seen).shape == pixels.shape


def adapted(family: Family, network: nn.Module) -> list[str]:
    """Its targets of which the network has layers; a larger one has more blocks."""
    return [
        name
        for name in family.lora_targets
        if any(f".{path}".endswith(f".{name}") for path, _ in network.named_modules())
    ]


def check_lora(family: Family, network: nn.Module, x_t: Tensor, cond: Conditions) -> set[str]:
    """Adapters change nothing at first, alone get gradients, and can be left out again.

    Returns:
        Names of linear layers without an adapter, and after "idle " of those whose adapter gets no gradient.
    """
    cond, t = brief(cond), torch.tensor([0.3, 0.8])
    before = family.call(network, x_t, t, cond)
    network = add_lora(network, 2, 4.0, 0.0, adapted(family, network))
    output = family.call(network, x_t, t, cond)
    torch.testing.assert_close(output, before, rtol=0, atol=0)
    output.pow(2).mean().backward()
    idle = {f"idle {name}" for name, layer in adapters(network) if not has_gradient(layer)}
    assert {
        name for name, value in network.named_parameters() if value.grad is not None and "lora_" not in name
    } == set()
    for _, layer in adapters(network):
        nn.init.normal_(layer.lora_B["default"].weight)
    teacher = WithoutAdapters(network)
    assert (family.call(network, x_t, t, cond) - before).abs().max() > 1e-2
    torch.testing.assert_close(family.call(teacher, x_t, t, cond), before, rtol=0, atol=0)
    return idle | linear_layers_without(network, [name for name, _ in adapters(network)])


def adapters(network: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    return [(name, layer) for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)]


def linear_layers_without(network: nn.Module, paths: list[str]) -> set[str]:
    names = {name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    return {name for name in names if not any(name.startswith(f"{path}.") for path in paths)}


def has_gradient(layer: BaseTunerLayer) -> bool:
    gradients = [adapter.weight.grad for adapter in layer.lora_B.values()]
    return all(gradient is not None and bool(gradient.any()) for gradient in gradients)


def check_jvp(family: Family, network: nn.Module, x_t: Tensor, cond: Conditions) -> None:
    """The derivative along x, by forward-mode AD, is that of central differences."""
    network, x_t, t = network.double(), x_t.double(), torch.tensor([0.3, 0.8], dtype=torch.float64)
    cond = {name: value.double() if value.is_floating_point() else value for name, value in brief(cond).items()}
    along, step = torch.randn_like(x_t), 2e-3  # positions and times are in float32 inside

    def call(x: Tensor) -> Tensor:
        return family.call(network, x, t, cond)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, derivative = torch.func.jvp(call, (x_t,), (along,))
        difference = (call(x_t + step * along) - call(x_t - step * along)) / (2 * step)
    assert derivative.abs().max() > 1e-2
    torch.testing.assert_close(derivative, difference, rtol=1e-4, atol=1e-4)
