"""Several pipelines on the same prompts or classes and seeds, measured against the same real images and teacher."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers.hf_argparser import HfArg

from cm_diffusers.engine.ranks import Ranks
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation import metrics
from cm_diffusers.evaluation.candidates import Candidate, common_side
from cm_diffusers.evaluation.compared import (
    ComparedConfig,
    asked_of,
    check_candidate,
    draw,
    gammas_of,
    guidance_of,
    wanted_labels,
)
from cm_diffusers.evaluation.features import NotFiniteError, load_extractor
from cm_diffusers.evaluation.grids import image_grid
from cm_diffusers.evaluation.quality import quality
from cm_diffusers.evaluation.reference import Reference, ReferenceConfig, load_references
from cm_diffusers.evaluation.report import Keep, Row, Setting, forget, hardware, row_names
from cm_diffusers.evaluation.sampling import load_pipeline, reads_prompts
from cm_diffusers.evaluation.seen import AT_ONCE, SHOWN, Look, Seen, by_all, see_real
from cm_diffusers.measured import REAL, TEACHER, weights_digest
from cm_diffusers.places import public
from cm_diffusers.record import read_record


@dataclass
class EvaluationConfig(ComparedConfig):
    """Which pipelines to sample, how, and what to measure."""

    shares: ClassVar[bool] = True  # among processes

    reference_steps: int = HfArg(default=50, help="Steps of the teacher's reference samples.")
    num_images: int = HfArg(
        default=1000, help="Images per row of the table, each for the caption or class of one real image."
    )
    output_dir: str = HfArg(default="runs/evaluation", help="Where table.md, table.json, grid.png and plot.png go.")


class Comparison:
    """Samples pipelines and measures them; `rows` and `strips` (of the grid) grow in the order of measurement.

    Images are looked at batch by batch, by each process its share; features of all are kept. Pipelines that read prompts get the captions of the reference, class-conditional ones its labels, others nothing.
    Images may have any size: the extractor brings them to its own.

    Args:
        config: The pipelines, and how they are sampled.
        data: Real images.
        ranks: Processes that each make such a comparison, and call its methods together.

    Raises:
        ValueError: wrong configuration; too few reference images; an extractor that cannot be loaded; a pipeline that
            is none or that the reference cannot prompt.
    """

    def __init__(self, config: EvaluationConfig, data: ReferenceConfig, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.names, self.config, self.data, self.device = _names(config), config, data, PartialState().device
        candidates = [Candidate.of(source) for source in config.sources]
        self.side = data.resolution
        self.extractor = load_extractor(config.feature_extractor, self.device)
        self.clip = config.clip_model and metrics.load_clip(config.clip_model, self.device)
        data = replace(data, resolution=data.resolution or common_side(candidates))
        self.reference, *others = load_references(data, config.num_images, 2)
        for one in candidates:
            check_candidate(one, self.reference, self._steps(one.source))
            self._load(one.source)  # hours may pass before it is its turn
        self.labels = wanted_labels(self.extractor, self.reference)
        real = self._real(self.reference)
        self.real = real.features
        self.teacher: dict[float | None, Tensor] = {}
        self.weights = {
            name: weights_digest(source) for name, source in zip(self.names, config.pipelines, strict=True)
        }
        self.rows = [self._ceiling(other) for other in others]
        self.strips: list[tuple[str, Tensor]] = [("real", real.shown)]
        count = config.num_images
        self.setting = Setting(
            num_images=count,
            seed=config.seed,
            extractor=public(config.feature_extractor),
            reference=public(data.dataset_name or data.train_data_dir),
            hardware=hardware(),
            dtype=config.dtype,
            batch_size=config.eval_batch_size,
            coverage_ceiling=metrics.coverage_ceiling(count, count),
        )

    def _steps(self, source: str) -> list[int]:
        """Of a pipeline; of the teacher the longest first."""
        config = self.config
        if source != config.teacher:
            return config.num_inference_steps
        return [config.reference_steps, *(n for n in config.num_inference_steps if n != config.reference_steps)]

    def run(self, keep: Keep = forget) -> list[Row]:
        """Measures the teacher, longest first, then every pipeline.

        Args:
            keep: Gets all rows so far after each, in the first process.
        """
        config = self.config
        if config.teacher is not None:
            self.measure(config.teacher, TEACHER, self._steps(config.teacher), keep)
        for source, name in zip(config.pipelines, self.names, strict=True):
            self.measure(source, name, config.num_inference_steps, keep)
        return self.rows

    def grid(self) -> Image.Image:
        """The first images of the reference and of every row."""
        labels, strips = zip(*self.strips, strict=True)
        heads = self.reference.captions or ["" if label is None else str(label) for label in self.reference.labels]
        return image_grid(strips, labels, heads[:SHOWN])

    def measure(
        self, source: str, name: str, steps: list[int], keep: Keep = forget, gammas: list[float] | None = None
    ) -> None:
        """Rows and strips of one pipeline, at every guidance scale that it has not of its own.

        Args:
            keep: As for `run`.
            gammas: Instead of the config's.
        """
        pipe = self._load(source)
        record = read_record(source)
        scales = guidance_of(pipe, record, self.config.guidance_scales)
        side = self.side or (record and record.resolution)
        for gamma in gammas_of(pipe, gammas or self.config.gammas):
            label = name if gamma is None else f"{name}, gamma {gamma:g}"
            if gamma is not None:
                pipe.scheduler.register_to_config(gamma=gamma)
            for guidance, count in product(scales, steps):
                is_reference = source == self.config.teacher and count == self.config.reference_steps
                self._measure(pipe, label, count, guidance, side, is_reference)
                if self.ranks.rank == 0:
                    keep(self.rows)

    def look(self, pipe: DiffusionPipeline, steps: int, guidance: float) -> Row | None:
        """The quality of what a pipeline draws now, kept nowhere; None of images that are no numbers."""
        asked = asked_of(pipe, self.reference, "the student")
        try:
            seen = self._drawn(pipe, asked, steps, guidance, self.side)
        except NotFiniteError:
            return None
        return self._quality(seen.features, asked, self.labels)

    def _load(self, source: str) -> DiffusionPipeline:
        config = self.config
        dtype = getattr(torch, config.dtype)
        return load_pipeline(source, dtype, self.device, single_file_config=config.single_file_config)

    def _measure(
        self,
        pipe: DiffusionPipeline,
        name: str,
        steps: int,
        guidance: float | None,
        side: int | None,
        is_reference: bool,
    ) -> None:
        asked, count = asked_of(pipe, self.reference, name), self.config.num_images
        seen = self._drawn(pipe, asked, steps, guidance, side)
        if is_reference:
            self.teacher[guidance] = seen.features

        def row() -> Row:
            return {
                "pipeline": name,
                "num_inference_steps": steps,
                "guidance_scale": guidance,
                "resolution": seen.shown.shape[-1],
                **self._quality(seen.features, asked, self.labels),
                "fid_teacher": self._to_teacher(seen.features, guidance),
                "clip_score": seen.scores["clip_score"].mean().item() if seen.scores else None,
                "images_per_second": count / seen.seconds,
                "ms_per_image": 1000 * seen.seconds / count,
            }

        self.rows.append(self.ranks.first(row))
        scale = "" if guidance is None else f", {guidance:g}"
        self.strips.append((f"{name}, {steps} steps{scale}", seen.shown))

    def _drawn(
        self,
        pipe: DiffusionPipeline,
        asked: list[str] | list[int] | None,
        steps: int,
        guidance: float | None,
        side: int | None,
    ) -> Seen:
        config, clip = self.config, self.clip if reads_prompts(pipe) else None

        def see(numbers: list[int]) -> Seen:
            mine, seeds = asked and [asked[i] for i in numbers], [config.seed + i for i in numbers]

            def score(images: Tensor, rows: slice) -> dict[str, Tensor]:
                return {"clip_score": metrics.clip_scores(clip, images, mine[rows])}

            look = Look(self.extractor, clip and score)
            return look.seen(*draw(pipe, mine, seeds, steps, guidance, config.eval_batch_size, side, look))

        return self._of_all(config.eval_batch_size, see)

    def _real(self, reference: Reference) -> Seen:
        return self._of_all(AT_ONCE, lambda numbers: see_real(Look(self.extractor), reference.pictures, numbers))

    def _of_all(self, batch_size: int, see: Callable[[list[int]], Seen]) -> Seen:
        seen = by_all(self.ranks, self.config.num_images, batch_size, see)
        return seen._replace(features=seen.features.to(self.device))

    def _ceiling(self, other: Reference) -> Row:
        """Real images measured as if a pipeline had drawn them: what chance alone leaves of each number."""
        seen = self._real(other)
        asked = other.captions or (None if None in other.labels else other.labels)
        labels = wanted_labels(self.extractor, other)
        quality = self.ranks.first(lambda: self._quality(seen.features, asked, labels))
        row = {"pipeline": REAL, "num_inference_steps": None, "guidance_scale": None}
        return {**row, "resolution": seen.shown.shape[-1], **quality}

    def _quality(self, features: Tensor, asked: list[str] | list[int] | None, labels: list[int | None]) -> Row:
        return quality(self.extractor, self.real, features, asked, labels)

    def _to_teacher(self, features: Tensor, guidance: float | None) -> float | None:
        """The teacher's samples are those of the same guidance scale, or of its first where it has not that one."""
        teacher = self.teacher.get(guidance, next(iter(self.teacher.values()), None))
        differs = teacher is not None and teacher is not features
        return metrics.frechet_distance(teacher, features) if differs else None


def _names(config: EvaluationConfig) -> list[str]:
    """Of the rows of each pipeline, where all that needs no data is right."""
    if config.num_images <= metrics.NEIGHBOURS:
        raise UserError(f"--num_images is {config.num_images}: the metrics need more than {metrics.NEIGHBOURS}.")
    config.refuse_idle()
    return row_names(config.pipelines, config.names)
