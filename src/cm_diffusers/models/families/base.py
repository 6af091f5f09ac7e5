"""What a family of teachers is: all that is known of one architecture, for every method alike."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any, Literal, NamedTuple

from accelerate.utils import extract_model_from_parallel
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
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
        patch: Latents that the network takes as one, along each side: images of other sizes cannot be cut.
    """

    encode: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[nn.Module, Tensor], Tensor]
    shift: float | Tensor
    scale: float | Tensor
    downscale: int
    patch: int = 1

    @property
    def multiple(self) -> int:
        """Pixels of which the sides of an image are a multiple."""
        return self.downscale * self.patch

    def of_network(self, z: Tensor) -> Tensor:
        """What the network sees of the VAE's latents z `(..., C, h, w)`."""
        return (z - _like(self.shift, z)) * _like(self.scale, z)

    def of_vae(self, x: Tensor) -> Tensor:
        """The VAE's latents of those that the network sees, `(..., C, h, w)`."""
        return x / _like(self.scale, x) + _like(self.shift, x)


def _like(values: float | Tensor, x: Tensor) -> float | Tensor:
    return values.to(x) if isinstance(values, Tensor) else values


@dataclass(frozen=True)
class Family:
    """All that is known of one architecture.

    Attributes:
        pipeline: Name of the stock pipeline in diffusers that samples teacher and students.
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
        told_pipeline: Name of the stock pipeline of such students, where it is another.
    """

    pipeline: str
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
    guided: Callable[[float], dict[str, float]] = lambda scale: {"guidance_scale": scale}
    student: Callable[[nn.Module, int], nn.Module] | None = None
    told_pipeline: str | None = None


def network_of(pipe: DiffusionPipeline) -> nn.Module:
    """The part of a pipeline that is of a known family; the first of two.

    Raises:
        ValueError: There is none.
    """
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    if known := [part for part in parts if type(part).__name__ in FAMILIES]:
        return known[0]
    found = ", ".join(type(part).__name__ for part in parts) or "no network at all"
    raise UserError(
        f"{type(pipe).__name__} has no network of a known family, but {found}; one of {', '.join(FAMILIES)}."
    )


def family_of(network: nn.Module) -> Family:
    """
    Raises:
        ValueError: No file here is about networks of this class.
    """
    kind = type(network).__name__
    if kind not in FAMILIES:
        raise UserError(f"{kind} is no network of a known family; one of {', '.join(FAMILIES)}.")
    return import_module(f"{__package__}.{FAMILIES[kind]}").FAMILY


def config_of(network: nn.Module) -> FrozenDict:
    """The configuration of a network, whatever accelerate has put around it."""
    return extract_model_from_parallel(network).config


def default_of(pipeline: DiffusionPipeline, argument: str) -> Any:
    """What the pipeline's call takes for an argument that is not given: its `encode_prompt` often takes another."""
    return signature(type(pipeline).__call__).parameters[argument].default
