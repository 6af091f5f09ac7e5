"""Teachers, students, adapters and moving averages."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.hf_argparser import HfArg

from cm_diffusers.guidance import ConditionalDenoiser
from cm_diffusers.process import Process, interpret
from cm_diffusers.types import Networks


# Every convolution and linear layer of a Stable Diffusion UNet but the ends, as LCM-LoRA (2311.05556) adapts.
LCM_LORA_TARGETS = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
    "downsamplers.0.conv upsamplers.0.conv time_emb_proj"
).split()
LOADING = {"dtype": torch.float32, "use_safetensors": True}  # never a pickle
XL_CONDITIONS = ("text_embeds", "time_ids")  # the UNet's added_cond_kwargs


@dataclass
class TeacherConfig:
    """The diffusion model to distil."""

    pretrained_teacher_model: str = HfArg(help="Folder or Hub id of a Stable Diffusion pipeline (1.x, 2.x or XL).")
    teacher_revision: str | None = HfArg(default=None, help="Branch, tag or commit on the Hub.")
    teacher_variant: str | None = HfArg(default=None, help='Variant of the weight files, e.g. "fp16".')
    pretrained_vae_model_name_or_path: str | None = HfArg(
        default=None, help="Folder or Hub id of another VAE than the teacher's, such as one that is stable in float16."
    )


@dataclass
class StudentConfig:
    """What becomes of the teacher's network."""

    lora: bool = HfArg(default=False, help="Train adapters on the teacher itself instead of a copy of it.")
    lora_rank: int = HfArg(default=64, help="Rank of the adapters.")
    lora_alpha: float = HfArg(default=64.0, help="Scale of the adapters, times 1 / rank.")
    lora_dropout: float = HfArg(default=0.0, help="Dropout before the adapters.")
    lora_target_modules: list[str] = HfArg(
        default_factory=lambda: list(LCM_LORA_TARGETS), help="Names of the layers that get adapters."
    )
    unet_time_cond_proj_dim: int = HfArg(default=256, help="Size of the full student's guidance embedding.")
    save_fp16: bool = HfArg(default=False, help="Store the full student's UNet and VAE in half precision.")
    cast_teacher_unet: Literal["no", "bf16", "fp16"] = HfArg(
        default="no",
        help="Keep the full student's teacher in half precision (with --mixed_precision of the same kind).",
    )


def load_teacher(config: TeacherConfig) -> DiffusionPipeline:
    """The teacher's pipeline in float32 whatever its files hold, frozen.

    Raises:
        ValueError: Not a Stable Diffusion (XL) pipeline, out of reach, or with non-finite weights.
    """
    path = config.pretrained_teacher_model
    if Path(path).exists() and not (Path(path) / "model_index.json").exists():
        raise ValueError(f"{path} is not a diffusers pipeline folder: there is no model_index.json in it.")
    options = {"revision": config.teacher_revision, "variant": config.teacher_variant, **LOADING}
    if config.pretrained_vae_model_name_or_path:
        options["vae"] = _load_vae(config.pretrained_vae_model_name_or_path)
    try:
        pipe = DiffusionPipeline.from_pretrained(path, **options)
    except (OSError, ValueError) as error:  # diffusers raises ValueError for what cannot be a Hub id
        trouble = (
            "does not load" if Path(path).exists() else "is neither a pipeline folder here nor a Hub id within reach"
        )
        raise ValueError(f"{path} {trouble}: {str(error).splitlines()[0]}") from error
    _check_teacher(path, pipe)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def _load_vae(path: str) -> AutoencoderKL:
    try:
        return AutoencoderKL.from_pretrained(path, **LOADING)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--pretrained_vae_model_name_or_path {path} does not load: {reason}") from error


def is_xl(unet: UNet2DConditionModel) -> bool:
    """Whether the network is told pooled text, sizes and crop, as Stable Diffusion XL's is."""
    return unet.config.addition_embed_type == "text_time"


def _check_teacher(path: str, pipe: DiffusionPipeline) -> None:
    unet, kind = getattr(pipe, "unet", None), type(pipe).__name__
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"{path} is a {kind} without a UNet2DConditionModel; give a Stable Diffusion pipeline.")
    wanted = ["vae", "text_encoder", *(["text_encoder_2"] if is_xl(unet) else [])]
    if missing := [name for name in wanted if getattr(pipe, name, None) is None]:
        raise ValueError(f"{path} is a {kind} without {' and '.join(missing)}; give a text-to-image pipeline.")
    if unet.config.in_channels != pipe.vae.config.latent_channels:
        raise ValueError(
            f"The UNet of {path} takes {unet.config.in_channels} channels and its VAE makes "
            f"{pipe.vae.config.latent_channels}; give a text-to-image pipeline, not one for inpainting or editing."
        )
    check_vae(path, pipe.vae)
    if unet.config.time_cond_proj_dim:
        raise ValueError(f"{path} is a guidance-distilled student already; give the diffusion model it came from.")
    broken = [name for name, p in pipe.unet.named_parameters() if not p.isfinite().all()]
    if broken:
        raise ValueError(
            f"The teacher {path} holds {len(broken)} tensors that are not finite, such as {broken[0]}; get it anew."
        )


def check_vae(path: str, vae: AutoencoderKL) -> None:
    if vae.config.get("latents_mean") or vae.config.get("latents_std"):
        raise ValueError(
            f"The VAE of {path} normalises every channel (latents_mean, latents_std in its config), which training does "
            "not; give a model with another VAE."
        )


def require_autocast(config: StudentConfig, mixed_precision: str) -> None:
    """A cast teacher runs under autocast only: latents and conditions are float32."""
    cast = config.cast_teacher_unet
    if cast not in ("no", mixed_precision):
        raise ValueError(f"--cast_teacher_unet {cast} needs --mixed_precision {cast}, but that is {mixed_precision}.")


def make_networks(teacher: UNet2DConditionModel, config: StudentConfig) -> Networks:
    """The networks of a distillation: copy and EMA target, or adapters on the teacher, which is then its own student."""
    if config.lora:
        if config.cast_teacher_unet != "no":
            raise ValueError(
                "--cast_teacher_unet is for the full student: with --lora, teacher and student share weights."
            )
        names = config.lora_target_modules
        student = add_lora(teacher, config.lora_rank, config.lora_alpha, config.lora_dropout, names)
        return Networks(student, teacher=WithoutAdapters(student))
    student = make_student(teacher, config.unet_time_cond_proj_dim)
    if config.cast_teacher_unet != "no":
        teacher.to({"bf16": torch.bfloat16, "fp16": torch.float16}[config.cast_teacher_unet])
    return Networks(student, target=frozen_copy(student), teacher=teacher)


def make_student(teacher: UNet2DConditionModel, guidance_embedding_dim: int) -> UNet2DConditionModel:
    """A copy of the teacher with a guidance embedding that starts at zero: student = teacher at step 0.

    Args:
        guidance_embedding_dim: Size of the embedding, e.g. 256, as `time_cond_proj_dim` in the config.
    """
    # `_use_default_values` among the private entries would reset time_cond_proj_dim to its default
    config = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    config["time_cond_proj_dim"] = guidance_embedding_dim
    student = UNet2DConditionModel.from_config(config).to(teacher.device)
    projection = student.time_embedding.cond_proj.weight
    student.load_state_dict({**teacher.state_dict(), "time_embedding.cond_proj.weight": torch.zeros_like(projection)})
    return student.train()


def add_lora(
    unet: UNet2DConditionModel, rank: int, alpha: float, dropout: float, target_modules: list[str]
) -> UNet2DConditionModel:
    """Add float32 adapters to a frozen UNet, in place. Adapter B is zero, so the output does not change."""
    unet.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules)
    try:
        unet.add_adapter(config)
    except ValueError as error:
        raise ValueError(f"--lora_target_modules names no layer of the UNet: {error}") from error
    cast_training_params(unet, torch.float32)
    return unet.train()


@contextmanager
def adapters_off(layers: list[BaseTunerLayer]) -> Iterator[None]:
    """The adapted layers compute without their adapters inside the block."""
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters(False) would also flip requires_grad
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapter_layers(module: nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


@contextmanager
def recomputed_with(network: nn.Module, context: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Blocks that run inside run in this context in gradient checkpointing's recomputation, too."""
    recompute = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), context()))
    blocks = [module for module in network.modules() if getattr(module, "gradient_checkpointing", False)]
    usual = [block._gradient_checkpointing_func for block in blocks]
    for block in blocks:
        block._gradient_checkpointing_func = recompute
    try:
        yield
    finally:
        for block, function in zip(blocks, usual, strict=True):
            block._gradient_checkpointing_func = function


class WithoutAdapters(nn.Module):
    """The teacher inside a LoRA student: the same weights, adapters and dropout off. Holds no memory of its own."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self._student = [student]  # a list, so that this is not a second registration of the same parameters
        self._layers = adapter_layers(student)

    def forward(self, *args: object, **kwargs: object) -> object:
        student, was_training = self._student[0], self._student[0].training
        with adapters_off(self._layers), recomputed_with(student, partial(adapters_off, self._layers)):
            try:
                return student.eval()(*args, **kwargs)
            finally:
                student.train(was_training)


class TextConditionedUNet(nn.Module):
    """A UNet and a text tower that train together: conditions are `input_ids` `(B, L)`."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, sample: Tensor, timestep: Tensor, input_ids: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        states = self.text_encoder(input_ids)[0]
        return self.unet(sample, timestep, encoder_hidden_states=states, return_dict=return_dict)


def unet_arguments(cond: dict[str, Tensor]) -> dict[str, Tensor | dict[str, Tensor]]:
    """Conditions as a UNet takes them: Stable Diffusion XL's `text_embeds` and `time_ids`, flat in a batch, in one dict."""
    added = {name: cond[name] for name in XL_CONDITIONS if name in cond}
    arguments = {name: value for name, value in cond.items() if name not in added}
    return arguments | ({"added_cond_kwargs": added} if added else {})


def for_frames(cond: dict[str, Tensor], x_t: Tensor) -> dict[str, Tensor]:
    """Conditions of clips `(B, C, F, h, w)`: text states `(B, S, D)` become `(B F, S, D)`, as a motion UNet wants them."""
    if x_t.ndim < 5 or "encoder_hidden_states" not in cond:
        return cond
    return cond | {"encoder_hidden_states": cond["encoder_hidden_states"].repeat_interleave(x_t.shape[2], 0)}


def as_denoiser(network: Callable, process: Process, prediction_type: str) -> ConditionalDenoiser:
    """View a network as (x_t, t, conditions) -> Prediction, in float32."""

    def denoise(x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> tuple:
        output = network(x_t, t, **unet_arguments(for_frames(cond, x_t)), return_dict=False)[0]
        return interpret(process, output.float(), x_t, t, prediction_type)

    return denoise


@torch.no_grad()
def ema_update(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model for parameters; buffers are copied. `decay` is exact."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)


def frozen_copy(module: nn.Module) -> nn.Module:
    """A detached copy that never trains, e.g. the EMA target at step 0."""
    return copy.deepcopy(module).requires_grad_(False)
