"""The stages of AnimateLCM (2402.00769): which networks each has, what of them learns, and what is published."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    LCMScheduler,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from torch import nn
from transformers.hf_argparser import HfArg

from cm_diffusers.data.video import single_frames
from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.diffusion.teaching import Teaching, vp_teaching
from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError
from cm_diffusers.models.adapters import WithoutAdapters, add_lora
from cm_diffusers.models.conditioned_unet import ConditionedUNet
from cm_diffusers.models.families.unet import LCM_LORA_TARGETS
from cm_diffusers.models.image_to_video import ImageToVideoAdapter
from cm_diffusers.models.motion import check_same_schedule, inflate, motion_adapter_of, train_motion, video_pipeline
from cm_diffusers.models.students import frozen_copy
from cm_diffusers.models.teachers import is_late
from cm_diffusers.objectives.lcf import LCFConfig, LCFObjective
from cm_diffusers.objectives.lcm import LCMConfig, LCMObjective
from cm_diffusers.pipelines.pipeline_consistency import ConsistencyPipeline
from cm_diffusers.publishing.folders import model_writer, write_result
from cm_diffusers.publishing.lora_export import Lora
from cm_diffusers.publishing.other_cards import condition_card
from cm_diffusers.publishing.pipelines import lcm_pipeline, lora_writer, save_lora
from cm_diffusers.publishing.provenance import Provenance
from cm_diffusers.record import Record
from cm_diffusers.types import Batch, Networks


logger = logging.getLogger(__name__)
Batches = Callable[[int], Iterator[Batch]]


@dataclass
class StageConfig:
    """Which stage, and what it starts from."""

    stage: Literal["image_lora", "motion", "joint", "adapter"] = HfArg(
        help="image_lora: an LCM-LoRA of the image model, on single frames. motion: the motion modules, with that LoRA "
        "in the student. joint: both at once, on clips. adapter: a condition for a finished student, without a teacher.",
    )
    spatial_lora: str | None = HfArg(
        default=None, help="Folder or Hub id of the LCM-LoRA that the first stage or distill_lcm.py made."
    )
    spatial_lora_weight_name: str | None = HfArg(default=None, help="Its file, where there are several.")
    spatial_lora_revision: str | None = HfArg(default=None, help="Branch, tag or commit on the Hub.")
    target_init: Literal["teacher", "student"] = HfArg(
        default="teacher",
        help="Stage motion: the averaged target starts without the LoRA, which then leaks into it, or with it.",
    )
    lora_rank: int = HfArg(default=64, help="Rank of the LoRA that is trained.")
    lora_alpha: float = HfArg(default=64.0, help="Its scale, times 1 / rank.")
    condition: Literal["image", "edges"] = HfArg(
        default="image",
        help="Stage adapter: image, an ImageToVideoAdapter for the first frame; edges, a ControlNet for those of all frames.",
    )
    cast_teacher_unet: Literal["no", "bf16", "fp16"] = HfArg(
        default="no", help="Keep the teacher in half precision (with --mixed_precision of the same kind)."
    )
    save_fp16: bool = HfArg(default=False, help="Store motion modules, adapter and LoRA in half precision.")


@dataclass(frozen=True)
class Parts:
    """What every stage starts from.

    Attributes:
        image: The teacher's image pipeline, frozen.
        adapter: The teacher's motion modules; None where they are not needed.
        scheduler: Of the student: its betas are the teacher's.
    """

    image: DiffusionPipeline
    adapter: MotionAdapter | None
    scheduler: LCMScheduler

    def teaching(self, method: LCMConfig) -> Teaching:
        process, grid = (
            DiscreteVP.from_scheduler(self.scheduler),
            (method.num_ddim_timesteps, method.timestep_scaling_factor),
        )
        return vp_teaching(process, self.scheduler.config.prediction_type, None, *grid)


@dataclass(frozen=True)
class Stage:
    """What the training script needs to know.

    Attributes:
        make_pipeline: Trained network -> what it samples in; None for a stage without sample grids.
        save: (network, folder, record, provenance) -> None.
        result: Name of the result's folder.
        views: Batches of clips -> the batches of this stage.
        wanted: Arguments of `video_batches`.
    """

    nets: Networks
    objective: LCMObjective | LCFObjective
    make_pipeline: Callable[[nn.Module], DiffusionPipeline] | None
    save: Callable[[nn.Module, Path, Record, Provenance], None]
    result: str
    views: Callable[[Batches], Batches] = lambda batches: batches
    wanted: dict[str, object] = field(default_factory=dict)


def make_stage(config: StageConfig, method: LCMConfig, parts: Parts) -> Stage:
    """
    Raises:
        ValueError: Something that the stage needs is missing, or a flag would have no effect in it.
    """
    if config.stage not in STAGES:
        raise UserError(f"Unknown --stage {config.stage!r}; one of {', '.join(STAGES)}.")
    for names, stages in ACTS.items():
        if config.stage not in stages.split():
            refuse_changed(config, names, f"in stage {config.stage}")
    if config.stage in ("motion", "adapter") and config.spatial_lora is None:
        raise UserError(
            f"--spatial_lora is missing: stage {config.stage} needs the LCM-LoRA of the image model; make it with --stage "
            "image_lora, or with distill_lcm.py --lora."
        )
    return STAGES[config.stage](config, method, parts)


def idle_settings(stage: str) -> list[str]:
    """Flags that do not act in a stage."""
    return [name for names, stages in ACTS.items() if stage not in stages.split() for name in names.split()]


def image_lora(config: StageConfig, method: LCMConfig, parts: Parts) -> Stage:
    """An LCM-LoRA of the image model: `LCMObjective` on single frames."""
    unet = parts.image.unet
    student = add_lora(unet, config.lora_rank, config.lora_alpha, 0.0)

    return Stage(
        Networks(student, teacher=WithoutAdapters(student)),
        LCMObjective(method, parts.teaching(method)),
        lambda network: lcm_pipeline(parts.image, network, parts.scheduler),
        lambda network, *where: save_lora(network, *where, fp16=config.save_fp16),
        "lora",
        views=single_frames,
    )


def motion(config: StageConfig, method: LCMConfig, parts: Parts) -> Stage:
    """The motion modules of a student whose image layers hold the LoRA; the teacher has none (v1, Sec. 4.2).

    The target starts as the teacher. It averages all weights, those that do not train among them, so after k steps its
    image layers are W + (1 - mu^k) BA: first it is the diffusion model, then the consistency model.
    """
    teacher = inflate(parts.image.unet, parts.adapter).requires_grad_(False).eval()
    unet, lora, _ = _fused_alike(parts, config)
    student = train_motion(inflate(unet, parts.adapter))
    target = frozen_copy(teacher if config.target_init == "teacher" else student).train()
    return Stage(
        Networks(student, target=target, teacher=_cast(teacher, config)),
        LCMObjective(method, parts.teaching(method)),
        lambda network: video_pipeline(parts.image, network, parts.adapter, parts.scheduler),
        lambda network, *where: _save_student(config, parts, network, lora, *where),
        "student",
    )


def joint(config: StageConfig, method: LCMConfig, parts: Parts) -> Stage:
    """Image LoRA and motion modules learn together, on clips: what decoupled training is compared with."""
    teacher = inflate(parts.image.unet, parts.adapter).requires_grad_(False).eval()
    layers = image_layers(parts.image.unet, LCM_LORA_TARGETS)
    student = add_lora(inflate(parts.image.unet, parts.adapter), config.lora_rank, config.lora_alpha, 0.0, layers)
    student = train_motion(student, also="lora_")
    return Stage(
        Networks(student, target=frozen_copy(student), teacher=_cast(teacher, config)),
        LCMObjective(method, parts.teaching(method)),
        lambda network: video_pipeline(parts.image, network, parts.adapter, parts.scheduler),
        lambda network, *where: _save_student(config, parts, network, Lora.of(network), *where),
        "student",
    )


def adapter(config: StageConfig, method: LCMConfig, parts: Parts) -> Stage:
    """A condition learns in front of a finished, frozen student, without a teacher (v1, Sec. 4.3).

    Both times of a pair come from the same clip and the same noise, as in `LCFObjective`.
    """
    refuse_changed(method, "w_min w_max solver", "in stage adapter: it has no teacher")
    unet, _, record = _fused_alike(parts, config)
    if record is not None:
        refuse_changed(
            method, "num_ddim_timesteps timestep_scaling_factor", "in stage adapter: they are the student's"
        )
        told = record.scheduler
        grid = told.get("original_inference_steps", 50), told.get("timestep_scaling", 10.0)
        method = replace(method, num_ddim_timesteps=grid[0], timestep_scaling_factor=grid[1])
    student = inflate(unet, parts.adapter).requires_grad_(False)
    edges = config.condition == "edges"
    result = "controlnet" if edges else "image_adapter"
    condition = _new_controlnet(parts, unet) if edges else ImageToVideoAdapter.from_unet(unet)
    return Stage(
        Networks(ConditionedUNet(student, condition.train().requires_grad_(True))),
        LCFObjective(LCFConfig(loss_type=method.loss_type), parts.teaching(method)),
        None,
        lambda network, folder, record, provenance: write_result(
            folder,
            [model_writer(network.condition, config.save_fp16)],
            provenance=provenance,
            card=condition_card(provenance, result, config.spatial_lora),
        ),
        result,
        wanted={"control": "edges"} if edges else {"first_frame": True},
    )


def _cast(teacher: UNetMotionModel, config: StageConfig) -> UNetMotionModel:
    """In the teacher's own precision; after the target was copied from it."""
    return teacher.to({"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.cast_teacher_unet])


def _fused_alike(parts: Parts, config: StageConfig) -> tuple[UNet2DConditionModel, Lora | None, Record | None]:
    """A copy of the image model's network with a LoRA of its noise schedule in the weights, that LoRA (not on "meta"), and its record.

    Raises:
        ValueError: It does not load or does not fit.
    """
    pipe = ConsistencyPipeline.from_pipe(parts.image, unet=copy.deepcopy(parts.image.unet), record=None)
    options = {"weight_name": config.spatial_lora_weight_name, "revision": config.spatial_lora_revision}
    pipe.load_lora_weights(
        config.spatial_lora,
        use_safetensors=True,
        **{name: value for name, value in options.items() if value is not None},
    )
    if others := sorted(set(pipe.get_list_adapters()) - {"unet"}):
        raise UserError(
            f"The LoRA {config.spatial_lora} also has layers for {' and '.join(others)}: give one of the UNet alone."
        )
    if pipe.record is None:
        logger.warning(
            "%s does not say which noise schedule it was trained on; taken for the teacher's, %s.",
            config.spatial_lora,
            parts.scheduler.config.beta_schedule,
        )
    else:
        check_same_schedule(parts.scheduler, pipe.record.scheduler, f"The LoRA {config.spatial_lora}")
    lora, record = None if is_late(pipe.unet) else Lora.of(pipe.unet), pipe.record
    if lora is not None:
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe.unet, lora, record


def _new_controlnet(parts: Parts, unet: UNet2DConditionModel) -> ControlNetModel:
    """Whose hint is halved as often as the VAE halves images; the stock one halves three times."""
    halvings = len(parts.image.vae.config.block_out_channels)
    with unet.device:
        return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 96, 256)[:halvings])


def image_layers(unet: UNet2DConditionModel, names: Sequence[str]) -> list[str]:
    """Paths of all layers with one of these names: patterns would also find layers of motion modules."""
    return [path for path, _ in unet.named_modules() if any(f".{path}".endswith(f".{name}") for name in names)]


def _save_student(
    config: StageConfig,
    parts: Parts,
    network: UNetMotionModel,
    lora: Lora,
    folder: Path,
    record: Record,
    provenance: Provenance,
) -> None:
    """Motion modules, noise schedule and LoRA, as stock diffusers reads them."""
    modules = model_writer(motion_adapter_of(network, parts.adapter), config.save_fp16)
    record = replace(record, method="animatelcm")
    write_lora = lora_writer(lora, record, config.save_fp16)
    write_result(folder, [modules, parts.scheduler.save_config, write_lora], record, provenance)


STAGES = {"image_lora": image_lora, "motion": motion, "joint": joint, "adapter": adapter}
ACTS = {  # flags -> the stages in which they act
    "spatial_lora": "motion adapter",
    "target_init": "motion",
    "cast_teacher_unet": "motion joint",
    "spatial_lora_weight_name spatial_lora_revision": "motion adapter",
    "lora_rank lora_alpha": "image_lora joint",
    "condition": "adapter",
}
