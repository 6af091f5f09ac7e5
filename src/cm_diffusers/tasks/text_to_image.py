"""Text-to-image students: distilled from a teacher, and finished ones as the start of further training."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler, SCMScheduler, UNet2DConditionModel
from torch import nn
from transformers.hf_argparser import HfArg

from cm_diffusers.data.generated import GenerationConfig, training_batches
from cm_diffusers.data.sources import DataConfig, source_name
from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.trainer import TrainConfig, Trainer
from cm_diffusers.errors import UserError
from cm_diffusers.models.adapters import add_lora
from cm_diffusers.models.critics import CriticConfig
from cm_diffusers.models.families.base import answers_clips, family_of, network_of
from cm_diffusers.models.families.unet import check_vae
from cm_diffusers.models.quantization import quantization_config
from cm_diffusers.models.single_file import is_single_file
from cm_diffusers.models.students import StudentConfig, frozen_copy, make_networks, trainable
from cm_diffusers.models.teachers import (
    SINGLE_FILE_CONFIG,
    TeacherConfig,
    check_finite,
    frozen,
    load_network,
    load_stock,
    load_teacher,
    network_name,
    release_encoders,
    stock_pipeline,
)
from cm_diffusers.objectives.lcf import LCFConfig
from cm_diffusers.objectives.lcm import LCMObjective
from cm_diffusers.objectives.pcm import PCMObjective
from cm_diffusers.objectives.scott import SCottObjective
from cm_diffusers.objectives.tcd import TCDObjective
from cm_diffusers.pipelines import ConsistencyPipeline
from cm_diffusers.pipelines.lora import load_lora
from cm_diffusers.pipelines.manners import refuse_contradiction
from cm_diffusers.publishing.pipelines import lcm_pipeline, lcm_record
from cm_diffusers.publishing.provenance import describe_run
from cm_diffusers.record import Record, base_model_of, read_record
from cm_diffusers.schedulers.scheduling_flow_consistency import FlowConsistencyScheduler
from cm_diffusers.tasks.callbacks import ValidationConfig, sample_grid
from cm_diffusers.tasks.publish import publish, save_student
from cm_diffusers.tasks.summary import announce
from cm_diffusers.tasks.teachings import student_scheduler
from cm_diffusers.tasks.text_to_image_checks import check_late
from cm_diffusers.tasks.unrecorded import inferred_record
from cm_diffusers.types import Networks


OF_A_DISTILLATION = (
    TeacherConfig, StudentConfig, DataConfig, GenerationConfig, TrainConfig, ValidationConfig,
)  # fmt: skip
WHAT_A_RUN_IS = (
    TeacherConfig,
    StudentConfig,
    DataConfig,
    GenerationConfig,
    CriticConfig,
)  # beside method and training
MakePipeline = Callable[[nn.Module], DiffusionPipeline]
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
    save_fp16: bool = HfArg(default=False, help="Store the student's UNet and VAE, or its LoRA, in half precision.")
    single_file_config: str | None = HfArg(default=None, help=SINGLE_FILE_CONFIG)


def distill(
    name: str,
    teacher: DiffusionPipeline,
    nets: Networks | None,
    objective: LCMObjective | SCottObjective | PCMObjective | TCDObjective,
    optim: OptimConfig | dict[str, OptimConfig],
    configs: Sequence[object],
    repo_id: str | None,
) -> str | None:
    """Train a student, save it with record and card, and push it where that was asked for.

    Args:
        name: Of the method, in the record.
        teacher: Whole, or without its network (`load_teacher`'s `late`).
        nets: To train; None to make them of the teacher once VAE and text towers have done their work.
        optim: As for `Trainer`.
        configs: The script's, for its flags and for the card; those of `OF_A_DISTILLATION` among them.
        repo_id: On the Hub; None to save alone.

    Returns:
        As `publish`.
    """
    given, method = {type(config): config for config in configs}, objective.config
    source, student, data, generation, train, validation = (given[kind] for kind in OF_A_DISTILLATION)
    scheduler = student_scheduler(teacher, method)

    def make_pipeline(network: nn.Module) -> DiffusionPipeline:
        return lcm_pipeline(teacher, network, scheduler)

    guidance = "distilled" if objective.teaching.guiding.told is None else "embedded"
    told = min(max(validation.validation_guidance_scale, method.w_min + 1), method.w_max + 1)
    scale = 1.0 if guidance == "distilled" else told
    base, target_dim = source.pretrained_teacher_model, objective.teaching.target_dim
    record = lcm_record(base, guidance, method.w_min, method.w_max, scale, scheduler)
    frames = 1 if answers_clips(teacher) else None
    record = replace(record, method=name, resolution=data.resolution, num_frames=frames, target_dim=target_dim)
    grid = sample_grid(validation, telling(make_pipeline, record), teacher, scale, data.resolution)
    settings = [config for kind, config in given.items() if kind in WHAT_A_RUN_IS]
    quantization = quantization_config(student.quantize_teacher, student.loaded_dtype, network_name(teacher))
    check_late(teacher, student, bool(generation.prompts_file))
    complete = partial(load_network, teacher, source, student.loaded_dtype, quantization)
    batches = None

    def after_the_data(*place: object) -> Networks:
        nonlocal batches
        if generation.prompts_file:  # the teacher draws the data
            complete()
        batches = training_batches(data, generation, teacher, train.seed, *place)
        if not needs_encoders(student, data, validation, given.get(CriticConfig)):
            release_encoders(teacher)
        complete()
        seed_everything(train.seed)  # adapters start alike, whatever the cache held
        return nets or make_networks(network_of(teacher), student, target_dim)

    trainer = Trainer(train, after_the_data, objective, optim, settings, callbacks=[grid])
    result = "lora" if student.lora else "pipeline"
    trainer.fit(announce(trainer, batches, configs, result))
    describe = partial(describe_run, configs, teacher, base, source_name(data) or generation.prompts_file)
    save = partial(save_student, student, make_pipeline, record)
    return publish(trainer, result, configs, describe, save, repo_id)


def telling(make_pipeline: MakePipeline, record: Record) -> MakePipeline:
    """Makes a pipeline of ours where stock ones would not tell a student where each step goes."""
    if record.target_dim is None:
        return make_pipeline
    return lambda network: ConsistencyPipeline.from_pipe(make_pipeline(network), record=asdict(record))


def needs_encoders(
    student: StudentConfig | FinetuneConfig,
    data: DataConfig,
    validation: ValidationConfig,
    judge: CriticConfig | None = None,
) -> bool:
    """Whether VAE or text towers are called after the cache is filled, or are part of the result."""
    judges_images = judge is not None and judge.critic == "vision"
    return not student.lora or data.streaming or bool(validation.validation_prompts) or judges_images


def load_student(config: FinetuneConfig) -> tuple[DiffusionPipeline, Record]:
    """A student's stock pipeline in float32, frozen, with the scheduler it is sampled with, and its record.

    Of a published consistency model without a record, scheduler and network tell what the record would.

    Raises:
        ValueError: Out of reach, not a latent consistency model, not as its record says, or with missing or non-finite
            weights.
    """
    path = config.pretrained_student_model
    record = read_record(path, revision=config.student_revision)
    pipe = _load(path, record, config)
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
    where = {"teacher_revision": config.student_revision, "teacher_variant": config.student_variant}
    where["single_file_config"] = config.single_file_config
    pipe = load_teacher(TeacherConfig(config.pretrained_student_model, **where))
    network = network_of(pipe)
    if not isinstance(family_of(network).process(pipe), DiscreteVP):
        raise UserError(
            f"--sampler ddim is for models with alphas_cumprod, but {config.pretrained_student_model} is a flow with a "
            f"{type(network).__name__}: distil it first, and tune the student."
        )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe


def _load(path: str, record: Record | None, config: FinetuneConfig) -> DiffusionPipeline:
    revision, options = config.student_revision, {"variant": config.student_variant}
    options["single_file_config"] = config.single_file_config
    lora = record is not None and not _is_pipeline(path, revision)
    if lora and config.lora:
        raise UserError(
            f"{path} is a LoRA, and one LoRA on another cannot be published; leave --lora out (or give "
            "--no_lora), which fuses it first, or give a whole student."
        )
    if not lora:
        return load_stock(path, revision=revision, **options)
    try:
        pipe = load_stock(base_model_of(record, path), **options)
    except ValueError as error:
        raise UserError(f"The base model of the LoRA {path} cannot be loaded: {error}") from error
    load_lora(pipe, path, **({"revision": revision} if revision else {}))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe


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


def critic_optim(config: CriticConfig, student: OptimConfig) -> OptimConfig:
    """How the critic learns."""
    return replace(
        student,
        learning_rate=config.critic_learning_rate,
        adam_beta1=config.critic_adam_beta1,
        adam_beta2=config.critic_adam_beta2,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        lr_cooldown_steps=0,
    )
