"""Which numbers make sense: the range of every numeric flag, wherever it stands."""

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from cm_diffusers.errors import UserError


# A bracket belongs to the range, a parenthesis does not; what is not a number lies in none.
INTERVALS = {
    "(-inf, inf)": "logit_mean lora_scales p_mean reward_weights time_mean time_start",
    "[-1, inf)": "w w_min w_max",
    "[0, inf)": """
        adam_weight_decay adaptive_power boundary_weight critic_learning_rate diffusion_weight dmd_weight dsm_weight generation_guidance_scale guidance_scale guidance_scales huber_c
        kl_coef kl_in_advantage kl_weight l1_weight learning_rate mapping_b mapping_k r1_weight stop_diversity stop_held_out stop_kl
        pull step_weights tangent_c time_power validation_guidance_scale
    """,
    "(0, inf)": """
        adam_epsilon adaptive_c adv_clip adversarial_weight clip_range crop_zoom final_std logit_std lora_alpha mutation_std p_std recommended_sigmas reward_weight
        gpu_memory network_bandwidth node_bandwidth peak_tflops rho robust_c shift sigma_data sigma_max sigma_min tangent_step time_range time_std timestep_scaling_factor tolerance
    """,
    "(0, inf]": "max_grad_norm",
    "(0, 1]": "share_of_peak",
    "[1, inf)": "alpha_max bucket_max_ratio q",
    "[0, 1]": "condition_dropout diffusion_share ema_decay eta gammas instant_share proportion_empty_prompts",
    "[0, 1)": """
        adam_beta1 adam_beta2 critic_adam_beta1 critic_adam_beta2 dropout ema_rate ema_rates export_ema_decay guidance_mix label_smoothing lora_dropout
    """,
    "(0, 1)": "confidence target_decay_0",
    "(0, 0.2886)": "ema_sigma_rels sigma_rel sigma_rels",
    "[0, 4294967295]": "holdout_seed search_seed seed validation_seeds",
    "[1, 1000000000]": """
        branch_steps checkpointing_steps checkpoints_total_limit cooldown_steps generated_samples guard_steps logging_steps max_train_samples max_train_steps
        stop_interval stop_patience validation_steps
    """,
    "[0, 1000000000]": """
        adversarial_ramp adversarial_start bootstrap_samples lr_cooldown_steps lr_warmup_steps snapshot_steps snapshot_window stage_steps step tangent_warmup_steps test_samples train_samples unused_days window
    """,
    "[1, 1000000]": """
        buffer_size gpus gpus_per_node discretization_s_0 discretization_s_1 evaluations latent_samples min_count num_classes num_clips num_ddim_timesteps
        num_gifs num_prompts phases renoise_below samples_per_rollout shuffle_buffer_size solver_interval
    """,
    "[2, 1000000]": "num_images num_scales num_videos",
    "[1, 100000]": "gradient_accumulation_steps",
    "[1, 16384]": """
        block_out_channels channels critic_channels critic_lora_rank dropout_max_resolution encode_batch_size eval_batch_size
        images_per_prompt lora_rank resolution sample_batch_size samples_per_prompt text_hidden_size train_batch_size unet_channels
    """,
    "[0, 16384]": "unet_time_cond_proj_dim",
    "[3, 16384]": "text_length",
    "[1, 1024]": """
        bucket_step frames_per_clip generation_steps inner_epochs latent_channels layers_per_block motion_max_seq_length
        motion_num_attention_heads norm_num_groups num_attention_heads num_crops num_frames num_inference_steps num_shown
        num_probes num_starts reference_steps sample_stride segments solver_steps teacher_intervals teacher_steps text_layers unet_layers_per_block validation_nfe
        validation_teacher_steps
    """,
    "[2, 1024]": "guard_samples population sample_n_frames",
    "[0, 1024]": "dataloader_num_workers guard_prompts validation_images",
}
RANGES = {name: interval for interval, names in INTERVALS.items() for name in names.split()}
ORDERED = {"w_min": "w_max", "sigma_min": "sigma_max", "discretization_s_0": "discretization_s_1"}


def check_ranges(config: Any) -> None:
    """
    Args:
        config: A dataclass; its fields are flags.

    Raises:
        ValueError: A number outside the range of its flag, or a least value above the greatest.
    """
    for field in fields(config):
        for value in _numbers(getattr(config, field.name)):
            interval = RANGES.get(field.name)
            if interval and not _lies_in(value, interval):
                raise UserError(f"--{field.name} must be {_in_words(interval, value)}, but it is {value}.")
    for lower, upper in ORDERED.items():
        least, greatest = getattr(config, lower, None), getattr(config, upper, None)
        if None not in (least, greatest) and least > greatest:
            raise UserError(f"--{lower} {least} is above --{upper} {greatest}; swap them.")


def _numbers(value: object) -> Iterator[int | float]:
    for one in value if isinstance(value, list | tuple) else [value]:
        if isinstance(one, int | float) and not isinstance(one, bool):
            yield one


def _lies_in(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def _in_words(interval: str, value: float) -> str:
    low, high = interval[1:-1].split(", ")
    words = [f"{'at least' if interval[0] == '[' else 'above'} {low}"] if low != "-inf" else []
    if high != "inf" and not (value < float(low) and float(high) > 1):  # a cap that was not met says nothing
        words.append(f"{'at most' if interval[-1] == ']' else 'below'} {high}")
    elif high == "inf" and (not words or value == math.inf):
        words.append("finite")
    return " and ".join(words)
