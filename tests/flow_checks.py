"""What holds of every family of flow networks: their calls in a loop of our own, as a function, and under adapters."""

from itertools import pairwise

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from cm_diffusers.diffusion.denoisers import as_denoiser
from cm_diffusers.diffusion.guidance import ConditionalDenoiser, Conditions, guide
from cm_diffusers.diffusion.process import RectifiedFlow
from cm_diffusers.diffusion.solvers import ddim_step
from cm_diffusers.models.adapters import WithoutAdapters, add_lora
from cm_diffusers.models.families.base import Family, Latents


FLOW = RectifiedFlow()
PROMPTS = ["a photo of a bag", "an ankle boot"]


def predict(family: Family, network: nn.Module) -> ConditionalDenoiser:
    return as_denoiser(network, FLOW, "flow_prediction", family.call)


@torch.no_grad()
def euler(
    family: Family, network: nn.Module, x: Tensor, sigmas: Tensor, cond: Conditions, uncond: Conditions, scale: float
) -> Tensor:
    """Samples `(B, ...)` from noise x by Euler's method with classifier-free guidance; with scale 1 without."""
    denoise = predict(family, network)
    guided = guide(denoise, cond, uncond, torch.full((len(x),), scale - 1), family.combine)
    for t, s in pairwise(sigmas):
        step = guided if scale != 1 else lambda x_t, t: denoise(x_t, t, cond)
        x = ddim_step(step, FLOW, x, t.expand(len(x)), s.expand(len(x)))
    return x


@torch.no_grad()
def branches(family: Family, pipe: DiffusionPipeline) -> tuple[Conditions, Conditions]:
    """Of the prompts, and of as many empty ones."""
    return family.encode(pipe, PROMPTS), family.encode(pipe, [""] * len(PROMPTS))


def brief(cond: Conditions) -> Conditions:
    """With the first of the text's states alone."""
    return cond | {name: cond[name][:, :32] for name in ("prompt_embeds", "prompt_embeds_mask") if name in cond}


@torch.no_grad()
def check_latents(latents: Latents, vae: nn.Module) -> None:
    """Encoded sizes are the images' over `downscale`, and decoding gives images of the first size."""
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = latents.encode(vae, pixels)
    assert mean.shape == std.shape == (2, mean.shape[1], 32 // latents.downscale, 32 // latents.downscale)
    assert (std > 0).all()
    assert latents.decode(vae, latents.of_network(mean)).shape == pixels.shape
    assert 32 % latents.multiple == 0


def jvp_error(family: Family, network: nn.Module, x: Tensor, cond: Conditions) -> float:
    """Of derivatives in x, relative to central differences: the median of eight, for a kink (ReLU) may spoil some.

    Parts of networks compute in float32 whatever they are given, so that the step cannot be smaller.
    """
    network, h = network.double(), 3e-4
    x, along = torch.randn(2, 8, *x.shape[1:], dtype=torch.float64)
    cond = {name: _doubled(value).repeat(4, *[1] * (value.ndim - 1)) for name, value in cond.items()}
    t = torch.linspace(0.2, 0.9, 8)

    def call(x_t: Tensor) -> Tensor:
        return family.call(network, x_t, t, cond)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        tangent = jvp(call, (x,), (along,))[1].flatten(1)
        difference = ((call(x + h * along) - call(x - h * along)) / (2 * h)).flatten(1)
    return ((tangent - difference).norm(dim=1) / difference.norm(dim=1)).median().item()


@torch.no_grad()
def distinct_times(family: Family, network: nn.Module, x: Tensor, cond: Conditions) -> int:
    """How many of 100 times from 0.9 to 0.999 the network tells apart under autocast, of one x and one prompt."""
    times = torch.linspace(0.9, 0.999, 100)
    rows = {name: value[:1].expand(100, *value.shape[1:]) for name, value in cond.items()}
    with torch.autocast("cpu", torch.bfloat16):
        outputs = family.call(network, x[:1].expand(100, *x.shape[1:]), times, rows)
    return len(outputs.float().flatten(1).unique(dim=0))


def adapted(family: Family, network: nn.Module, x: Tensor, cond: Conditions) -> tuple[set[str], set[str]]:
    """The names of parameters with a gradient, and of those of adapters, after adding them changed no output.

    Adapter B starts at zero and passes none to A, so it is drawn first.
    """
    t = torch.full((len(x),), 0.6)
    before = family.call(network, x, t, cond)
    add_lora(network, 4, 4.0, 0.0)
    assert torch.equal(family.call(network, x, t, cond), before)
    parameters = dict(network.named_parameters())
    for name, value in parameters.items():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.1)
    family.call(network, x, t, cond).square().mean().backward()
    assert (family.call(network, x, t, cond) - before).abs().max() > 1e-3
    assert torch.equal(family.call(WithoutAdapters(network), x, t, cond), before)
    moved = {name for name, value in parameters.items() if value.grad is not None and value.grad.any()}
    return moved, {name for name in parameters if "lora_" in name}


def without_adapters(network: nn.Module, *starts: str) -> set[str]:
    """Names of the linear layers that have none, of those that begin so."""
    modules = dict(network.named_modules())
    inside = tuple(f"{name}." for name, layer in modules.items() if isinstance(layer, BaseTunerLayer))
    linear = {name for name, layer in modules.items() if isinstance(layer, nn.Linear) and name.startswith(starts)}
    return {name for name in linear if not name.startswith(inside)}


def _doubled(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value
