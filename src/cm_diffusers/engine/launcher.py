"""What `accelerate launch` and its config file say, in the environment: precision, accumulation, compilation, sharding, processes."""

import os
from datetime import timedelta
from typing import Any

from cm_diffusers.errors import UserError


DEFAULTS = {"mixed_precision": "no", "gradient_accumulation_steps": 1, "compile": False}  # where nobody asks for more
OTHERS = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}  # which part networks, but not so that several train
# How long a process waits for others, one of which may be drawing, measuring or writing alone; NCCL itself gives up after ten minutes.
PATIENCE = timedelta(hours=2)
DYNAMO = {"MODE": "default", "USE_FULLGRAPH": "False", "USE_DYNAMIC": "False", "USE_REGIONAL_COMPILATION": "False"}


def take_launched(config: Any) -> None:
    """Give each of these flags that is None the launcher's value, or else its default.

    Args:
        config: Has the fields of `DEFAULTS`, which are changed in place.

    Raises:
        ValueError: A flag that was given conflicts with the launcher, or the launcher asks for what does not exist here.
    """
    launched = (_precision(), _accumulation(), _compilation())
    for (name, default), asked in zip(DEFAULTS.items(), launched, strict=True):
        given = getattr(config, name)
        if given is not None and asked is not None and given != asked:
            raise UserError(
                f"--{name} is {given}, but accelerate's launcher or config file says {asked}: make them agree, or leave one out."
            )
        value = given if asked is None else asked
        setattr(config, name, default if value is None else value)
    _refuse_other_sharding()
    if is_sharded():
        config.gradient_checkpointing |= _said("FSDP_ACTIVATION_CHECKPOINTING")
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # text towers, which are not sharded, would stay empty


def is_sharded() -> bool:
    """Whether weights are to be parted among the processes."""
    return _said("ACCELERATE_USE_FSDP")


def refuse_lone_processes(shares: bool) -> None:
    """Processes that do not work together would each do the whole and write it to the same place.

    Args:
        shares: Whether this script shares its work among processes: others are one process.

    Raises:
        ValueError: The launcher started more processes than take part.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and not shares:
        raise UserError(f"The launcher started {started} processes, but this script is one: start it with python.")
    if started > 1 and (joined := _joined()) < started:
        raise UserError(
            f"The launcher started {started} processes, but only {joined} of them would work together, because no GPU was "
            "found: run `accelerate config` for this machine, launch one process, or set ACCELERATE_USE_CPU=1 to use "
            "all of them on CPUs."
        )


def refuse_half_on_cpu(mixed_precision: str) -> None:
    """
    Raises:
        ValueError: It is fp16 on a CPU, which would train in float32.
    """
    if mixed_precision == "fp16" and processes().device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU, but this run is on cpu: take bf16 or no.")


def _joined() -> int:
    return processes().num_processes


def processes() -> Any:
    """This process among those that train together, as accelerate's `PartialState`; they find each other at the first call."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)


def _said(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def _refuse_other_sharding() -> None:
    for name, title in OTHERS.items():
        if _said(f"ACCELERATE_USE_{name}"):
            raise UserError(
                f"{title} trains one network, but runs here have several (student, target, teacher, critic): choose FSDP with "
                "fsdp_version 2, which shards all of them, in `accelerate config`."
            )
    if not is_sharded():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "FSDP version 1 is not supported: give fsdp_version 2 (--fsdp_version 2) in `accelerate config`."
        )
    if not _said("FSDP_RESHARD_AFTER_FORWARD") and "FSDP_RESHARD_AFTER_FORWARD" in os.environ:
        raise UserError(
            "fsdp_reshard_after_forward false would leave whole weights where averages look for parts: give true."
        )
    for name in ("TP", "CP", "SP"):
        if int(os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1")) > 1:
            raise UserError(
                f"{name.lower()}_size above 1 is not supported: give dp_shard_size and dp_replicate_size alone in "
                "parallelism_config."
            )


def _asked(name: str, nothing: str) -> str | None:
    """A variable of the launcher's, which also says what nobody asked for."""
    value = os.environ.get(f"ACCELERATE_{name}", nothing).lower()
    return None if value == nothing else value


def _precision() -> str | None:
    asked = _asked("MIXED_PRECISION", "no")
    if asked not in (None, "bf16", "fp16"):
        raise UserError(f"accelerate's launcher or config file says --mixed_precision {asked}: take no, bf16 or fp16.")
    return asked


def _accumulation() -> int | None:
    asked = _asked("GRADIENT_ACCUMULATION_STEPS", "1")
    if asked is not None and not (asked.isdecimal() and int(asked)):
        raise UserError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {asked!r}: give a whole number from 1 on, or leave it out."
        )
    return asked and int(asked)


def _compilation() -> bool | None:
    asked = _asked("DYNAMO_BACKEND", "no")
    if asked is None:
        return None
    others = [
        f"{name.lower()} {value}" for name in DYNAMO if (value := _asked(f"DYNAMO_{name}", DYNAMO[name].lower()))
    ]
    if asked != "inductor" or others:
        raise UserError(
            f"accelerate's launcher or config file asks for dynamo with {', '.join([f'backend {asked}', *others])}, but "
            "networks are compiled by inductor in its default mode: choose that, or none."
        )
    return True
