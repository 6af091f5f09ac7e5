"""What a family of teachers is: all that is known of one architecture, for every method alike."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any, Literal, NamedTuple

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from cm_diffusers.diffusion.denoisers import Call
from cm_diffusers.diffusion.guidance import Combine, Conditions, combine_linear
from cm_diffusers.diffusion.process import Process, RectifiedFlow
from cm_diffusers.diffusion.teaching import Guidance, Told
from cm_diffusers.errors import UserError


FAMILIES = {  # class of the network -> module here, whose FAMILY it is; imported when asked for
    "UNet2DConditionModel": "unet",
    "UNetMotionModel": "unet",
    "SD3Transformer2DModel": "sd3",
    "SanaTransformer2DModel": "sana",
    "FluxTransformer2DModel": "flux",
    "Flux2Transformer2DModel": "flux2",
    "QwenImageTransformer2DModel": "qwen_image",
    "ZImageTransformer2DModel": "z_image",
    "WanTransformer3DModel": "wan",
}
Sigmas = Literal["passed", "accepted", "unknown"]


class Latents(NamedTuple):
    """What a network sees of a VAE: (latents - shift) * scale.

    Attributes:
        encode: (VAE, pixels `(B, 3, H, W)` in [-1, 1]) -> mean and standard deviation of its latents, each `(B, C, h, w)`.
        decode: (VAE, latents of the network `(B, C, h, w)`) -> pixels `(B, 3, H, W)`.
        shift, scale: Of all channels or of each, `(C, 1, 1)`.
        downscale: Pixels per latent, along each side.
        channels: C of the network's latents.
        patch: Latents that the network takes as one, along each side: images of other sizes cannot be cut.
        frames_per_latent: Of a clip, whose first frame has a latent of its own; None where the network sees images alone.
    """

    encode: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[nn.Module, Tensor], Tensor]
    shift: float | Tensor
    scale: float | Tensor
    downscale: int
    channels: int
    patch: int = 1
    frames_per_latent: int | None = None

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
        pipeline: Name of the stock pipeline in diffusers that samples a network of this class.
        lora_targets: Ends of the names of the layers that get adapters.
        guidance: How a network of this class is guided: by a second, unconditional pass ("cfg"), by a number that it is
            told ("embedded"), or not at all ("none").
        call: (network, x_t `(B, ...)`, t `(B,)`, conditions) -> output of the prediction type, `(B, ...)`.
        encode: (pipeline, prompts) -> conditions of its text towers, each `(N, ...)`, masks included; the empty prompt
            becomes the unconditional branch.
        latents: Of a pipeline's VAE.
        network: What the pipeline calls its network.
        prediction_type: Of a pipeline, see `interpret`.
        process: The noising process of a pipeline, in whose times and coordinates `call` is given x_t and t.
        told: Of a network that is told its guidance: conditions and w `(B,)` -> conditions with it in its own units;
            w = guidance_scale - 1.
        combine: Of conditional and unconditional prediction, w `(B,)` and t `(B,)`: classifier-free guidance as the stock
            pipeline does it.
        guided: Arguments of the stock pipeline's call for a guidance scale; 1 is none.
        student: (teacher's network, size of an embedding) -> a copy that is told its guidance and at first ignores it,
            or with size None a plain one; None where guidance can only go into the weights.
        check: (name, pipeline): raises a ValueError if it is no text-to-image teacher.
        lora_name: (path of a layer, network) -> its name in a file of `lora_down`, `lora_up` and `alpha` that diffusers and
            ComfyUI read, or None. Where a layer has none, files have `transformer.<path>.lora_A`, and no alphas.
            None for a family whose files all do.
        comfyui: Node by which ComfyUI is told the shift, where its table of names has those of such a file.
        sigmas: How the stock pipeline's scheduler gets its noise levels: the pipeline passes an even grid, or passes those
            that its caller gives, or knows nothing of them.
        clips: Whether the stock pipeline answers with `frames`.
        tag: What the Hub lists such networks under; by default the name of the family's file, by which model cards find it.
        silent: Paths of layers whose results the network throws away: they do not train, and get no adapters.
        rounded_time: Path of the layer that embeds times, where its class rounds them first; see `embed_exactly`.
    """

    pipeline: Callable[[nn.Module], str]
    lora_targets: tuple[str, ...]
    guidance: Callable[[nn.Module], Guidance]
    call: Call
    encode: Callable[[DiffusionPipeline, list[str]], Conditions]
    latents: Callable[[nn.Module], Latents]
    network: str = "transformer"
    prediction_type: Callable[[DiffusionPipeline], str] = lambda pipe: "flow_prediction"
    process: Callable[[DiffusionPipeline], Process] = lambda pipe: RectifiedFlow()
    told: Callable[[nn.Module], Told] | None = None
    combine: Combine = combine_linear
    guided: Callable[[float], dict[str, float | str]] = lambda scale: {"guidance_scale": scale}
    student: Callable[[nn.Module, int | None], nn.Module] | None = None
    check: Callable[[str, DiffusionPipeline], None] = lambda path, pipe: None
    lora_name: Callable[[str, nn.Module], str | None] | None = None
    comfyui: str | None = None
    sigmas: Sigmas = "passed"
    clips: bool = False
    tag: Callable[[nn.Module], str] | None = None
    silent: Callable[[nn.Module], list[str]] = lambda network: []
    rounded_time: str | None = None


def network_of(pipe: DiffusionPipeline, path: str = "The pipeline") -> nn.Module:
    """The part of a pipeline that is of a known family; the first of two.

    Args:
        path: Where it came from.

    Raises:
        ValueError: There is none.
    """
    if known := _known(pipe):
        return known[0]
    networks = [type(part).__name__ for part in pipe.components.values() if isinstance(part, nn.Module)]
    raise UserError(
        f"{path} is a {type(pipe).__name__} without a network of a known family, but with "
        f"{', '.join(networks) or 'no network at all'}; give a text-to-image pipeline of {', '.join(FAMILIES)}."
    )


def latents_of(pipe: DiffusionPipeline) -> Latents:
    """What the network of a pipeline sees of its VAE."""
    return family_of(network_of(pipe)).latents(pipe.vae)


def guided(pipe: DiffusionPipeline, guidance_scale: float) -> dict[str, float | str]:
    """Arguments of a pipeline's call, whatever its family; see `Family.guided`."""
    known = _known(pipe)
    return family_of(known[0]).guided(guidance_scale) if known else {"guidance_scale": guidance_scale}


def in_steps(pipe: DiffusionPipeline, steps: int) -> dict[str, int | list[float] | None]:
    """Arguments of a pipeline's call for so many steps.

    Left to itself, the stock scheduler of a flow shifts twice and spends its last step near 0: even times, shifted once.
    SANA-Sprint's pipeline has the second of two times for others, too.
    """
    known = signature(type(pipe).__call__).parameters
    asked = {"num_inference_steps": steps}  # also beside sigmas: FLUX.2 shifts by it
    if "sigmas" in known and isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        return asked | {"sigmas": [1 - i / steps for i in range(steps)]}
    told = steps != 2 and "intermediate_timesteps" in known
    return asked | ({"intermediate_timesteps": None} if told else {})


def answers_clips(pipe: DiffusionPipeline) -> bool:
    """Whether its call answers with `frames`, see `Family.clips`."""
    known = _known(pipe)
    return bool(known) and family_of(known[0]).clips


def _known(pipe: DiffusionPipeline) -> list[nn.Module]:
    return [part for part in pipe.components.values() if type(part).__name__ in FAMILIES]


def family_of(network: nn.Module) -> Family:
    """
    Raises:
        ValueError: No file here is about networks of this class.
    """
    kind = type(network).__name__
    if kind not in FAMILIES:
        raise UserError(f"{kind} is no network of a known family; one of {', '.join(FAMILIES)}.")
    return import_module(f"{__package__}.{FAMILIES[kind]}").FAMILY


def tag_of(network: nn.Module) -> str:
    """What the Hub lists models with this network under."""
    tag = family_of(network).tag
    return FAMILIES[type(network).__name__].replace("_", "-") if tag is None else tag(network)


def family_tagged(tag: str) -> Family | None:
    """The family whose tag is the name of its file."""
    module = tag.replace("-", "_")
    return import_module(f"{__package__}.{module}").FAMILY if module in FAMILIES.values() else None


def config_of(network: nn.Module) -> FrozenDict:
    """The configuration of a network, whatever is around it for training on several devices."""
    while not hasattr(network, "config"):
        network = network.module
    return network.config


def default_of(pipeline: DiffusionPipeline, argument: str) -> Any:
    """What the pipeline's call takes for an argument that is not given: its `encode_prompt` often takes another."""
    return signature(type(pipeline).__call__).parameters[argument].default
