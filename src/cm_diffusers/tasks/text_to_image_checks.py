"""Checks of flags that need no network."""

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from cm_diffusers.data.clip_config import OF_FILES, OF_IMAGES, ClipConfig
from cm_diffusers.data.clip_latents import check_frames
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.diffusion.adversarial import AdversarialConfig
from cm_diffusers.diffusion.times import phase_edges
from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError
from cm_diffusers.models.adapters import target_names
from cm_diffusers.models.critics import CriticConfig, check_critic, unused_flags
from cm_diffusers.models.families.base import answers_clips, family_of, latents_of, network_of
from cm_diffusers.models.quantization import check_quantization
from cm_diffusers.models.students import StudentConfig, StudentNetworkConfig, make_student, require_autocast
from cm_diffusers.models.teachers import is_late
from cm_diffusers.objectives.pcm import PCMConfig
from cm_diffusers.objectives.scott import SCottConfig
from cm_diffusers.objectives.tcd import TCDConfig


OF_ADAPTERS = "lora_rank lora_alpha lora_dropout lora_target_modules"
OF_FULL = "unet_time_cond_proj_dim"
FEW_STEPS = ("turbo", "schnell", "sprint", "lightning", "distilled")  # in names of models that were distilled
logger = logging.getLogger(__name__)
OF_CRITIC_INPUTS = "critic_inputs renoise_below real_source"  # of SCott


def check_student(config: StudentNetworkConfig, mixed_precision: str) -> None:
    """
    Raises:
        ValueError: A value out of range, or a flag that would have no effect.
    """
    check_adapters(config)
    require_autocast(config, mixed_precision)
    dim = config.unet_time_cond_proj_dim
    if dim != 0 and (dim < 4 or dim % 2):
        raise UserError(f"--unet_time_cond_proj_dim must be 0 (none) or an even number from 4 on, but it is {dim}.")


def check_distilled(config: StudentConfig, mixed_precision: str) -> None:
    """As `check_student`, of a latent consistency distillation."""
    check_student(config, mixed_precision)
    check_quantization(config.quantize_teacher, config.lora, config.cast_teacher_unet)


def warn_of_guidance(path: str, w_max: float) -> None:
    """Of a teacher whose name alone may tell that it was distilled to few steps; families refuse those whose config does."""
    name = Path(path).name.lower()
    if w_max > 0 and (found := [word for word in FEW_STEPS if word in name]):
        logger.warning(
            "%s calls itself %s, and nothing in its config says more: if it was distilled to few steps, guidance is in its "
            "weights, and w up to %g comes on top. Give the model that it came from, or guidance 0.",
            path,
            found[0],
            w_max,
        )


def check_late(teacher: DiffusionPipeline, config: StudentConfig, draws: bool, judge: CriticConfig) -> None:
    """What would be found only when the network is loaded, after the data.

    Args:
        draws: Whether the teacher draws the data itself.
        judge: The critic that is made of the network.

    Raises:
        ValueError: A layer to adapt is none, there is no such student or critic, or the network is here already or may not be
            quantized.
    """
    network = network_of(teacher)
    check_critic(judge, network, teacher.vae)
    if not config.lora and family_of(network).student is None:
        refuse_changed(
            config, OF_FULL, f"with a {type(network).__name__}, whose students have guidance in their weights"
        )
    if config.lora:
        target_names(network, config.lora_target_modules)
    elif is_late(network):
        make_student(network, config.guidance_embedding_dim(network))
    flag = f"--quantize_teacher {config.quantize_teacher}"
    if config.quantize_teacher != "no" and draws:
        raise UserError(f"{flag} would draw the data of --prompts_file with rounded weights: leave one of them out.")
    if config.quantize_teacher != "no" and not is_late(network):
        raise UserError(
            f"{flag} acts while a network is read from a pipeline's folder, not from a single file: leave it out."
        )
    if config.quantize_teacher != "no" and judge.critic == "lora_decoder":
        raise UserError(
            f"{flag} rounds the network of which --critic lora_decoder trains a copy: leave one of them out."
        )


def checked_frames(
    clips: ClipConfig, data: DataConfig, teacher: DiffusionPipeline, draws: bool, judge: CriticConfig | None
) -> int | None:
    """Of a training clip: 1 where a teacher of videos learns on images, None of a teacher of images.

    Args:
        draws: Whether the teacher draws the data itself.
        judge: Of a training with a critic.

    Raises:
        ValueError: The teacher makes no such clips, there are none, or a flag would have no effect on them.
    """
    if clips.sample_n_frames is None:
        refuse_changed(clips, OF_FILES, "without --sample_n_frames")
        return 1 if answers_clips(teacher) else None
    check_frames(clips.sample_n_frames, latents_of(teacher).frames_per_latent)
    if judge is not None and judge.critic == "vision":
        raise UserError("--critic vision judges images, not clips: with --sample_n_frames take heads or none.")
    if draws:
        refuse_changed(clips, OF_FILES, "with --prompts_file")
        return clips.sample_n_frames
    refuse_changed(data, OF_IMAGES, "with --sample_n_frames")
    if (data.train_data_dir is None) == (data.dataset_name is None):
        raise UserError("--sample_n_frames needs clips: give --train_data_dir or --dataset_name, or --prompts_file.")
    return clips.sample_n_frames


def check_adapters(config: Any) -> None:
    """As `check_student`, of what all configs with `lora` share."""
    names, where = (OF_FULL, "with --lora") if config.lora else (OF_ADAPTERS, "without --lora")
    refuse_changed(config, names, where)
    if config.lora_rank < 1:
        raise UserError(f"--lora_rank must be at least 1, but it is {config.lora_rank}.")
    if not 0 <= config.lora_dropout < 1:
        raise UserError(f"--lora_dropout must be at least 0 and below 1, but it is {config.lora_dropout}.")


def check_scott(method: SCottConfig, judge: CriticConfig, max_train_steps: int) -> None:
    """
    Raises:
        ValueError: A flag that would have no effect, or a critic that could not play.
    """
    refuse_changed(method, "eta" if method.sde == "er_sde" else "noise_scale solver_order", f"with --sde {method.sde}")
    if judge.critic == "none":
        refuse_changed(method, OF_CRITIC_INPUTS, "with --critic none")
    refuse_changed(method, "renoise_below" * (method.critic_inputs == "clean"), "with --critic_inputs clean")
    if judge.critic == "vision" and method.critic_inputs != "clean":
        raise UserError("--critic vision judges images without noise: give it --critic_inputs clean.")
    check_adversary(method, judge, max_train_steps)


def check_pcm(method: PCMConfig, judge: CriticConfig, max_train_steps: int) -> None:
    """As `check_scott`."""
    if judge.critic == "vision":
        raise UserError(
            "--critic vision judges images without noise, and jumps end in noise: take heads or lora_decoder."
        )
    phase_edges(method.num_ddim_timesteps, method.phases)
    check_adversary(method, judge, max_train_steps)


def check_tcd(method: TCDConfig) -> None:
    """
    Raises:
        ValueError: The phases do not fit on the grid.
    """
    if method.phases is not None:
        phase_edges(method.num_ddim_timesteps, method.phases)


def check_adversary(method: AdversarialConfig, judge: CriticConfig, max_train_steps: int) -> None:
    """
    Raises:
        ValueError: A flag that would have no effect, or a critic that could not play.
    """
    refuse_changed(judge, unused_flags(judge), f"with --critic {judge.critic}")
    if judge.critic == "none":
        refuse_changed(method, " ".join(field.name for field in fields(AdversarialConfig)), "with --critic none")
    elif method.adversarial_start >= max_train_steps:
        raise UserError(
            f"The critic would start at step {method.adversarial_start} (--adversarial_start) of {max_train_steps}: give "
            "it an earlier step, the run more --max_train_steps, or --critic none."
        )


def check_rlcm(source: Any, method: Any, drawn: Any, watched: Any, train: Any, validation: Any) -> None:
    """
    Args:
        source, method, drawn, watched, train, validation: The configs of `finetune_rlcm.py`.

    Raises:
        ValueError: A flag that would have no effect, or probabilities that dropout would make random.
    """
    _check_tuned(source, watched, validation)
    if method.final_step != "stochastic":
        refuse_changed(method, "final_std", f"with --final_step {method.final_step}")
    if method.loss != "ppo":
        refuse_changed(method, "clip_range", f"with --loss {method.loss}")
    if drawn.baseline != "per_prompt":
        refuse_changed(drawn, "buffer_size min_count", f"with --baseline {drawn.baseline}")
    if drawn.baseline == "group" and drawn.samples_per_prompt < 2:
        raise UserError(
            "--baseline group compares samples of one prompt, so it needs --samples_per_prompt of at least 2: one alone is "
            "neither better nor worse."
        )
    if not (drawn.kl_in_advantage or method.kl_coef):
        refuse_changed(watched, "stop_kl", "without --kl_in_advantage or --kl_coef, which compute divergences")
    refuse_changed(train, "ema_decay", "here: there is no averaged target")
    if source.lora_dropout:
        raise UserError("--lora_dropout would make the probabilities of samples random: leave it out.")


def check_direct_reward(
    source: Any, wanted: Any, method: Any, data: Any, watched: Any, train: Any, validation: Any
) -> None:
    """
    Args:
        source, wanted, method, data, watched, train, validation: The configs of `finetune_direct_reward.py`.

    Raises:
        ValueError: A flag that would have no effect, or a model without a distillation.
    """
    _check_tuned(source, watched, validation)
    where = f"with --through {method.through}"
    if method.through != "single_step":
        refuse_changed(method, "reward_weight pretrained_teacher_model", where)
        others = {f.name for f in fields(data)} - {"resolution", "train_batch_size"}
        refuse_changed(data, " ".join(others), f"{where}, which needs no images")
    elif source.sampler == "ddim":
        raise UserError(
            "--through single_step is for a student, whose distillation it joins: give one, or another --through."
        )
    elif not watched.guard_prompts:
        refuse_changed(wanted, "prompts", f"{where} and --guard_prompts 0: captions are those of the data")
    if method.through != "trajectory":
        refuse_changed(method, "kl_coef", where)
    if not method.kl_coef:
        refuse_changed(watched, "stop_kl", "without --kl_coef, which computes divergences")
    if source.lora or method.through != "single_step":
        refuse_changed(train, "ema_decay", "here: there is no averaged target")


def _check_tuned(source: Any, watched: Any, validation: Any) -> None:
    """What both scripts of reward fine-tuning share."""
    check_adapters(source)
    refuse_changed(
        validation, "validation_guidance_scale validation_teacher_steps", "here: samples are as in training"
    )
    if source.sampler != "ddim":
        refuse_changed(source, "eta", f"with --sampler {source.sampler}")
    if not watched.guard_prompts:
        names = "guard_steps guard_samples held_out_rewards stop_held_out stop_diversity"
        refuse_changed(watched, names, "without --guard_prompts")
