"""Pipelines, steps, guidance, gammas and scales of LoRAs: every combination sampled for the same prompts, and measured."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from tqdm.auto import tqdm

from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation import metrics
from cm_diffusers.evaluation.candidates import Candidate, common_side
from cm_diffusers.evaluation.compared import (
    asked_of,
    check_candidate,
    draw,
    gammas_of,
    guidance_of,
)
from cm_diffusers.evaluation.front_columns import (
    FEATURES,
    RESAMPLED_SUBSETS,
    SUBSETS,
    RealImages,
    by_prompt,
    chosen,
    known_columns,
    of_sets,
    parse_axes,
    parse_point,
    variety,
    within,
)
from cm_diffusers.evaluation.front_points import FrontsConfig, Measured, Point
from cm_diffusers.evaluation.fronts import bootstrap
from cm_diffusers.evaluation.judging import Judge, Judging
from cm_diffusers.evaluation.kept import Found, Kept, pipeline_digest, tensors_digest
from cm_diffusers.evaluation.reference import ReferenceConfig, load_reference, repeated
from cm_diffusers.evaluation.report import hardware, row_names
from cm_diffusers.evaluation.sampling import load_pipeline, reads_prompts, set_lora_scale
from cm_diffusers.evaluation.seen import Look, see_real
from cm_diffusers.measured import TEACHER, distance_name
from cm_diffusers.record import read_record


POINTS = "points"  # folder of what was found of each point
SHOWN_PROMPTS, SHOWN_EACH, SHOWN_SIDE = 6, 2, 96  # images that a page shows of each point, and their largest side
SECONDS, MACHINE = "seconds", "machine"  # names of tensors of a point: how long it took, and where
SHOWN, SIDE, ASKED = (
    "shown",
    "side",
    "asked",
)  # some images, their side in pixels, and whether they were asked for anything


class Sweep:
    """All points, and what they are measured with.

    Args:
        config: The sweep.
        data: Real images.
        judges: Rewards by name.

    Raises:
        ValueError: As `Comparison`; or flags that have no effect, columns that will not be measured, too few images.
    """

    def __init__(self, config: FrontsConfig, data: ReferenceConfig, judges: Mapping[str, Judge]) -> None:
        config.refuse_idle()
        self.config, self.side, self.device = config, data.resolution, PartialState().device
        self.names = row_names(config.pipelines, config.names)
        candidates = [Candidate.of(source) for source in config.sources]
        extractor = config.feature_extractor
        models = config.clip_model, config.cmmd_model
        self.judging = Judging(extractor, *models, judges, self.device)
        self.data = replace(data, resolution=data.resolution or common_side(candidates))
        reference = load_reference(self.data, config.num_images)
        self.asked = repeated(reference, config.num_prompts, config.images_per_prompt)
        self.num_prompts = len(self.asked.labels) // config.images_per_prompt
        self.num_real = len(reference.pictures)
        check_sizes(config, self.num_prompts, self.num_real)
        for one, name in zip(candidates, self._labels, strict=True):
            check_candidate(one, self.asked, self._steps(name))
        self.judging.ask(self.asked)
        self.columns = known_columns(list(judges), distance_name(extractor))
        self.axes = parse_axes(config.axes, self.columns, self._measured(candidates))
        self.reference_point = parse_point(config.reference_point, self.axes)
        self._loaded: tuple[str, DiffusionPipeline] | None = None
        self.points, self.digests = self._all_points(candidates)
        self.kept = Kept(Path(config.output_dir) / POINTS)
        told = reference.captions or reference.labels
        asked = (self.asked.captions or self.asked.labels)[:: config.images_per_prompt]
        real = see_real(Look(self.judging.extractor, lambda images, _: self.judging.embed(images)), reference.pictures)
        self.real = RealImages.of(self._on_device({FEATURES: real.features, **real.scores}), told, asked)
        self.judged_by = self.judging.digest
        self.compared_with = [tensors_digest(self.real.found), told, config.bootstrap_samples]

    @property
    def _labels(self) -> list[str]:
        """Names of all pipelines, the teacher's first."""
        return [TEACHER] * (self.config.teacher is not None) + self.names

    def _steps(self, name: str) -> list[int]:
        return self.config.teacher_steps if name == TEACHER else self.config.num_inference_steps

    def _measured(self, candidates: Sequence[Candidate]) -> set[str]:
        """The columns that at least one point will have.

        Raises:
            ValueError: CLIP scores or rewards are wanted, and no pipeline is asked for anything.
        """
        prompted = any(one.reads_prompts for one in candidates)
        asked = prompted or any(one.takes_classes for one in candidates)
        if not prompted:
            refuse_changed(self.config, "clip_model", "on pipelines that read no prompts")
        if not asked:
            refuse_changed(self.config, "rewards", "on pipelines that are asked for nothing")
        found = {key for key, one in self.columns.items() if not one.needs}
        found |= self.judging.scored if asked else set()
        found |= {"vendi", "pairwise_distance"} if asked and self.config.images_per_prompt > 1 else set()
        return found | ({"cmmd"} if self.config.cmmd_model else set())

    def _all_points(self, candidates: Sequence[Candidate]) -> tuple[list[Point], dict[str, str]]:
        """Of each pipeline those of few steps first; and digests of the pipelines by source, each of which is loaded here.

        Raises:
            ValueError: A pipeline cannot be loaded, or none has a gamma, or a LoRA, for the values given.
        """
        config, points, digests = self.config, [], {}
        for one, name in zip(candidates, self._labels, strict=True):
            pipe = self._pipe(one.source)
            digests[one.source] = pipeline_digest(pipe)
            scales = config.lora_scales if config.lora_scales and one.is_lora else [None]
            knobs = guidance_of(pipe, one.record, config.guidance_scales), gammas_of(pipe, config.gammas), scales
            points += [Point(one.source, name, *values) for values in product(sorted(self._steps(name)), *knobs)]
        for flag, knob in {"gammas": "gamma", "lora_scales": "lora_scale"}.items():
            if all(getattr(point, knob) is None for point in points):
                refuse_changed(config, flag, "on these pipelines, which have none")
        return points, digests

    def _pipe(self, source: str) -> DiffusionPipeline:
        """The pipeline of a source; one at a time is in memory."""
        if self._loaded is None or self._loaded[0] != source:
            self._loaded = None
            dtype, given = getattr(torch, self.config.dtype), self.config.single_file_config
            self._loaded = source, load_pipeline(source, dtype, self.device, single_file_config=given)
        return self._loaded[1]

    def run(self) -> list[Measured]:
        """All points; what the folder has from before is not measured again."""
        return [self.measure(point) for point in tqdm(self.points, "points")]

    def measure(self, point: Point) -> Measured:
        """A point's columns and images, from the folder where it has them."""
        drawn_as = self._key(point)
        found = self.kept.get(drawn_as, lambda: self._found(point))
        compared = {"point": drawn_as, "compared_with": self.compared_with}
        columns = self.kept.get(compared, lambda: self._columns(found))
        values = {name: tuple(column.tolist()) for name, column in columns.items()}
        machine = bytes(found[MACHINE].tolist()).decode()
        values |= {"num_inference_steps": (point.num_inference_steps,), "resolution": (found[SIDE].item(),)}
        values["ms_per_image"] = (1000 * found[SECONDS].item() / len(found[FEATURES]),)
        return Measured(point, values, found[SHOWN], machine)

    def _key(self, point: Point) -> dict[str, object]:
        """All that the images of a point and their scores depend on."""
        config, knobs = self.config, {name: value for name, value in point.knobs.items() if name != "pipeline"}
        return {
            **knobs,
            "weights": self.digests[point.source],
            "seed": config.seed,
            "images_per_prompt": config.images_per_prompt,
            "captions": self.asked.captions,
            "classes": self.asked.labels,
            "side": self._side(point.source),
            "dtype": config.dtype,
            "releases": {
                package: version(package) for package in ("cm_diffusers", "diffusers", "torch", "transformers")
            },
            "judged_by": self.judged_by,
        }

    def _side(self, source: str) -> int | None:
        """Of what a pipeline that reads prompts draws, in pixels; None for its own default."""
        record = read_record(source)
        return self.side or (record and record.resolution)

    def _found(self, point: Point) -> Found:
        """Draws the images, and judges them batch by batch."""
        pipe, config = self._pipe(point.source), self.config
        if point.gamma is not None:
            pipe.scheduler.register_to_config(gamma=point.gamma)
        if point.lora_scale is not None:
            set_lora_scale(pipe, point.lora_scale)
        asked, prompted = asked_of(pipe, self.asked, point.source), reads_prompts(pipe)
        seeds = range(config.seed, config.seed + len(self.asked.labels))
        knobs, side = (point.num_inference_steps, point.guidance_scale), self._side(point.source)

        def judge(images: Tensor, rows: slice) -> Found:
            scores = {} if asked is None else self.judging.score(images, rows, prompted)
            return self.judging.embed(images) | scores

        look = Look(self.judging.extractor, judge, shown_of(self.num_prompts, config.images_per_prompt))
        seen = look.seen(*draw(pipe, asked, seeds, *knobs, config.eval_batch_size, side, look))
        found = {FEATURES: seen.features, **seen.scores}
        if asked is not None:
            found |= self.judging.agreement(seen.features) | variety(seen.features, config.images_per_prompt)
        timed = f"{hardware()}, {config.dtype}, batch size {config.eval_batch_size}"
        machine = torch.tensor(list(timed.encode()), dtype=torch.uint8)
        found |= {SECONDS: torch.tensor(seen.seconds), MACHINE: machine, ASKED: torch.tensor(asked is not None)}
        shown = thumbnails(seen.shown, min(SHOWN_EACH, config.images_per_prompt))
        return found | {SHOWN: shown, SIDE: torch.tensor(seen.shown.shape[-1])}

    def _columns(self, found: Found) -> Found:
        """Of each column its value (1,), or that and both ends of its interval (3,), in float64.

        Where images were asked for something, the real images of a prompt are drawn anew with it: a prompt that a resample
        lacks would otherwise count as one that the pipeline cannot draw.
        """
        count, each, is_asked = self.num_prompts, by_prompt(found, self.num_prompts), bool(found[ASKED])

        def measure(prompts: np.ndarray, real: Found, subsets: int) -> dict[str, float]:
            means = {name: values[torch.from_numpy(prompts)].nanmean().item() for name, values in each.items()}
            return means | of_sets(self._on_device(chosen(found, count, prompts)), real, subsets)

        def resample(prompts: np.ndarray) -> dict[str, float]:
            return measure(prompts, self.real.chosen(prompts) if is_asked else self.real.found, RESAMPLED_SUBSETS)

        estimates = measure(np.arange(count), self.real.found, SUBSETS)
        intervals = bootstrap(resample, estimates, count, self.config.bootstrap_samples)
        columns = {
            name: [value, *within(intervals.get(name, ()), self.columns[name])] for name, value in estimates.items()
        }
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}

    def _on_device(self, found: Found) -> Found:
        return {name: tensor.to(self.device) for name, tensor in found.items()}


def check_sizes(config: FrontsConfig, num_prompts: int, num_real: int) -> None:
    """
    Raises:
        ValueError: Too few images for the metrics.
    """
    drawn = f"--images_per_prompt {config.images_per_prompt} of {num_prompts} prompts"
    for count, what in ((num_prompts * config.images_per_prompt, drawn), (num_real, "the reference set")):
        if count <= metrics.NEIGHBOURS:
            raise UserError(f"{what} makes {count} images: the metrics need more than {metrics.NEIGHBOURS}.")


def shown_of(num_prompts: int, images_per_prompt: int) -> set[int]:
    """Numbers of the images that a page shows: a few of each of the first prompts."""
    few = range(min(SHOWN_EACH, images_per_prompt))
    return {prompt * images_per_prompt + one for prompt in range(min(SHOWN_PROMPTS, num_prompts)) for one in few}


def thumbnails(images: Tensor, each: int) -> Tensor:
    """Images (P E, 3, H, W) in [0, 1] of P prompts, E of each, small: (P, E, 3, h, w) in bytes, sides at most 96."""
    factor = max(1, max(images.shape[-2:]) / SHOWN_SIDE)
    small = adaptive_avg_pool2d(images, [round(side / factor) for side in images.shape[-2:]])
    return (small * 255).round().byte().unflatten(0, (-1, each))
