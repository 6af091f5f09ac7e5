"""The processes, precision and tracker of a run."""

import json
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

from cm_diffusers.engine.launcher import PATIENCE
from cm_diffusers.errors import UserError
from cm_diffusers.extras import TRACKERS, missing
from cm_diffusers.places import without_secrets


def make_accelerator(mixed_precision: str, report_to: str, output_dir: str) -> Accelerator:
    """Accelerate's settings in the environment do not act beside ours: `take_launched` has read them.

    Raises:
        ValueError: The tracker's package is missing or would record a secret, or the device has no such precision.
    """
    if report_to == "wandb" and (shown := [word for word in sys.argv if without_secrets(word) != word]):
        raise UserError(
            f"--report_to wandb records the command line with what the address {without_secrets(shown[0])} holds beside "
            "host and path; put that flag into a file and give it as --recipe."
        )
    tracker = None if report_to == "none" else report_to
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
        log_with=tracker,
        project_dir=output_dir,
        # before torch 2.11 autocast keeps the weights that a pass without a gradient has cast for the pass that learns
        kwargs_handlers=[AutocastKwargs(cache_enabled=False), InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if mixed_precision == "fp16" and accelerator.scaler is None:
        raise UserError(
            f"--mixed_precision fp16 needs a GPU, but this run is on {accelerator.device.type}: take bf16 or no."
        )
    if tracker and not accelerator.log_with:  # accelerate leaves it out without a word
        raise UserError(missing(f"--report_to {tracker}", TRACKERS[tracker]))
    return accelerator


def start_trackers(accelerator: Accelerator, report_to: str, project: str, identity: dict) -> None:
    """Open the tracker, which makes its folder, unless it is open.

    Args:
        project: Its name.
        identity: The settings of the run, which it shows.
    """
    if report_to != "none" and not accelerator.trackers:
        scalars = {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in identity.items()}
        accelerator.init_trackers(project, config=scalars)


def any_rank(accelerator: Accelerator, here: bool) -> bool:
    """Whether something holds on any rank; the same answer on all. Of several, each waits for the others and its device."""
    if accelerator.num_processes == 1:
        return here
    return bool(accelerator.reduce(torch.tensor(int(here), device=accelerator.device), reduction="sum").item())
