"""What is swept over, and what is found of each point."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers.hf_argparser import HfArg

from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation.compared import ComparedConfig


@dataclass
class FrontsConfig(ComparedConfig):
    """What to sweep over, and which fronts to draw."""

    teacher: str | None = HfArg(default=None, help="Pipeline that the others are seen beside, with steps of its own.")
    teacher_steps: list[int] = HfArg(default_factory=lambda: [5, 10, 25, 50], help="Steps of the teacher.")
    lora_scales: list[float] | None = HfArg(
        default=None, help="Scales of the LoRA, of --pipelines that are folders of LoRAs; 1 if not given."
    )
    images_per_prompt: int = HfArg(default=10, help="Images of each prompt or class, at every point of the sweep.")
    num_prompts: int | None = HfArg(
        default=None,
        help="Different captions (classes, where there are none) of the real images to draw; if not given all, but 100 at most.",
    )
    num_images: int | None = HfArg(default=None, help="Real images to compare with; all if not given.")
    cmmd_model: str | None = HfArg(
        default=None,
        help="CLIP model whose embeddings CMMD compares (openai/clip-vit-large-patch14-336), Hub id or folder.",
    )
    rewards: list[str] = HfArg(
        default_factory=list, help="Rewards as columns, by their names in the guide to rewards."
    )
    axes: list[str] | None = HfArg(
        default=None,
        help="Fronts to draw, each two or three columns with commas between them, as fid,recall; if not given, one of "
        "consistency, realism and diversity.",
    )
    reference_point: list[str] | None = HfArg(
        default=None,
        help="Where hypervolumes end, as fid=60 recall=0; of columns that are not named, the worst value found.",
    )
    bootstrap_samples: int = HfArg(default=100, help="Resamples of prompts for the intervals; 0 for none.")
    output_dir: str = HfArg(default="runs/fronts", help="Where tables, plots, the page and the points found go.")

    def refuse_idle(self) -> None:
        """
        Raises:
            ValueError: Steps of nothing, or one value twice.
        """
        super().refuse_idle()
        if self.teacher is None:
            refuse_changed(self, "teacher_steps", "without --teacher")
        if not self.pipelines:
            refuse_changed(self, "num_inference_steps", "without --pipelines")
        for name in ("num_inference_steps", "teacher_steps", "guidance_scales", "gammas", "lora_scales"):
            values = getattr(self, name) or []
            if len(set(values)) < len(values):
                raise UserError(f"--{name} names one value twice: {' '.join(map(str, values))}.")


class Point(NamedTuple):
    """A pipeline and its knobs; None where it has none."""

    source: str
    pipeline: str
    num_inference_steps: int
    guidance_scale: float | None
    gamma: float | None
    lora_scale: float | None

    @property
    def knobs(self) -> dict[str, str | int | float | None]:
        return {name: value for name, value in self._asdict().items() if name != "source"}


class Measured(NamedTuple):
    """A point and what was found of it.

    Attributes:
        columns: Value, or value and both ends of its interval, by column.
        shown: Some of its images (P, E, 3, h, w) in bytes: of P prompts, E of each.
        machine: Where and how it was timed.
    """

    point: Point
    columns: dict[str, tuple[float, ...]]
    shown: Tensor
    machine: str
