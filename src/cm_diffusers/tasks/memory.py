"""What a distillation will take, counted on a network without weights: bytes of each part, at each moment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from cm_diffusers.data.clip_config import ClipConfig
from cm_diffusers.data.clip_latents import check_frames
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.errors import UserError
from cm_diffusers.models.adapters import target_names
from cm_diffusers.models.casting import kept_whole
from cm_diffusers.models.probes import PATCHES
from cm_diffusers.models.quantization import BITS
from cm_diffusers.models.students import DTYPES, StudentConfig


GIB = 2**30
SPARE = 2  # GiB of a GPU for what is not counted: CUDA itself, activations of the text towers, fragments
IMAGES, TEXT, TRAINING = "while it encodes images", "while it encodes text", "while it trains"
MOMENTS = {"adamw_8bit": 2, "adamw": 8, "radam": 8, "adamp": 8}  # bytes a parameter
# Bytes a token and channel that a block keeps for its backward pass in 16 bits: 2205.05198, Eq. 1 without the scores of
# attention, which fused kernels do not keep; and 2 for its input alone, which is what checkpointing keeps (section 5).
KEPT, INPUT = 34, 2


@dataclass(frozen=True)
class Shape:
    """Sizes of a teacher.

    Attributes:
        network: On "meta".
        text_towers: Parameters of each, by name.
        vae: Parameters.
        vae_states: Numbers that are in memory at once, at the most, while it encodes: for each pixel of an image.
        text_tokens: That the network sees beside those of the image; 0 where text is only attended to.
        pixels_per_token: Along each side of an image.
        frames_per_latent: Of a teacher of videos, see `Latents`.
        teachers: Hub ids of such models.
    """

    network: nn.Module
    text_towers: Mapping[str, int]
    vae: int
    vae_states: int
    text_tokens: int
    pixels_per_token: int
    frames_per_latent: int | None = None
    teachers: Sequence[str] = ()

    @property
    def downscale(self) -> int:
        """Pixels per latent, along each side."""
        return self.pixels_per_token // PATCHES.get(type(self.network).__name__, 2)

    @classmethod
    def from_config(cls, config: dict) -> "Shape":
        """
        Args:
            config: The attributes by name, of the network its config with the name of its class.
        """
        network = dict(config["network"])
        kind = getattr(diffusers, network.pop("_class_name"))
        with init_empty_weights(include_buffers=True):  # whose tables of positions take seconds and gigabytes
            return cls(**config | {"network": kind.from_config(network)})


def estimate(
    shape: Shape,
    student: StudentConfig,
    optim: OptimConfig,
    train: TrainConfig,
    data: DataConfig,
    clips: ClipConfig,
    text_dtype: torch.dtype = torch.float32,
) -> dict[str, dict[str, float]]:
    """Bytes of each part at each moment.

    The text towers come after the images, beside the VAE; the network after both where nothing else is asked for.

    Args:
        text_dtype: Of the text towers.
    """
    trained = adapter_parameters(shape.network, student) if student.lora else _parameters(shape.network)
    copies = (train.export_ema_decay > 0) + len(train.ema_sigma_rels)
    base = network_bytes(shape.network, DTYPES[student.cast_teacher_unet], student.quantize_teacher)
    size = getattr(torch, data.vae_dtype).itemsize
    vae = {"VAE": float(size * shape.vae)}
    at_once = data.encode_batch_size
    if clips.sample_n_frames is not None:  # whole clips, each in pieces of one latent frame
        check_frames(clips.sample_n_frames, shape.frames_per_latent)
        at_once = max(1, at_once // clips.sample_n_frames) * shape.frames_per_latent
    images = {"activations": float(size * shape.vae_states * data.resolution**2 * at_once)}
    towers = {name: float(text_dtype.itemsize * number) for name, number in shape.text_towers.items()}
    training = {
        "frozen base" if student.lora else "frozen teacher": base,
        "adapters" if student.lora else "student": 4.0 * trained,
        "target": 0.0 if student.lora else 4.0 * trained,
        "gradients": 4.0 * trained,
        "optimizer": float(MOMENTS[optim.optimizer] * trained),
        "averages": 4.0 * copies * trained,
        "activations": activation_bytes(shape, data, train, clips.sample_n_frames),
    }
    training = {name: size for name, size in training.items() if size}
    return {IMAGES: vae | images, TEXT: towers | vae, TRAINING: training}


def network_bytes(network: nn.Module, dtype: torch.dtype, quantization: str = "no") -> float:
    """Of its weights as they are kept; see `cast` and `quantization_config`."""
    whole, bits = kept_whole(type(network)), BITS.get(quantization, 8 * dtype.itemsize)
    linear = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    sizes = {name: bits / 8 if name in linear else dtype.itemsize for name, _ in network.named_parameters()}
    sizes |= {name: 4 for name in sizes if not whole.isdisjoint(name.split("."))}
    return float(sum(sizes[name] * p.numel() for name, p in network.named_parameters()))


def adapter_parameters(network: nn.Module, student: StudentConfig) -> int:
    """Of a LoRA: two matrices of the rank for each layer, (inputs, rank) and (rank, outputs)."""
    ends = tuple(f".{name}" for name in target_names(network, student.lora_target_modules))
    layers = [layer for path, layer in network.named_modules() if f".{path}".endswith(ends)]
    return student.lora_rank * sum(layer.weight[0].numel() + len(layer.weight) for layer in layers)


def activation_bytes(shape: Shape, data: DataConfig, train: TrainConfig, num_frames: int | None = None) -> float:
    """Of the student's pass: KEPT a block, or with checkpointing its INPUT and one block that is computed again.

    Args:
        num_frames: Of clips; None for images.

    Raises:
        ValueError: The network is no transformer of equal blocks, or takes no such clips.
    """
    if num_frames is not None:
        check_frames(num_frames, shape.frames_per_latent)
    blocks = [block for part in shape.network.children() if isinstance(part, nn.ModuleList) for block in part]
    config = shape.network.config
    width = config.get("dim") or (config.get("num_attention_heads") or 0) * config.attention_head_dim
    if not blocks or not width:
        raise UserError(
            f"Activations are estimated for transformers of equal blocks, not for {type(shape.network).__name__}."
        )
    latent_frames = 1 if num_frames is None else 1 + (num_frames - 1) // shape.frames_per_latent
    tokens = shape.text_tokens + latent_frames * (data.resolution // shape.pixels_per_token) ** 2
    size = tokens * width * data.train_batch_size * (1 if train.mixed_precision != "no" else 2)
    return float(size * (INPUT * len(blocks) + KEPT if train.gradient_checkpointing else KEPT * len(blocks)))


def as_table(parts: dict[str, dict[str, float]]) -> str:
    """In GiB, with the sum of each moment, the largest of which is the peak."""
    lines = ["| moment | part | GiB |", "| --- | --- | ---: |"]
    for moment, sizes in parts.items():
        lines += [f"| {moment} | {name} | {size / GIB:.2f} |" for name, size in sizes.items()]
        lines.append(f"| {moment} | **sum** | **{sum(sizes.values()) / GIB:.1f}** |")
    return "\n".join([*lines, f"| **peak** | | **{peak(parts) / GIB:.1f}** |"])


def peak(parts: dict[str, dict[str, float]]) -> float:
    """Bytes at the moment that takes the most."""
    return max(sum(sizes.values()) for sizes in parts.values())


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
