"""The networks that a training script makes of its flags, on "meta", and what it asks of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from cm_diffusers.data.clip_config import ClipConfig
from cm_diffusers.data.prompts_alone import PromptDataConfig
from cm_diffusers.data.rollouts import RolloutConfig
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.data.video import VideoDataConfig
from cm_diffusers.diffusion.views import EDMView
from cm_diffusers.errors import UserError
from cm_diffusers.models.adapters import add_lora
from cm_diffusers.models.casting import cast
from cm_diffusers.models.classifier import ImageClassifier
from cm_diffusers.models.counting import Ask
from cm_diffusers.models.critics import CriticConfig, make_critic, make_view_critic
from cm_diffusers.models.dropout import DropoutConfig
from cm_diffusers.models.families.base import FAMILIES, family_of
from cm_diffusers.models.families.unet import LCM_LORA_TARGETS
from cm_diffusers.models.motion import NewMotionConfig, inflate, new_motion_adapter, train_motion
from cm_diffusers.models.probes import asking
from cm_diffusers.models.small_stable_diffusion import (
    SmallStableDiffusionConfig,
    SmallVAEConfig,
    new_pipeline,
    new_vae,
)
from cm_diffusers.models.students import (
    DTYPES,
    StudentConfig,
    StudentNetworkConfig,
    TextConditionedUNet,
    frozen_copy,
    make_networks,
)
from cm_diffusers.models.target_input import TARGET_DIM
from cm_diffusers.models.teachers import TeacherConfig
from cm_diffusers.models.time_weight import WithTimeWeight
from cm_diffusers.models.with_target import with_target
from cm_diffusers.objectives.autoencoder import AutoencoderWithPosterior
from cm_diffusers.objectives.cd import CDConfig
from cm_diffusers.objectives.classification import ClassificationConfig
from cm_diffusers.objectives.ct import CTConfig
from cm_diffusers.objectives.ctm import CTMConfig
from cm_diffusers.objectives.direct_reward import DirectRewardConfig
from cm_diffusers.objectives.ect import ECTConfig
from cm_diffusers.objectives.mean_flow import MeanFlowConfig
from cm_diffusers.objectives.rlcm import RLCMConfig
from cm_diffusers.objectives.scm import SCDConfig, SCMConfig
from cm_diffusers.objectives.tcd import TCDConfig
from cm_diffusers.tasks.animatelcm import StageConfig, image_layers
from cm_diffusers.tasks.finished_students import FinetuneConfig, finetune_networks
from cm_diffusers.tasks.flow_models import SmallFlowConfig, new_flow_pipeline
from cm_diffusers.tasks.image_models import ClassConfig, ImageModel, NewModelConfig, StartConfig, new_unet
from cm_diffusers.tasks.image_runs import trainable_copy
from cm_diffusers.tasks.passes import METHODS, Pass, passes_for_rewards, passes_of
from cm_diffusers.tasks.plan_starts import Given, Start, stored_vae_config, vae_downscale
from cm_diffusers.tasks.reward_runs import RewardModelConfig, tuned_networks
from cm_diffusers.tasks.scd import student_and_teacher
from cm_diffusers.types import Networks


@dataclass(frozen=True)
class Training:
    """What a step works with.

    Attributes:
        ask: Calls one of the networks on a sample.
        passes: Of a step, for each sample.
        batch_size: Of a micro-batch of a process.
    """

    nets: Networks
    ask: Ask
    passes: list[Pass]
    batch_size: int


ANY_VIEW = EDMView(0.5, "edm")  # how noise is told changes no size
FRAMES_PER_LATENT = 4  # of Wan's VAE
SMALL_VAE = {"block_out_channels": (32, 64, 64), "down_block_types": ("DownEncoderBlock2D",) * 3, "norm_num_groups": 8}
SMALL_VAE |= {"up_block_types": ("UpDecoderBlock2D",) * 3, "latent_channels": 4}  # train_vae.py's, by default
Find = Callable[[str, str], Start]  # (place, flag) -> see `start_of`


def training_of(given: Given, find: Find) -> Training:
    """
    Args:
        given: The configs of a training script.
        find: Networks to start from.

    Raises:
        ValueError: It is no script of one network that is trained, or a network does not fit the flags.
    """
    method = next((config for config in given.values() if type(config) in METHODS), None)
    kind = next((kind for kind in MAKERS if kind in given), None)
    if kind is None:
        raise UserError("The flags are of no training that can be planned: give a recipe of a training script.")

    def found(place: str, flag: str) -> Start:
        with torch.device("cpu"):  # for what is imported and loaded on the way
            return find(place, flag)

    with torch.device("meta"):
        nets, ask, branches = MAKERS[kind](given, method, found)
    data = given[
        next(kind for kind in (RolloutConfig, DataConfig, PromptDataConfig, VideoDataConfig) if kind in given)
    ]
    if RewardModelConfig in given:
        reward = given[RLCMConfig if RLCMConfig in given else DirectRewardConfig]
        passes = passes_for_rewards(given[RewardModelConfig], reward, given.get(RolloutConfig))
    else:
        passes = passes_of(method, branches, nets.critic is not None)
    return Training(nets, ask, passes, data.train_batch_size)


Made = tuple[Networks, Ask, int]  # and the teacher's branches, see `passes_of`


def _of_prompts(given: Given, method: Any, find: Find) -> Made:
    start, student = (
        find(given[TeacherConfig].pretrained_teacher_model, "--pretrained_teacher_model"),
        given[StudentConfig],
    )
    target = TARGET_DIM if type(method) is TCDConfig and method.target_time == "embedded" else None
    branches = _branches(start.network)
    nets = make_networks(start.network, student, target)
    judge = given.get(CriticConfig, CriticConfig("none"))
    if judge.critic != "vision":  # which is a network of its own, on images
        nets.critic = make_critic(nets, judge)
    clips = given[ClipConfig].sample_n_frames if ClipConfig in given else None
    frames = clips and 1 + (clips - 1) // FRAMES_PER_LATENT
    return nets, _asking(start, _resolution(given), frames), branches


def _of_students(given: Given, method: Any, find: Find) -> Made:
    source = given[FinetuneConfig]
    start = find(source.pretrained_student_model, "--pretrained_student_model")
    return finetune_networks(start.network, source), _asking(start, _resolution(given)), 1


def _for_rewards(given: Given, method: Any, find: Find) -> Made:
    source = given[RewardModelConfig]
    start = find(source.pretrained_student_model, "--pretrained_student_model")
    reward = given[RLCMConfig if RLCMConfig in given else DirectRewardConfig]
    before = bool(reward.kl_coef or (RolloutConfig in given and given[RolloutConfig].kl_in_advantage))
    nets = tuned_networks(start.network, source, before)
    if getattr(reward, "through", "") == "single_step":
        teacher = reward.pretrained_teacher_model
        nets.teacher = find(teacher, "--pretrained_teacher_model").network if teacher else frozen_copy(start.network)
        nets.target = None if source.lora else frozen_copy(nets.student)
    return nets, _asking(start, _resolution(given)), 1


def _of_images(given: Given, method: Any, find: Find) -> Made:
    """CD, CTM, sCD, ECT and the change of a network's time."""
    start = find(given[StartConfig].pretrained_teacher_model, "--pretrained_teacher_model")
    ask, network, dropout = (
        _asking(start, _resolution(given)),
        start.network.requires_grad_(False),
        given[DropoutConfig],
    )
    guided = type(network).__name__ in FAMILIES
    if type(method) is SCMConfig:
        taught, student = given[SCDConfig], given[StudentNetworkConfig]
        model = ImageModel(network, ANY_VIEW, pipe=object() if guided else None)
        dim = None if taught.w_min == taught.w_max or not guided else student.guidance_embedding_dim(network)
        branches = _branches(network) if (taught.w_min, taught.w_max) != (0, 0) else 1
        return (
            student_and_teacher(model, student, dropout, dim, method.learned_weight, taught.dmd_weight > 0),
            ask,
            branches,
        )
    if type(method) is CTMConfig:
        student = trainable_copy(with_target(network), dropout)
        critic = make_view_critic(network, ANY_VIEW, given[CriticConfig])
        return Networks(student, frozen_copy(student), network, critic), ask, 1
    student = trainable_copy(network, dropout)
    if type(method) is CDConfig:
        branches = _branches(network) if guided and method.w else 1
        return Networks(student, frozen_copy(student), network), ask, branches
    return Networks(student, teacher=None if type(method) is ECTConfig else network), ask, 1


def _of_nothing(given: Given, method: Any, find: Find) -> Made:
    """Networks that learn from images alone."""
    new, side, channels, classes = given[NewModelConfig], _resolution(given), 3, given[ClassConfig].num_classes
    if new.pretrained_vae:
        vae = stored_vae_config(new.pretrained_vae)
        side, channels = side // vae_downscale(vae), vae["latent_channels"]
    hides = type(method) is MeanFlowConfig and method.condition_dropout > 0
    network = new_unet(new.unet_config, side, channels, classes and classes + hides)
    student = with_target(network) if type(method) is MeanFlowConfig else network
    student = WithTimeWeight(student) if type(method) is SCMConfig and method.learned_weight else student
    return Networks(student.train(), frozen_copy(student) if type(method) is CTConfig else None), asking(side), 0


def _of_clips(given: Given, method: Any, find: Find) -> Made:
    """Stages of AnimateLCM, and new motion modules."""
    start, data = (
        find(given[TeacherConfig].pretrained_teacher_model, "--pretrained_teacher_model"),
        given[VideoDataConfig],
    )
    config, unet, motion = given.get(StageConfig), start.network.requires_grad_(False), None
    if config is not None and config.stage == "adapter":
        raise UserError(
            "--stage adapter trains a condition in front of a finished student, which is not planned here."
        )
    if config is not None and config.stage == "image_lora":
        nets = make_networks(unet, StudentConfig(lora=True, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha))
        return nets, _asking(start, data.resolution), 2
    new = given.get(NewMotionConfig, NewMotionConfig(motion_max_seq_length=max(32, data.sample_n_frames)))
    motion, ask = new_motion_adapter(unet, new), _asking(start, data.resolution, data.sample_n_frames)
    if config is None:
        return Networks(train_motion(inflate(unet, motion))), ask, 0
    teacher, student = inflate(unet, motion).requires_grad_(False), inflate(unet, motion)
    if config.stage == "joint":
        add_lora(student, config.lora_rank, config.lora_alpha, 0.0, image_layers(unet, LCM_LORA_TARGETS))
    train_motion(student, also="lora_" if config.stage == "joint" else None)
    return Networks(student, frozen_copy(student), cast(teacher, DTYPES[config.cast_teacher_unet])), ask, 2


def _of_small_teacher(given: Given, method: Any, find: Find) -> Made:
    """Its words are learnt from the captions, so its text tower has a few hundred rows more than here."""
    shape, vae = given[SmallStableDiffusionConfig], AutoencoderKL(**SMALL_VAE)
    vae.register_to_config(sample_size=_resolution(given))
    pipe = new_pipeline(shape, vae, [], "epsilon")
    student, side = TextConditionedUNet(pipe.unet, pipe.text_encoder), pipe.unet.config.sample_size

    def ask(network: nn.Module) -> Tensor:
        tokens = torch.zeros(1, shape.text_length, dtype=torch.int64)
        return network(torch.randn(1, 4, side, side), torch.ones(1), tokens, return_dict=False)[0]

    return Networks(student.train()), ask, 0


def _of_small_flow(given: Given, method: Any, find: Find) -> Made:
    with torch.device("cpu"):
        pipe = new_flow_pipeline(given[SmallFlowConfig], _resolution(given), method.shift)
    network = type(pipe.transformer).from_config(pipe.transformer.config)  # without the hook that looks for empty text
    start = Start(network, None, given[SmallFlowConfig].text_length)
    return Networks(network), _asking(start, _resolution(given)), 0


def _of_vae(given: Given, method: Any, find: Find) -> Made:
    side = _resolution(given)
    student = AutoencoderWithPosterior(new_vae(given[SmallVAEConfig], side))
    return Networks(student), lambda network: network(torch.randn(1, 3, side, side))[0], 0


def _of_classifier(given: Given, method: Any, find: Find) -> Made:
    """Of ten classes, whose number comes with the data; its last layer is small."""
    side, channels = (
        _resolution(given),
        next(config.channels for config in given.values() if hasattr(config, "channels")),
    )
    student = ImageClassifier([str(number) for number in range(10)], channels, side)
    return Networks(student), lambda network: network(torch.randn(1, 3, side, side)), 0


MAKERS: dict[type, Callable[[Given, Any, Find], Made]] = {  # by a config that no other script has
    RewardModelConfig: _for_rewards,
    FinetuneConfig: _of_students,
    VideoDataConfig: _of_clips,
    StartConfig: _of_images,
    NewModelConfig: _of_nothing,
    TeacherConfig: _of_prompts,
    SmallStableDiffusionConfig: _of_small_teacher,
    SmallFlowConfig: _of_small_flow,
    SmallVAEConfig: _of_vae,
    ClassificationConfig: _of_classifier,
}


def _branches(network: nn.Module) -> int:
    return 2 if family_of(network).guidance(network) == "cfg" else 1


def _resolution(given: Given) -> int | None:
    """In pixels; of fine-tuning the network's own if not given."""
    kinds = [kind for kind in (RolloutConfig, DataConfig, PromptDataConfig) if kind in given]
    return given[kinds[0]].resolution


def _asking(start: Start, resolution: int | None, frames: int | None = None) -> Ask:
    given = resolution and start.downscale
    return asking(
        resolution // start.downscale if given else start.network.config.sample_size, frames, start.text_tokens
    )
