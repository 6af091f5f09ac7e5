"""Finished students, and diffusion models in their place, as the start of further training."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler, SCMScheduler, UNet2DConditionModel
from torch import nn
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.engine.sharding import comes_from_the_first
from cm_diffusers.errors import UserError
from cm_diffusers.models.adapters import add_lora
from cm_diffusers.models.casting import part_dtypes
from cm_diffusers.models.families.base import family_of, network_of
from cm_diffusers.models.families.unet import check_vae
from cm_diffusers.models.single_file import is_single_file
from cm_diffusers.models.students import HALF, frozen_copy, trainable
from cm_diffusers.models.teachers import (
    SINGLE_FILE_CONFIG,
    TeacherConfig,
    check_finite,
    frozen,
    is_late,
    load_stock,
    load_teacher,
    stock_pipeline,
)
from cm_diffusers.objectives.lcf import LCFConfig
from cm_diffusers.pipelines.lora import load_lora
from cm_diffusers.pipelines.manners import refuse_contradiction
from cm_diffusers.record import Record, base_model_of, read_record
from cm_diffusers.schedulers.scheduling_flow_consistency import FlowConsistencyScheduler
from cm_diffusers.tasks.unrecorded import inferred_record
from cm_diffusers.types import Networks


SCHEDULERS = {kind.__name__: kind for kind in (FlowConsistencyScheduler, SCMScheduler)}  # of students of flows


@dataclass
class FinetuneConfig:
    """The student to go on from, and what of it trains."""

    pretrained_student_model: str = HfArg(
        help="Folder, Hub id or .safetensors file of a latent consistency model or of SANA-Sprint, or folder or Hub id of a LoRA "
        "of this package, which is fused."
    )
    student_revision: str | None = HfArg(default=None, help="Branch, tag or commit on the Hub.")
    student_variant: str | None = HfArg(default=None, help='Variant of the weight files, e.g. "fp16".')
    lora: bool = HfArg(default=False, help="Train adapters on the student instead of the student.")
    lora_rank: int = HfArg(default=64, help="Rank of the adapters.")
    lora_alpha: float = HfArg(default=64.0, help="Scale of the adapters, times 1 / rank.")
    lora_dropout: float = HfArg(default=0.0, help="Dropout before the adapters.")
    lora_target_modules: list[str] | None = HfArg(
        default=None, help="Names of the layers that get adapters; those of the student's family if not given."
    )
    save_fp16: bool = HfArg(
        default=False, help=f"Store the student's network and VAE, or its LoRA, in half precision: {HALF}."
    )
    single_file_config: str | None = HfArg(default=None, help=SINGLE_FILE_CONFIG)

    @property
    def place(self) -> TeacherConfig:
        """Where it is, as of a teacher."""
        where = {"teacher_revision": self.student_revision, "teacher_variant": self.student_variant}
        return TeacherConfig(self.pretrained_student_model, **where, single_file_config=self.single_file_config)


def load_student(config: FinetuneConfig, late: bool = False) -> tuple[DiffusionPipeline, Record]:
    """A student's stock pipeline in float32, frozen, with the scheduler it is sampled with, and its record.

    Of a published consistency model without a record, scheduler and network tell what the record would.

    Args:
        late: As for `load_teacher`; a LoRA is fused at once. A network that `comes_from_the_first` is on "meta" in any case.

    Raises:
        ValueError: Out of reach, not a latent consistency model, not as its record says, or with missing or non-finite
            weights.
    """
    path = config.pretrained_student_model
    record = read_record(path, revision=config.student_revision)
    pipe = _load(path, record, config, late)
    network = network_of(pipe, path)
    if isinstance(network, UNet2DConditionModel):
        check_vae(path, pipe.vae)
    if record is not None and record.method not in ("lcm", "lcf", "scott", "rlcm", "direct_reward"):
        raise UserError(f"{path} was made by {record.method!r}; fine-tuning is for latent consistency models (lcm).")
    record = record or inferred_record(path, pipe)
    refuse_contradiction(path, record, network)
    check_finite(f"The student {path}", pipe)
    pipe = stock_pipeline(pipe)
    config = {name: value for name, value in record.scheduler.items() if name != "_class_name"}
    kind = SCHEDULERS.get(record.scheduler.get("_class_name"), LCMScheduler)
    pipe.scheduler = kind.from_config(config)
    return frozen(pipe), record


def load_ddim(config: FinetuneConfig) -> DiffusionPipeline:
    """A diffusion model in a student's place, with DDIM: frozen, in float32.

    Raises:
        ValueError: As `load_teacher`, or it is of another process.
    """
    pipe = load_teacher(config.place, late=comes_from_the_first())
    network = network_of(pipe)
    if not isinstance(family_of(network).process(pipe), DiscreteVP):
        raise UserError(
            f"--sampler ddim is for models with alphas_cumprod, but {config.pretrained_student_model} is a flow with a "
            f"{type(network).__name__}: distil it first, and tune the student."
        )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe


def _load(path: str, record: Record | None, config: FinetuneConfig, late: bool) -> DiffusionPipeline:
    revision, options = config.student_revision, {"variant": config.student_variant}
    options["single_file_config"] = config.single_file_config
    lora = record is not None and not _is_pipeline(path, revision)
    if lora and config.lora:
        raise UserError(
            f"{path} is a LoRA, and one LoRA on another cannot be published; leave --lora out (or give "
            "--no_lora), which fuses it first, or give a whole student."
        )
    known = comes_from_the_first()
    if not lora:
        return _load_stock(path, late or known, revision=revision, **options)
    try:
        pipe = _load_stock(base_model_of(record, path), known, **options)
    except ValueError as error:
        raise UserError(f"The base model of the LoRA {path} cannot be loaded: {error}") from error
    load_lora(pipe, path, **({"revision": revision} if revision else {}))
    if not is_late(network_of(pipe)):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe


def _load_stock(source: str, late: bool, **options: str | None) -> DiffusionPipeline:
    return load_stock(source, part_dtypes(None if late and not is_single_file(source) else torch.float32), **options)


def _is_pipeline(path: str, revision: str | None) -> bool:
    if is_single_file(path) or Path(path).exists():
        return Path(path).is_file() or (Path(path) / "model_index.json").is_file()
    try:
        return bool(DiffusionPipeline.load_config(path, revision=revision))
    except OSError:
        return False


def with_guidance_of(record: Record, method: LCFConfig, config: FinetuneConfig) -> tuple[LCFConfig, Record]:
    """The method with the guidance range it will train on, and the record of what comes of it.

    Raises:
        ValueError: A range was given for a student that takes no guidance.
    """
    made_from = replace(record, method="lcf", base_model=config.pretrained_student_model)
    given = {name: value for name in ("w_min", "w_max") if (value := getattr(method, name)) is not None}
    if record.guidance != "embedded":
        if given:
            raise UserError(
                f"--{next(iter(given))} has no effect: {config.pretrained_student_model} takes no guidance as an input; "
                "leave it out."
            )
        return method, made_from
    bounds = {"w_min": record.w_min, "w_max": record.w_max} | given
    scale = min(max(record.recommended_guidance_scale, bounds["w_min"] + 1), bounds["w_max"] + 1)
    return replace(method, **bounds), replace(made_from, **bounds, recommended_guidance_scale=scale)


def finetune_networks(network: nn.Module, config: FinetuneConfig) -> Networks:
    """The student with its EMA target, or with adapters and then its own target."""
    if config.lora:
        return Networks(
            add_lora(network, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_target_modules)
        )
    student = trainable(network)
    return Networks(student, target=frozen_copy(student))
