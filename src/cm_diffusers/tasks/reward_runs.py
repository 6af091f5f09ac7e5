"""What the scripts of reward fine-tuning share: the model, what it is asked for, and what its images are worth."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from cm_diffusers.data.encoders import Encoders, placed, too_long
from cm_diffusers.data.found import Found
from cm_diffusers.data.prompts import Prompt, named_prompts
from cm_diffusers.data.ragged import joined
from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.engine.sharding import comes_from_the_first
from cm_diffusers.errors import UserError
from cm_diffusers.models.adapters import WithoutAdapters, adapter_layers, add_lora
from cm_diffusers.models.decoding import in_chunks
from cm_diffusers.models.families.base import family_of, latents_of, network_of
from cm_diffusers.models.students import frozen_copy, trainable
from cm_diffusers.models.teachers import TeacherConfig, load_teacher
from cm_diffusers.objectives.lcm import LCMConfig, LCMObjective
from cm_diffusers.pipelines.starts import native_size
from cm_diffusers.policy.policy import Conditions, Policy
from cm_diffusers.publishing.pipelines import lcm_pipeline
from cm_diffusers.ranges import check_ranges
from cm_diffusers.record import Record, first_model_of
from cm_diffusers.rewards import Reward
from cm_diffusers.rewards.base import Metadata
from cm_diffusers.tasks.finished_students import FinetuneConfig, load_ddim, load_student
from cm_diffusers.tasks.teachings import loop_scheduler, teaching_of, told_of
from cm_diffusers.types import Networks


ENCODED_AT_ONCE = 64  # prompts


@dataclass
class RewardModelConfig(FinetuneConfig):
    """The model to tune, and how it is sampled for that."""

    sampler: Literal["consistency", "ddim"] = HfArg(
        default="consistency",
        help="consistency: a student, by the scheduler of its record. ddim: a diffusion model, by DDIM with --eta (DDPO).",
    )
    num_inference_steps: int = HfArg(default=4, help="Steps of sampling, in training as later.")
    guidance_scale: float | None = HfArg(default=None, help="As in diffusers; a student's own if not given.")
    eta: float = HfArg(default=1.0, help="ddim: its noise.")
    lora: bool = HfArg(default=True, help="Train adapters on the model instead of the model.")
    lora_rank: int = HfArg(default=16, help="Rank of the adapters.")
    lora_alpha: float = HfArg(default=32.0, help="Scale of the adapters, times 1 / rank.")
    lora_target_modules: list[str] = HfArg(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"], help="Names of the layers that get adapters."
    )

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass
class RewardConfig:
    """What is sampled, and what is good."""

    rewards: list[str] = HfArg(
        help="What is added up: jpeg_compressibility, jpeg_incompressibility, aesthetic, clip_score, pick_score, hpsv2, "
        "hpsv2.1, image_reward, classifier:FOLDER, multi_view:MODULE:FUNCTION, or MODULE:FUNCTION of images (B, 3, H, W) in "
        "[0, 1], prompts and metadata."
    )
    reward_weights: list[float] | None = HfArg(default=None, help="Weights of --rewards; 1 if not given.")
    prompts: list[str] = HfArg(
        default_factory=lambda: ["simple_animals"],
        help="Prompts; or one set: simple_animals, imagenet_animals, animal_activities, fashion; or a file with one a line.",
    )

    def load_prompts(self) -> list[Prompt]:
        """
        Raises:
            ValueError: As `load_prompts` of `data.prompts`.
        """
        return named_prompts(self.prompts)


@dataclass(frozen=True)
class Tuned:
    """A model that is to be tuned.

    Attributes:
        pipe: Its stock pipeline, frozen.
        record: A student's.
        policy: How it is sampled.
        embedded: Guidance scale that the network is told, where it takes one.
    """

    pipe: DiffusionPipeline
    record: Record | None
    policy: Policy
    embedded: float | None = None

    @property
    def guidance_scale(self) -> float:
        return self.policy.guidance_scale if self.embedded is None else self.embedded

    def pipeline(self, network: nn.Module) -> DiffusionPipeline:
        """The stock pipeline with this network."""
        if self.record is not None:
            return lcm_pipeline(self.pipe, network, self.pipe.scheduler)
        pipe = type(self.pipe).from_pipe(self.pipe, unet=network)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @property
    def network(self) -> nn.Module:
        return network_of(self.pipe)

    def size(self, resolution: int | None) -> tuple[int, int]:
        """Height and width of images in pixels, of what was trained at if no side is asked for.

        Raises:
            ValueError: Nothing says what that is.
        """
        factor = latents_of(self.pipe).downscale
        size = (resolution, resolution) if resolution else native_size(self.network, factor, self.record)
        if size is None:
            raise UserError("--resolution is missing: the network's config does not say the size it was trained with.")
        return size

    def side(self, resolution: int | None) -> int | None:
        """Of square images; None of others."""
        height, width = self.size(resolution)
        return height if height == width else None

    def shape(self, resolution: int | None) -> tuple[int, int, int]:
        """Of latents.

        Raises:
            ValueError: VAE and network do not divide the resolution.
        """
        latents, size = latents_of(self.pipe), self.size(resolution)
        if resolution and resolution % latents.multiple:
            raise UserError(
                f"--resolution {resolution} must be a multiple of {latents.multiple}, by which the VAE makes images smaller."
            )
        return latents.channels, size[0] // latents.downscale, size[1] // latents.downscale


def load_tuned(config: RewardModelConfig, final_std: float) -> Tuned:
    """
    Args:
        final_std: Noise of the last step.

    Raises:
        ValueError: It is out of reach or no such model, or cannot be sampled so.
    """
    if config.sampler == "ddim":
        pipe = load_ddim(config)
        scale = 1.0 if config.guidance_scale is None else config.guidance_scale
        return Tuned(pipe, None, Policy(pipe.scheduler, config.num_inference_steps, scale, final_std, config.eta))
    pipe, record = load_student(config)
    family = family_of(network_of(pipe))
    scale = record.recommended_guidance_scale if config.guidance_scale is None else config.guidance_scale
    embeds = record.guidance == "embedded"
    how = {"final_std": final_std, "call": family.call, "combine": family.combine}
    policy = Policy(loop_scheduler(pipe), config.num_inference_steps, 1.0 if embeds else scale, **how)
    return Tuned(pipe, record, policy, scale if embeds else None)


def tuned_networks(network: nn.Module, config: RewardModelConfig, keeps_start: bool) -> Networks:
    """The model that learns, and what it was before as `teacher`.

    Args:
        keeps_start: Whether that is needed; with adapters it costs nothing.
    """
    if config.lora:
        sizes = config.lora_rank, config.lora_alpha, config.lora_dropout
        student = add_lora(network, *sizes, config.lora_target_modules)
        return Networks(student, teacher=WithoutAdapters(student))
    before = frozen_copy(network) if keeps_start else None
    return Networks(trainable(network), teacher=before)


def distillation_of(tuned: Tuned, nets: Networks, source: RewardModelConfig, teacher: str | None) -> LCMObjective:
    """The loss that a student was distilled with; its networks join those that are given.

    Args:
        tuned: The student.
        nets: Its network that learns; gets the teacher, and a target where that is not a LoRA.
        source: Where the student is.
        teacher: Folder or Hub id of the diffusion model; the student's base model, or that of this, if not given.

    Raises:
        ValueError: The teacher cannot be loaded, or predicts something else.
    """
    record, config, family = tuned.record, tuned.pipe.scheduler.config, family_of(tuned.network)
    teacher = teacher or first_model_of(record, source.pretrained_student_model)
    pipe = load_teacher(TeacherConfig(teacher), late=comes_from_the_first())
    kinds = [family_of(network_of(each)).prediction_type(each) for each in (pipe, tuned.pipe)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"The teacher {teacher} predicts {kinds[0]} and the student {kinds[1]}; give the diffusion model that the student "
            "came from as --pretrained_teacher_model."
        )
    nets.teacher = network_of(pipe)
    if not adapter_layers(nets.student):
        nets.target = frozen_copy(nets.student)
    if isinstance(family.process(tuned.pipe), DiscreteVP):
        grid = {
            "num_ddim_timesteps": config.original_inference_steps,
            "timestep_scaling_factor": config.timestep_scaling,
        }
    else:
        grid = {"shift": config.get("shift", 1.0), "num_ddim_timesteps": config.get("original_inference_steps", 50)}
    method = LCMConfig(w_min=record.w_min, w_max=record.w_max, time_power=0.0, **grid)  # as published
    teaching = teaching_of(pipe, None, method)
    guiding = replace(teaching.guiding, told=told_of(tuned.network))
    return LCMObjective(method, replace(teaching, guiding=guiding))


@dataclass
class PromptConditions:
    """Numbers of prompts `(B,)` -> the network's arguments with them, and without any."""

    table: Conditions  # the empty prompt comes last
    constant: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, tuned: Tuned, prompts: Sequence[str], resolution: int | None, device: torch.device
    ) -> "PromptConditions":
        encoders, texts = Encoders.from_pipeline(tuned.pipe), [*prompts, ""]
        too_long(texts, encoders.tokenizers, Found("--prompts", aloud=True))
        with torch.no_grad(), placed(encoders.towers, device):
            starts = tqdm(range(0, len(texts), ENCODED_AT_ONCE), "Encoding prompts", delay=1)
            parts = [encoders.encode_prompts(texts[start : start + ENCODED_AT_ONCE]) for start in starts]
        constant = {}
        if tuned.embedded is not None:
            constant |= told_of(tuned.network)({}, torch.tensor([tuned.embedded - 1]))
        if encoders.micro_conditioning:
            height, width = tuned.size(resolution)
            constant["time_ids"] = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
        return cls({name: value.cpu() for name, value in joined(parts).items()}, constant)

    def __call__(self, numbers: Tensor) -> tuple[Conditions, Conditions]:
        return self._of(numbers), self._of(torch.full_like(numbers, -1))

    def _of(self, numbers: Tensor) -> Conditions:
        rows = {name: value[numbers.cpu()].to(numbers.device) for name, value in self.table.items()}
        return rows | {
            name: value.expand(len(numbers), *value.shape[1:]).to(numbers.device)
            for name, value in self.constant.items()
        }


@dataclass(frozen=True)
class ImageScore:
    """What latents `(B, C, h, w)` are worth as images of the prompts with these numbers `(B,)`; with a gradient."""

    pipe: DiffusionPipeline
    prompts: list[Prompt]
    reward: Reward

    def __call__(self, latents: Tensor, numbers: Tensor) -> Tensor:
        return self.worth(self.images(latents), numbers, self.reward)

    def worth(self, images: Tensor, numbers: Tensor, reward: Reward) -> Tensor:
        """`(B,)`, by this or another reward."""
        with torch.autocast(images.device.type, enabled=False):
            return reward(images, *told(self.prompts, numbers))

    def of_texts(self, latents: Tensor, texts: list[str], metadata: Metadata | None) -> Tensor:
        """`(B,)`, as images of any prompts."""
        images = self.images(latents)
        with torch.autocast(images.device.type, enabled=False):
            return self.reward(images, texts, metadata)

    def images(self, latents: Tensor) -> Tensor:
        """`(B, 3, H, W)` in [0, 1]."""
        return torch.cat(in_chunks(self._decoded, latents, latents_of(self.pipe).downscale))

    def _decoded(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            decoded = latents_of(self.pipe).decode(self.pipe.vae, latents.float())
        return (decoded / 2 + 0.5).clamp(0, 1)


def told(prompts: list[Prompt], numbers: Tensor) -> tuple[list[str], Metadata]:
    """Texts and metadata of the prompts with these numbers `(B,)`."""
    texts, metadata = zip(*(prompts[number] for number in numbers.tolist()), strict=True)
    return list(texts), list(metadata)
