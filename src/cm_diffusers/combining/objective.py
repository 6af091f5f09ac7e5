"""What a combination is good for: a column of the evaluation of its images, summed over several numbers of steps."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation import metrics
from cm_diffusers.evaluation.candidates import Candidate, common_side
from cm_diffusers.evaluation.compared import asked_of, draw, wanted_labels
from cm_diffusers.evaluation.features import InceptionFeatures, NotFiniteError, load_extractor
from cm_diffusers.evaluation.quality import COLUMNS, LOWER_IS_BETTER, quality
from cm_diffusers.evaluation.reference import Reference, ReferenceConfig, load_references
from cm_diffusers.evaluation.report import Row
from cm_diffusers.evaluation.sampling import load_pipeline, reads_prompts
from cm_diffusers.evaluation.seen import Look, see_real
from cm_diffusers.models.classifier import ImageClassifier


Features = dict[int, Tensor]  # number of steps -> (N, D)


@dataclass
class ObjectiveConfig:
    """What is measured, and on which images."""

    objective: Literal[COLUMNS] = HfArg(default="fid", help="Column of the evaluation that shall become better.")
    num_inference_steps: list[int] = HfArg(
        default_factory=lambda: [1, 2, 4], help="Steps to sample with; the objective is a weighted mean over them."
    )
    step_weights: list[float] | None = HfArg(
        default=None,
        help="Weight of each of --num_inference_steps; all alike if not given. With 0 it is only measured on the hold-out.",
    )
    guidance_scale: float | None = HfArg(
        default=None, help="Guidance scale to sample with; if not given, what the student's record recommends."
    )
    num_images: int = HfArg(
        default=1000, help="Images per number of steps, and as many others for the hold-out; real ones likewise."
    )
    seed: int = HfArg(default=0, help="Image i of every vector starts from seed + i.")
    holdout_seed: int | None = HfArg(
        default=None, help="The same for the hold-out, --seed + --num_images if not given."
    )
    eval_batch_size: int = HfArg(default=32, help="Images drawn at once.")
    dtype: Literal["float32", "float16", "bfloat16"] = HfArg(default="float32", help="Precision of the pipeline.")
    feature_extractor: str = HfArg(default="inception", help='"inception", or the folder of a saved ImageClassifier.')
    bootstrap_samples: int = HfArg(default=200, help="Resamples of the hold-out's images.")
    confidence: float = HfArg(
        default=0.95,
        help="Share of the resamples in which the found vector must beat the best baseline to be published.",
    )

    def check(self) -> None:
        """
        Raises:
            ValueError: Numbers that do not fit each other.
        """
        steps, weights = self.num_inference_steps, self.step_weights
        if weights is not None and len(weights) != len(steps):
            raise UserError(
                f"--step_weights gives {len(weights)} weights for {len(steps)} numbers of steps: give one each."
            )
        if weights is not None and not sum(weights):
            raise UserError("--step_weights are all 0: give at least one above it.")
        if len(set(steps)) < len(steps):
            raise UserError(f"--num_inference_steps names one number twice: {' '.join(map(str, steps))}.")
        if self.bootstrap_samples == 0:
            raise UserError("--bootstrap_samples 0 would decide nothing on the hold-out: give some, or leave it out.")
        if self.num_images <= metrics.NEIGHBOURS:
            raise UserError(f"--num_images is {self.num_images}: the metrics need more than {metrics.NEIGHBOURS}.")
        if abs(self.of_holdout - self.seed) < self.num_images:
            raise UserError(
                f"--holdout_seed {self.of_holdout} shares noise with the search's seeds from {self.seed} to "
                f"{self.seed + self.num_images - 1}: leave it out, or give one beyond."
            )

    @property
    def of_holdout(self) -> int:
        return self.seed + self.num_images if self.holdout_seed is None else self.holdout_seed

    @property
    def weights(self) -> dict[int, float]:
        """Of each number of steps that counts, 1 in all."""
        weights = np.array(self.step_weights or [1.0] * len(self.num_inference_steps))
        shares = zip(self.num_inference_steps, (weights / weights.sum()).tolist(), strict=True)
        return {steps: share for steps, share in shares if share}


@dataclass(frozen=True)
class Sampler:
    """How a student is sampled.

    Attributes:
        pipe: Its pipeline.
        guidance_scale: None without prompts.
        resolution: Of what is drawn; None without prompts.
    """

    pipe: DiffusionPipeline
    guidance_scale: float | None
    resolution: int | None


class Sheet:
    """Real images and seeds: what is drawn on it differs by the weights of the network alone.

    Args:
        config: The objective.
        extractor: As of `load_extractor`.
        reference: Real images and what they show.
        seed: Of the first image.
        steps: Numbers of them to sample with, those that count among them.
        sampler: The student's.

    Raises:
        ValueError: The objective cannot be measured on these images.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        extractor: ImageClassifier | InceptionFeatures,
        reference: Reference,
        seed: int,
        steps: Collection[int],
        sampler: Sampler,
    ) -> None:
        self.config, self.extractor, self.steps, self.sampler = config, extractor, steps, sampler
        self.seeds = range(seed, seed + len(reference.pictures))
        self.asked = asked_of(sampler.pipe, reference, "The student")
        self.labels = wanted_labels(extractor, reference)
        self.device = PartialState().device
        self.real = see_real(Look(extractor), reference.pictures).features.to(self.device)
        if self._quality(self.real, range(len(self.real)), [config.objective])[config.objective] is None:
            raise UserError(
                f"--objective {config.objective} cannot be measured on these images: agreement needs a classifier as "
                "--feature_extractor and the classes of the images, vendi ten images of one caption or class."
            )

    def draw(self) -> Features | None:
        """Of the images that the student draws now; None if some are not finite, as those of wild weights."""
        config, sampler, found = self.config, self.sampler, {}
        for steps in self.steps:
            given = (steps, sampler.guidance_scale, config.eval_batch_size, sampler.resolution)
            try:
                features, _ = draw(sampler.pipe, self.asked, self.seeds, *given, Look(self.extractor))
            except NotFiniteError:
                return None
            found[steps] = features.to(self.device)
        return found

    def rows(self, features: Features | None) -> list[Row]:
        """All columns, for each number of steps; of images that are not finite none."""
        chosen = range(len(self.real))
        return [
            {"num_inference_steps": steps, **self._quality(one, chosen)} for steps, one in (features or {}).items()
        ]

    def value(self, rows: Sequence[Row]) -> float:
        """The objective, turned so that less is better; infinite if it could not be measured."""
        name, weights = self.config.objective, self.config.weights
        counted = [(row[name], weights[n]) for row in rows if (n := row["num_inference_steps"]) in weights]
        values = [math.nan if value is None else value * weight for value, weight in counted]
        total = sum(values) if name in LOWER_IS_BETTER else -sum(values)
        return total if values and math.isfinite(total) else math.inf

    def shown(self, value: float) -> float:
        """A value as tables have it."""
        return value if self.config.objective in LOWER_IS_BETTER else -value

    def differences(self, found: Features, baseline: Features) -> np.ndarray:
        """Objective of one less that of the other, `(bootstrap_samples,)`: the drawn images are resampled, the same of both.

        The real images stay. Images that are drawn twice change a value a little, but that of both alike.
        """
        rng, count = np.random.default_rng(self.config.seed), len(self.real)
        draws = [rng.integers(count, size=count).tolist() for _ in range(self.config.bootstrap_samples)]
        return np.array(
            [self._resampled(found, rows) - self._resampled(baseline, rows) for rows in tqdm(draws, "Bootstrap")]
        )

    def _resampled(self, features: Features, chosen: Sequence[int]) -> float:
        wanted, weights = [self.config.objective], self.config.weights
        return self.value([{"num_inference_steps": n, **self._quality(features[n], chosen, wanted)} for n in weights])

    def _quality(self, features: Tensor, chosen: Sequence[int], columns: Collection[str] = COLUMNS) -> Row:
        """Of the chosen ones of the images."""
        asked = None if self.asked is None else [self.asked[i] for i in chosen]
        labels = [self.labels[i] for i in chosen]
        return quality(self.extractor, self.real, features[list(chosen)], asked, labels, columns)


class Bench(NamedTuple):
    """Where a student is measured: the search's images, and those that it does not see."""

    sampler: Sampler
    search: Sheet
    holdout: Sheet


def make_bench(config: ObjectiveConfig, data: ReferenceConfig, source: Path) -> Bench:
    """
    Args:
        source: Folder of a published pipeline or LoRA.

    Raises:
        ValueError: It cannot be sampled so, or there are too few real images for two sets.
    """
    candidate = Candidate.of(str(source))
    if candidate.record is None:
        raise UserError(f"{source} has no record: only students can be combined, not diffusion models with prompts.")
    candidate.check_steps(config.num_inference_steps)
    device = PartialState().device
    extractor = load_extractor(config.feature_extractor, device)
    data = replace(data, resolution=data.resolution or common_side([candidate]))
    references = load_references(data, config.num_images, 2)
    if len(references) < 2:
        raise UserError(
            f"The reference set has not twice the {config.num_images} images of --num_images, half of them for the hold-out: "
            "ask for fewer."
        )
    pipe = load_pipeline(str(source), getattr(torch, config.dtype), device)
    sampler = Sampler(pipe, None, None)
    if reads_prompts(pipe):
        scale = config.guidance_scale
        scale = candidate.record.recommended_guidance_scale if scale is None else scale
        sampler = Sampler(pipe, scale, data.resolution)
    else:
        refuse_changed(config, "guidance_scale", "on a pipeline without prompts")
    search, holdout = references
    sheets = (
        Sheet(config, extractor, search, config.seed, config.weights, sampler),
        Sheet(config, extractor, holdout, config.of_holdout, config.num_inference_steps, sampler),
    )
    return Bench(sampler, *sheets)
