"""Flags of the training loop."""

from dataclasses import dataclass
from typing import Literal

from transformers.hf_argparser import HfArg

from cm_diffusers.engine.launcher import take_launched
from cm_diffusers.errors import UserError
from cm_diffusers.ranges import check_ranges


@dataclass
class TrainConfig:
    """How long and how a run trains, and what it leaves behind."""

    output_dir: str = HfArg(default="runs/latest", help="Where checkpoints, samples, logs and the result go.")
    overwrite_output_dir: bool = HfArg(
        default=False,
        help="Replace an earlier run in --output_dir, no file of yours: set aside until training has ended, then removed.",
    )
    seed: int = HfArg(default=0, help="Seeds data order, noise, times and dropout; a run is a function of it.")
    max_train_steps: int = HfArg(default=1000, help="Optimizer steps in all, those before a resume included.")
    gradient_accumulation_steps: int | None = HfArg(default=None, help="Micro-batches per optimizer step; 1 if unset.")
    gradient_checkpointing: bool = HfArg(default=False, help="Recompute activations in backward to save memory.")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = HfArg(
        default=None,
        help="Autocast dtype; weights stay float32. If not given, that of accelerate's launcher or config file, or no.",
    )
    compile: bool | None = HfArg(
        default=None,
        help="torch.compile every network, by its repeated blocks where it has some; if not given, as accelerate's launcher or "
        "config file says, or not.",
        metadata={"nargs": "?", "const": True},
    )
    channels_last: bool = HfArg(
        default=False, help="Keep the weights of convolutions in NHWC order, for tensor cores; not for transformers."
    )
    allow_tf32: bool = HfArg(
        default=False, help="TF32 matrix products and convolutions on NVIDIA GPUs from Ampere on."
    )
    ema_decay: float = HfArg(default=0.95, help="Rate of the EMA target network, where the method has one.")
    export_ema_decay: float = HfArg(
        default=0.0, help="Rate of the average that is validated and published; 0 publishes the last weights."
    )
    ema_sigma_rels: list[float] = HfArg(
        default_factory=list,
        help="Widths of power-function averages that every checkpoint leaves in averages/, e.g. 0.05 0.1; "
        "training/export_average.py makes a pipeline with any other width from them.",
    )
    checkpointing_steps: int = HfArg(default=500, help="Optimizer steps between checkpoints.")
    checkpoints_total_limit: int | None = HfArg(default=None, help="Keep only the newest so many checkpoints.")
    branch_steps: list[int] = HfArg(
        default_factory=list,
        help="Steps with a checkpoint that stays whatever --checkpoints_total_limit says: training/branch.py cools down from it.",
    )
    snapshot_steps: int = HfArg(
        default=0,
        help="Steps between raw weights that stay in snapshots/, for training/combine.py and export_average.py; 0 keeps none.",
    )
    snapshot_window: list[int] = HfArg(
        default_factory=list, help="First and last step of those; all of the run if not given."
    )
    resume_from_checkpoint: str | None = HfArg(
        default=None, help='"latest" (the start, where there is none yet), or a checkpoint folder; bit-exact.'
    )
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = HfArg(default="tensorboard", help="Tracker.")
    tracker_project_name: str = HfArg(default="cm_diffusers", help="Project name for the tracker.")
    logging_steps: int = HfArg(
        default=10, help="Optimizer steps between looks at the run: entries in the tracker, and whether all is finite."
    )

    def __post_init__(self) -> None:
        take_launched(self)
        check_ranges(self)
        _check_window(self)


def _check_window(config: TrainConfig) -> None:
    window, every = config.snapshot_window, config.snapshot_steps
    if window and not every:
        raise UserError("--snapshot_window has no effect without --snapshot_steps: give both, or leave it out.")
    if window and (len(window) != 2 or window[0] > window[1]):
        raise UserError(
            f"--snapshot_window is a first and a last step, but it is {' '.join(map(str, window))}: give two, the first not above "
            "the last."
        )
    last = min(window[1] if window else config.max_train_steps, config.max_train_steps)
    if every and last // every * every < (max(1, window[0]) if window else every):
        raise UserError(
            f"--snapshot_steps {every} keeps nothing of the steps {window[0] if window else 1} to {last}: give fewer."
        )
