"""The processes, precision and tracker of a run."""

from accelerate import Accelerator
from accelerate.utils import DistributedType


def make_accelerator(mixed_precision: str, report_to: str, output_dir: str) -> Accelerator:
    """
    Raises:
        ValueError: The tracker's package is missing, or weights would be sharded.
    """
    tracker = None if report_to == "none" else report_to
    accelerator = Accelerator(mixed_precision=mixed_precision, log_with=tracker, project_dir=output_dir)
    if tracker and not accelerator.log_with:  # accelerate leaves it out without a word
        raise ValueError(
            f"--report_to {tracker}: the package is not installed; pip install {tracker}, or give another tracker."
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"Sharded training ({accelerator.distributed_type.value}) is not supported: checkpoints and moving averages need "
            "whole weights on every rank. Run `accelerate config` and choose multi-GPU without sharding."
        )
    return accelerator
