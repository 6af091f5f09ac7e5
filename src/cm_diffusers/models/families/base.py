"""What a family of teachers is: all that is known of one architecture, for every method alike."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, NamedTuple

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cm_diffusers.diffusion.guidance import Conditions, combine_linear
from cm_diffusers.diffusion.process import Prediction, Process
from cm_diffusers.errors import UserError


FAMILIES = {  # class of the network -> module here, whose FAMILY it is; imported when asked for
    "UNet2DConditionModel": "unet",
    "SD3Transformer2DModel": "sd3",
    "SanaTransformer2DModel": "sana",
    "FluxTransformer2DModel": "flux",
    "Flux2Transformer2DModel": "flux2",
    "QwenImageTransformer2DModel": "qwen_image",
    "ZImageTransformer2DModel": "z_image",
    "WanTransformer3DModel": "wan",
}


class Latents(NamedTuple):
    """What a network sees of a VAE: (latents - shift) * scale.

    Attributes:
        encode: (VAE, pixels `(B, 3, H, W)` in [-1, 1]) -> mean and standard deviation of its latents, each `(B, C, h, w)`.
        decode: (VAE, latents of the network `(B, C, h, w)`) -> pixels `(B, 3, H, W)`.
        shift, scale: Of all channels or of each, `(C, 1, 1)`.
        downscale: Pixels per latent, along each side.
    """

    encode: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[nn.Module, Tensor], Tensor]
    shift: float | Tensor
    scale: float | Tensor
    downscale: int


@dataclass(frozen=True)
class Family:
    """All that is known of one architecture.

    Attributes:
        pipeline: Name of the stock pipeline in diffusers that samples a network of this class and its students: two models may
            share a class and differ in their text towers.
        network: What that calls its network.
        prediction_type: See `interpret`.
        lora_targets: Ends of the names of the layers that get adapters.
        guidance: How a network of this class is guided: by a second, unconditional pass ("cfg"), by a number that it is
            told ("embedded"), or not at all ("none").
        process: The noising process of a pipeline, in whose times and coordinates `call` is given x_t and t.
        call: (network, x_t `(B, ...)`, t `(B,)`, conditions) -> output of `prediction_type`, `(B, ...)`.
        encode: (pipeline, prompts) -> conditions of its text towers, each `(N, ...)`, masks included; the empty prompt
            becomes the unconditional branch.
        latents: Of a pipeline's VAE.
        told: (conditions, w `(B,)`) -> conditions of a network that is told its guidance, with it in its own units;
            w = guidance_scale - 1.
        combine: Of conditional and unconditional prediction, w `(B,)` and t `(B,)`: classifier-free guidance as the stock
            pipeline does it.
        guided: Arguments of the stock pipeline's call for a guidance scale; 1 is none.
        student: (teacher's network, size of an embedding) -> a copy that is told its guidance and at first ignores it; None
            where guidance can only go into the weights.
    """

    pipeline: Callable[[nn.Module], str]
    network: str
    prediction_type: str
    lora_targets: tuple[str, ...]
    guidance: Callable[[nn.Module], Literal["cfg", "embedded", "none"]]
    process: Callable[[DiffusionPipeline], Process]
    call: Callable[[nn.Module, Tensor, Tensor, Conditions], Tensor]
    encode: Callable[[DiffusionPipeline, list[str]], Conditions]
    latents: Callable[[nn.Module], Latents]
    told: Callable[[Conditions, Tensor], Conditions] | None = None
    combine: Callable[[Prediction, Prediction, Tensor, Tensor], Prediction] = combine_linear
    guided: Callable[[float], dict[str, float | str]] = lambda scale: {"guidance_scale": scale}
    student: Callable[[nn.Module, int], nn.Module] | None = None


def family_of(network: nn.Module) -> Family:
    """
    Raises:
        ValueError: No file here is about networks of this class.
    """
    kind = type(network).__name__
    if kind not in FAMILIES:
        raise UserError(f"{kind} is no network of a known family; one of {', '.join(FAMILIES)}.")
    return import_module(f"{__package__}.{FAMILIES[kind]}").FAMILY
