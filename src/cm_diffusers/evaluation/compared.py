"""What all comparisons of pipelines share: which they are, what they are asked for, and how their images are drawn."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers.hf_argparser import HfArg

from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation import metrics
from cm_diffusers.evaluation.candidates import Candidate
from cm_diffusers.evaluation.reference import Reference
from cm_diffusers.evaluation.sampling import generate, generate_unprompted, reads_prompts, takes_classes, unchanged
from cm_diffusers.models.classifier import ImageClassifier
from cm_diffusers.models.single_file import is_single_file
from cm_diffusers.models.teachers import SINGLE_FILE_CONFIG
from cm_diffusers.record import Record


@dataclass
class ComparedConfig:
    """Which pipelines to sample, how, and what looks at their images."""

    pipelines: list[str] = HfArg(
        default_factory=list, help="Pipeline folders, Hub ids, .safetensors files, or folders of published LoRAs."
    )
    names: list[str] | None = HfArg(
        default=None,
        help="Names of --pipelines in the table; if absent, those of their runs: NAME of runs/NAME/pipeline, else the "
        "last path part.",
    )
    teacher: str | None = HfArg(default=None, help="Pipeline whose samples are a second reference, and a baseline.")
    num_inference_steps: list[int] = HfArg(default_factory=lambda: [1, 2, 4, 8], help="Steps to sample with.")
    guidance_scales: list[float] = HfArg(
        default_factory=lambda: [8.0],
        help="Guidance scales; a student whose guidance is distilled into its weights has its own, and one without "
        "prompts none.",
    )
    gammas: list[float] | None = HfArg(
        default=None,
        help="Shares of fresh noise to sample with, of pipelines whose scheduler has one (PCM, TCD, students of flows), a row "
        "each; the student's own if not given.",
    )
    seed: int = HfArg(default=0, help="Image i of every pipeline starts from seed + i.")
    eval_batch_size: int = HfArg(default=32, help="Images drawn at once.")
    dtype: Literal["float32", "float16", "bfloat16"] = HfArg(default="float32", help="Precision of the pipelines.")
    feature_extractor: str = HfArg(default="inception", help='"inception", or the folder of a saved ImageClassifier.')
    clip_model: str | None = HfArg(
        default=None, help="CLIP model for the CLIP score of pipelines that read prompts, a Hub id or a folder."
    )
    single_file_config: str | None = HfArg(default=None, help=SINGLE_FILE_CONFIG)

    @property
    def sources(self) -> list[str]:
        """The teacher, if there is one, and the pipelines."""
        return self.pipelines if self.teacher is None else [self.teacher, *self.pipelines]

    def refuse_idle(self) -> None:
        """
        Raises:
            ValueError: `single_file_config` has nothing to act on.
        """
        if not any(map(is_single_file, self.sources)):
            refuse_changed(self, "single_file_config", "without a .safetensors file among --pipelines and --teacher")


def check_candidate(candidate: Candidate, reference: Reference, steps: Iterable[int]) -> None:
    """
    Raises:
        ValueError: The reference has not the captions or labels that the pipeline needs, or the pipeline not so many
            steps.
    """
    candidate.check_steps(steps)
    if candidate.reads_prompts:
        _ = reference.prompts
    elif candidate.takes_classes:
        require_labels(candidate.source, reference)


def require_labels(name: str, reference: Reference) -> None:
    """
    Raises:
        ValueError: An image of the reference has no label.
    """
    if None in reference.labels:
        raise UserError(f"{name} draws classes, but the reference names none: give --label_column.")


def guidance_of(pipe: DiffusionPipeline, record: Record | None, wanted: Sequence[float]) -> list[float | None]:
    """The scales to sample with: those wanted, or the only one that the pipeline has; None of one without prompts."""
    if not reads_prompts(pipe):
        return [None]
    if record is not None and record.guidance == "distilled":
        return [record.recommended_guidance_scale]
    return list(wanted)


def gammas_of(pipe: DiffusionPipeline, wanted: Sequence[float] | None) -> list[float | None]:
    """Those to sample with; None for the pipeline's own, or where it has none."""
    return list(wanted) if wanted and "gamma" in pipe.scheduler.config else [None]


def asked_of(pipe: DiffusionPipeline, reference: Reference, name: str) -> list[str] | list[int] | None:
    """What each image is asked to show: a caption, a class or nothing.

    Raises:
        ValueError: The reference has no captions, or no labels, for a pipeline that needs them.
    """
    if reads_prompts(pipe):
        return reference.prompts
    if not takes_classes(pipe):
        return None
    require_labels(name, reference)
    return reference.labels


def draw(
    pipe: DiffusionPipeline,
    asked: list[str] | list[int] | None,
    seeds: Sequence[int],
    steps: int,
    guidance: float | None,
    batch_size: int,
    side: int | None,
    see: Callable[[Tensor], Tensor] = unchanged,
) -> tuple[Tensor, float]:
    """As `generate` or `generate_unprompted`, whichever the pipeline is for; `asked` as `asked_of` says."""
    if reads_prompts(pipe):
        return generate(pipe, asked, seeds, steps, guidance, batch_size, side, see)
    return generate_unprompted(pipe, seeds, steps, batch_size, asked, see)


def wanted_labels(extractor: torch.nn.Module, reference: Reference) -> list[int | None]:
    """Class each image should show: its reference's label, or the classifier's label that its prompt names.

    Raises:
        ValueError: if classifier and reference name the classes differently.
    """
    if not isinstance(extractor, ImageClassifier):
        return [None] * len(reference.labels)
    names = reference.class_names
    if names is not None and names != extractor.labels:
        raise UserError(f"The classifier's labels {extractor.labels} are not those of --label_column: {names}.")
    if names is not None:
        return reference.labels
    if reference.captions is None:
        return [None] * len(reference.labels)
    return [metrics.label_in_prompt(prompt, extractor.labels) for prompt in reference.captions]
