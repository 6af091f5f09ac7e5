"""Checks of a student's flags that need no network."""

from typing import Any

from cm_diffusers.data.sources import refuse_changed
from cm_diffusers.networks import StudentConfig, require_autocast


OF_ADAPTERS = "lora_rank lora_alpha lora_dropout lora_target_modules"
OF_FULL = "save_fp16 unet_time_cond_proj_dim"


def check_student(config: StudentConfig, mixed_precision: str) -> None:
    """
    Raises:
        ValueError: A value out of range, or a flag that would have no effect.
    """
    check_adapters(config)
    require_autocast(config, mixed_precision)
    dim = config.unet_time_cond_proj_dim
    if dim < 4 or dim % 2:
        raise ValueError(f"--unet_time_cond_proj_dim must be an even number from 4 on, but it is {dim}.")


def check_adapters(config: Any) -> None:
    """As `check_student`, of what all configs with `lora` share."""
    names, where = (OF_FULL, "with --lora") if config.lora else (OF_ADAPTERS, "without --lora")
    refuse_changed(config, names, where)
    if config.lora_rank < 1:
        raise ValueError(f"--lora_rank must be at least 1, but it is {config.lora_rank}.")
    if not 0 <= config.lora_dropout < 1:
        raise ValueError(f"--lora_dropout must be at least 0 and below 1, but it is {config.lora_dropout}.")
