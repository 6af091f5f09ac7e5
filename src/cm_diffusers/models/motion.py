"""From an image model to a video model: motion modules, the noise schedule they belong to, and what of them trains."""

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AnimateDiffPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    MotionAdapter,
    SchedulerMixin,
    UNet2DConditionModel,
    UNetMotionModel,
)
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.hf_argparser import HfArg

from cm_diffusers.errors import UserError
from cm_diffusers.models.families.unet import is_xl
from cm_diffusers.models.stored import only_variant
from cm_diffusers.models.teachers import is_late


ANIMATEDIFF_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear", "trained_betas": None}
POSITIONS = ".pos_embed.pe"  # sinusoids, which the network makes itself
MOTION = "motion_modules"  # in the name of every parameter that knows about time
BETAS = (*ANIMATEDIFF_BETAS, "num_train_timesteps", "rescale_betas_zero_snr")


@dataclass
class MotionConfig:
    """The motion modules, and the noise schedule they belong to."""

    pretrained_motion_adapter: str | None = HfArg(default=None, help="Folder or Hub id of a MotionAdapter.")
    motion_adapter_revision: str | None = HfArg(default=None, help="Branch, tag or commit on the Hub.")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = HfArg(
        default=None,
        help="Noise schedule; if not given, that of the scheduler_config.json beside the motion modules, or else linear, as "
        "AnimateDiff's.",
    )


@dataclass
class NewMotionConfig:
    """Motion modules that start from nothing; they leave every frame as it is until they have learnt."""

    motion_num_attention_heads: int = HfArg(default=8, help="Heads of a new motion module's attention.")
    motion_max_seq_length: int = HfArg(default=32, help="Most frames that a new motion module takes.")


def new_motion_adapter(unet: UNet2DConditionModel, config: NewMotionConfig) -> MotionAdapter:
    """Motion modules that fit a network and do not change it: each adds the output of a last layer of zeros.

    Raises:
        ValueError: The heads do not divide the network's channels.
    """
    shape, heads = unet.config, config.motion_num_attention_heads
    if odd := [width for width in shape.block_out_channels if width % heads]:
        raise UserError(f"--motion_num_attention_heads {heads} does not divide the {odd[0]} channels of a block.")
    adapter = MotionAdapter(
        block_out_channels=tuple(shape.block_out_channels),
        motion_layers_per_block=shape.layers_per_block,
        motion_mid_block_layers_per_block=1,
        motion_num_attention_heads=heads,
        motion_norm_num_groups=shape.norm_num_groups,
        motion_max_seq_length=config.motion_max_seq_length,
    )
    for name, module in adapter.named_modules():
        if name.endswith("proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return adapter


def starting_adapter(
    config: MotionConfig, new: NewMotionConfig, unet: UNet2DConditionModel, num_frames: int
) -> MotionAdapter:
    """The motion modules that training starts from: those that are named, or new ones.

    Raises:
        ValueError: They do not take so many frames.
    """
    if config.pretrained_motion_adapter is None:
        adapter = new_motion_adapter(unet, new)
    else:
        adapter = load_motion_adapter(config)
    check_frames(num_frames, adapter, "--sample_n_frames")
    return adapter


def load_motion_adapter(config: MotionConfig) -> MotionAdapter:
    """
    Raises:
        ValueError: None is named, or it does not load whole; published ones may lack positions.
    """
    if config.pretrained_motion_adapter is None:
        raise UserError("--pretrained_motion_adapter is missing: name the folder or Hub id of a MotionAdapter.")
    return adapter_at_root(
        config.pretrained_motion_adapter, torch.float32, {"revision": config.motion_adapter_revision}
    )


def adapter_at_root(
    source: str | PathLike[str],
    dtype: torch.dtype | None = None,
    hub: dict[str, Any] | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = True,
) -> MotionAdapter:
    """The motion adapter at the root of a folder or repository; published ones may lack their positional buffers.

    Args:
        source: Folder or Hub id.
        dtype: Of its weights; float32 by default.
        hub: Where it is on the Hub and in the cache, see `cm_diffusers.pipelines.recorded.of_hub`.
        variant: Of its weights; by default the one that a folder has alone.
        use_safetensors: False or None to read pickles.

    Raises:
        ValueError: It is not there, has weights missing or too many, or of other shapes than its config says.
    """
    try:
        kind = MotionAdapter.load_config(source, **(hub or {})).get("_class_name")
        if kind != "MotionAdapter":
            raise UserError(f"its config.json is that of a {kind}")
        options = {"output_loading_info": True, "low_cpu_mem_usage": False, **(hub or {})}
        options |= {"variant": variant or only_variant([Path(source)] if Path(source).is_dir() else [])}
        adapter, info = MotionAdapter.from_pretrained(source, dtype=dtype, use_safetensors=use_safetensors, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{str(source)!r} holds no motion adapter that can be loaded ({reason}).") from error
    lacking = [key for key in info["missing_keys"] if not key.endswith(POSITIONS)]
    for what, keys in (("lacks", lacking), ("has unknown", info["unexpected_keys"])):
        if keys:
            raise UserError(
                f"The motion adapter {str(source)!r} {what} weights ({len(keys)}, such as {sorted(keys)[0]}); get it anew."
            )
    return adapter


def inflate(unet: UNet2DConditionModel, adapter: MotionAdapter) -> UNetMotionModel:
    """The network on clips `(B, C, F, h, w)`: copies of its layers on every frame, and of the motion modules between.

    On "meta" if the image model's is.

    Raises:
        ValueError: They do not fit together.
    """
    if is_xl(unet):
        raise UserError("Stable Diffusion XL is not supported here: give a teacher with one text encoder.")
    if unet.config.norm_num_groups != adapter.config.motion_norm_num_groups:
        raise UserError(
            f"The motion adapter normalises {adapter.config.motion_norm_num_groups} groups of channels and the image "
            f"model {unet.config.norm_num_groups}: it was made for another."
        )
    try:
        with unet.device:
            # from_unet2d moves the motion modules to the network, and pipelines hold them
            between = MotionAdapter.from_config(adapter.config) if is_late(unet) else adapter
            return UNetMotionModel.from_unet2d(unet, between)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"The motion adapter was made for another image model: {reason}") from error


def train_motion(unet: UNetMotionModel, also: str | None = None) -> UNetMotionModel:
    """The motion modules learn, and what has `also` in its name; all else is frozen.

    With gradient checkpointing they are recomputed, too, which diffusers does in the middle block only.
    """
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(MOTION in name or (also is not None and also in name))
    for module in unet.modules():
        if type(module) is AnimateDiffTransformer3D:
            module.__class__, module.gradient_checkpointing = _Recomputed, False  # survives a deep copy
    return unet.train()


class _Recomputed(AnimateDiffTransformer3D):
    """A motion module that keeps no activations when its model checkpoints gradients."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)
        return super().forward(*args, **kwargs)


def motion_adapter_of(unet: UNetMotionModel, like: MotionAdapter) -> MotionAdapter:
    """The motion modules of a network as a model of their own, of `like`'s shape, on the CPU."""
    adapter = MotionAdapter.from_config(like.config)
    adapter.load_state_dict({name: value.cpu() for name, value in unet.state_dict().items() if MOTION in name})
    return adapter


def motion_scheduler(config: MotionConfig, image_scheduler: SchedulerMixin) -> DDIMScheduler:
    """DDIM on the noise schedule that the motion modules belong to, for one image model's prediction type.

    Raises:
        ValueError: The schedule that was asked for is not the one beside the motion modules.
    """
    beside = _scheduler_beside(config)
    wanted = {**ANIMATEDIFF_BETAS, **({"beta_schedule": config.beta_schedule} if config.beta_schedule else {})}
    prediction = {"prediction_type": image_scheduler.config.prediction_type}
    if beside is None:
        settings = {**image_scheduler.config, **wanted, "clip_sample": False, "rescale_betas_zero_snr": False}
        return DDIMScheduler.from_config({**settings, **prediction})
    scheduler = DDIMScheduler.from_config({**beside, **prediction})
    if config.beta_schedule not in (None, scheduler.config.beta_schedule):
        raise UserError(
            f"--beta_schedule {config.beta_schedule}: the motion modules were trained on {scheduler.config.beta_schedule}, "
            "as the scheduler_config.json beside them says; leave the flag out."
        )
    return scheduler


def _scheduler_beside(config: MotionConfig) -> dict | None:
    """Config of the scheduler beside the motion modules; None where there is none.

    Raises:
        ValueError: The Hub does not say whether there is one.
    """
    source, name = config.pretrained_motion_adapter, "scheduler_config.json"
    if source is None:
        return None
    path = Path(source) / name
    if not Path(source).exists():
        try:
            path = Path(hf_hub_download(source, name, revision=config.motion_adapter_revision))
        except (HfHubHTTPError, EntryNotFoundError, HFValidationError) as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                return None
            raise UserError(
                f"--pretrained_motion_adapter {source}: whether it has a {name} cannot be found out "
                f"({type(error).__name__}); try again later, or give a folder."
            ) from error
    if not path.is_file():
        return None
    return {key: value for key, value in json.loads(path.read_text("utf-8")).items() if not key.startswith("_")}


def check_same_schedule(scheduler: SchedulerMixin, other: dict, name: str) -> None:
    """
    Args:
        scheduler: The teacher's.
        other: Config of the scheduler that the student, or a part of it, was trained with.
        name: Of that part, to tell.

    Raises:
        ValueError: Their timesteps mean different noise levels.
    """
    theirs = DDIMScheduler.from_config({name: other[name] for name in BETAS if name in other})
    mine = scheduler.alphas_cumprod
    if len(mine) != len(theirs.alphas_cumprod) or not torch.allclose(mine, theirs.alphas_cumprod, rtol=1e-4):
        told = [json.dumps({name: x.config.get(name) for name in BETAS}) for x in (scheduler, theirs)]
        raise UserError(
            f"{name} was trained on another noise schedule than the teacher's: {told[1]} against {told[0]}. Distil it anew "
            "with the teacher's --beta_schedule."
        )


def video_pipeline(
    image: DiffusionPipeline, unet: UNetMotionModel, adapter: MotionAdapter, scheduler: SchedulerMixin
) -> AnimateDiffPipeline:
    """The stock pipeline that a video model samples in.

    Args:
        image: Where the rest comes from.
        adapter: Of `unet`'s shape; the weights of its motion modules do not act.
    """
    pipe = AnimateDiffPipeline(
        vae=image.vae,
        text_encoder=image.text_encoder,
        tokenizer=image.tokenizer,
        unet=unet,
        motion_adapter=adapter,
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_frames(num_frames: int, adapter: MotionAdapter, flag: str) -> None:
    """
    Raises:
        ValueError: So many frames are more than the motion modules take.
    """
    if num_frames > (most := adapter.config.motion_max_seq_length):
        raise UserError(f"{flag} {num_frames} is more than the {most} frames that the motion adapter takes.")
