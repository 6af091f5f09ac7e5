"""Several video pipelines on the same prompts and seeds, measured against the same real clips."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from cm_diffusers.data.sources import source_name
from cm_diffusers.data.video import VideoDataConfig
from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation import motion
from cm_diffusers.evaluation.features import (
    classify,
    extract_features,
    load_extractor,
    load_video_extractor,
    video_features,
)
from cm_diffusers.evaluation.metrics import frechet_distance, label_in_prompt, prompt_agreement
from cm_diffusers.evaluation.real_clips import RealClips, load_real_clips
from cm_diffusers.evaluation.report import Keep, Row, forget, hardware, row_names
from cm_diffusers.evaluation.video_report import Shown, VideoSetting
from cm_diffusers.evaluation.video_sampling import (
    OF_ADAPTER,
    check_video_pipeline,
    check_video_teacher,
    generate_clips,
    load_video_pipeline,
    load_video_teacher,
)
from cm_diffusers.measured import REAL_CLIPS, TEACHER, clips_of, weights_digest
from cm_diffusers.models.motion import MotionConfig
from cm_diffusers.places import public
from cm_diffusers.record import read_record


Measurements = dict[str, Tensor]
FIRST_REAL = "real"  # the reference


@dataclass
class VideoEvaluationConfig:
    """Which pipelines to sample, how, and what to measure."""

    pipelines: list[str] = HfArg(
        default_factory=list, help="Folders or Hub ids of video students, or of pipelines of AnimateDiff's shape."
    )
    names: list[str] | None = HfArg(
        default=None,
        help="Names of --pipelines in the table; if absent, those of their runs: NAME of runs/NAME/student, else the "
        "last path part.",
    )
    teacher: str | None = HfArg(
        default=None,
        help="Baseline, sampled with DDIM: a pipeline of AnimateDiff's shape, or the image model that "
        "--pretrained_motion_adapter belongs to.",
    )
    teacher_steps: int = HfArg(default=25, help="Steps of the teacher besides --num_inference_steps.")
    num_inference_steps: list[int] = HfArg(default_factory=lambda: [1, 2, 4, 8], help="Steps to sample with.")
    guidance_scales: list[float] = HfArg(
        default_factory=lambda: [7.5],
        help="Guidance scales; a student whose guidance is distilled into its weights has its own.",
    )
    num_videos: int = HfArg(default=240, help="Clips per row of the table, each for the caption of one real clip.")
    seed: int = HfArg(default=0, help="Clip i of every pipeline starts from seed + i.")
    eval_batch_size: int = HfArg(default=8, help="Clips drawn at once.")
    dtype: Literal["float32", "float16", "bfloat16"] = HfArg(default="float32", help="Precision of the pipelines.")
    feature_extractor: str = HfArg(default="inception", help='"inception", or the folder of a saved ImageClassifier.')
    video_extractor: str | None = HfArg(
        default=None,
        help="module:function for FVD, from clips (N, F, 3, H, W) in [0, 1] to features (N, D); where Python finds it, "
        "as by PYTHONPATH.",
    )
    frames_per_clip: int = HfArg(default=4, help="Frames of a clip, and differences of frames, in Fréchet distances.")
    crop_zoom: float = HfArg(
        default=1.0,
        help="How much frames are enlarged about the moving thing before its content is compared and named: 1.3 suits the "
        "built-in articles of 20 px and the bundled classifier, which knows them at 28 px.",
    )
    num_shown: int = HfArg(default=6, help="Clips of each pipeline in the animations.")
    output_dir: str = HfArg(
        default="runs/video_evaluation", help="Where table.md, table.json, plot.png, grid.png and the GIFs go."
    )


class VideoComparison:
    """Samples pipelines and measures them; `rows` and `shown` (the first clips) grow in the order of measurement.

    Clips are measured in batches and not kept. Pipelines get the captions of the real clips.

    Raises:
        ValueError: wrong configuration; too few real clips; an extractor that cannot be loaded; a pipeline
            that is none.
    """

    def __init__(self, config: VideoEvaluationConfig, data: VideoDataConfig, adapter: MotionConfig) -> None:
        self.names = _names(config)
        if config.teacher is None:
            refuse_changed(adapter, f"pretrained_motion_adapter {OF_ADAPTER}", "without --teacher")
        self.config, self.data, self.adapter, self.device = config, data, adapter, PartialState().device
        self._check_pipelines()
        self.extractor = load_extractor(config.feature_extractor, self.device)
        self.video_extractor = load_video_extractor(config.video_extractor) if config.video_extractor else None
        self.reference, *others = load_real_clips(data, config.num_videos, 2)
        self.real, shown = self._measured(self._read(self.reference))
        self.weights = {
            name: weights_digest(source) for name, source in zip(self.names, config.pipelines, strict=True)
        }
        self.shown = [Shown(FIRST_REAL, FIRST_REAL, shown)]
        self.setting = self._setting(motion.static_threshold(self.real["frame_change"]))
        self.rows = [self._row_of_real(other) for other in others]

    def _check_pipelines(self) -> None:
        shape = self.data.sample_n_frames, self.data.resolution
        if self.config.teacher is not None:
            check_video_teacher(self.config.teacher, self.adapter, *shape)
        for source in self.config.pipelines:
            check_video_pipeline(source, *shape)

    def run(self, keep: Keep = forget) -> list[Row]:
        """Measures the teacher, longest first, then every pipeline.

        Args:
            keep: Gets all rows so far after each.
        """
        config, data, dtype = self.config, self.data, getattr(torch, self.config.dtype)
        if config.teacher is not None:
            steps = [config.teacher_steps, *(n for n in config.num_inference_steps if n != config.teacher_steps)]
            pipe = load_video_teacher(config.teacher, self.adapter, data.sample_n_frames, dtype, self.device)
            self._measure(pipe, TEACHER, steps, config.guidance_scales, keep)
        for source, name in zip(config.pipelines, self.names, strict=True):
            self.measure(source, name, config.num_inference_steps, keep)
        return self.rows

    def measure(self, source: str, name: str, steps: Sequence[int], keep: Keep = forget) -> None:
        """Rows and shown clips of one pipeline, at every guidance scale that it has not of its own; `keep` as for `run`."""
        record = read_record(source)
        own = record is not None and record.guidance != "embedded"
        scales = [record.recommended_guidance_scale] if own else self.config.guidance_scales
        pipe = load_video_pipeline(source, getattr(torch, self.config.dtype), self.device)
        self._measure(pipe, name, steps, scales, keep)

    def _measure(
        self, pipe: DiffusionPipeline, name: str, steps: Sequence[int], scales: Sequence[float], keep: Keep = forget
    ) -> None:
        config, captions = self.config, self.reference.captions
        seeds = range(config.seed, config.seed + len(captions))
        shape = self.data.sample_n_frames, self.data.resolution
        for scale, count in product(scales, steps):
            drawn = generate_clips(pipe, captions, seeds, count, scale, config.eval_batch_size, *shape)
            found, shown = self._measured(drawn)
            row = {"pipeline": name, "num_inference_steps": count, "guidance_scale": scale}
            speed = {"seconds_per_clip": _mean(found["seconds"])}
            self.rows.append(row | self._quality(found, captions) | speed)
            self.shown.append(Shown(name, f"{name}, {count} steps, {scale:g}", shown))
            keep(self.rows)

    def _setting(self, threshold: float) -> VideoSetting:
        config, data, clips = self.config, self.data, self.reference.views
        return VideoSetting(
            num_clips=config.num_videos,
            num_frames=data.sample_n_frames,
            resolution=data.resolution,
            seed=config.seed,
            extractor=public(config.feature_extractor),
            video_extractor=config.video_extractor,
            crop_zoom=config.crop_zoom,
            frames_per_clip=config.frames_per_clip,
            min_speed=motion.MIN_SPEED,
            static_threshold=threshold,
            reference=public(data.moving_articles or source_name(clips.images)),
            hardware=hardware(),
            dtype=config.dtype,
            batch_size=config.eval_batch_size,
        )

    def _row_of_real(self, other: RealClips) -> Row:
        """Real clips measured as if a pipeline had drawn them: what chance alone leaves of each number."""
        found, _ = self._measured(self._read(other))
        row = {"pipeline": REAL_CLIPS, "num_inference_steps": None, "guidance_scale": None}
        return row | self._quality(found, other.captions)

    def _read(self, clips: RealClips) -> Iterable[tuple[Tensor, float]]:
        size = self.config.eval_batch_size
        return tqdm(clips.batches(size), "real clips", -(-len(clips.rows) // size), leave=False)

    def _measured(self, batches: Iterable[tuple[Tensor, float]]) -> tuple[Measurements, Tensor]:
        """What is measured of each clip, and the first clips, of batches and the seconds that they took."""
        parts, shown, wanted = [], [], self.config.num_shown
        for clips, seconds in batches:
            shown.append(clips[: max(0, wanted - sum(map(len, shown)))].clone())  # a view would keep the batch
            spent = {"seconds": torch.full((len(clips),), seconds / len(clips))}
            parts.append(self._of_batch(clips.to(self.device)) | spent)
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, torch.cat(shown)

    def _of_batch(self, clips: Tensor) -> Measurements:
        count, differences = self.config.frames_per_clip, motion.frame_differences(clips)
        velocity, residual = motion.constant_velocity(motion.centroids(clips))
        content = self._features(motion.centred(clips, self.config.crop_zoom))
        found = {
            "velocity": velocity,
            "residual": residual,
            "frame_change": motion.frame_change(clips),
            "mass_change": motion.mass_change(clips),
            "colour_drift": motion.colour_drift(clips),
            "content_drift": motion.content_drift(content),
            "frames": self._features(clips[:, motion.spread_frames(clips.shape[1], count)]),
            "differences": self._features(differences[:, motion.spread_frames(differences.shape[1], count)]),
        }
        if (logits := classify(self.extractor, content[:, content.shape[1] // 2])) is not None:
            found["logits"] = logits
        if self.video_extractor is not None:
            found["videos"] = video_features(self.video_extractor, clips)
        return found

    def _features(self, clips: Tensor) -> Tensor:
        """Of each frame: (N, F, D)."""
        return extract_features(self.extractor, clips.flatten(0, 1)).unflatten(0, clips.shape[:2])

    def _quality(self, found: Measurements, captions: Sequence[str]) -> Row:
        directions = [motion.direction_in_prompt(caption) for caption in captions]
        accuracy = motion.direction_accuracy(found["velocity"], directions)
        told = torch.tensor([direction is not None for direction in directions])
        upright = torch.tensor([not motion.is_turning(caption) for caption in captions])
        return {
            "direction_accuracy": accuracy.pop("all", None),
            **{f"direction_accuracy_{direction}": share for direction, share in accuracy.items()},
            "velocity_residual": _mean(found["residual"][told.to(found["residual"].device)]),
            "static_rate": (found["frame_change"] < self.setting.static_threshold).float().mean().item(),
            "fd_frames": self._distance(found, "frames"),
            "fd_differences": self._distance(found, "differences"),
            "fvd": self._distance(found, "videos"),
            "agreement": self._agreement(found.get("logits"), captions),
            "content_drift": _mean(found["content_drift"][upright.to(found["content_drift"].device)]),
            "colour_drift": _mean(found["colour_drift"]),
            "mass_change": _mean(found["mass_change"]),
        }

    def _distance(self, found: Measurements, key: str) -> float | None:
        if key not in found:
            return None
        return frechet_distance(*(features[key].flatten(0, -2) for features in (self.real, found)))

    def _agreement(self, logits: Tensor | None, captions: Sequence[str]) -> float | None:
        """Of clips whose thing stays upright, as the classifier's images are."""
        if logits is None:
            return None
        names = self.extractor.labels
        return prompt_agreement(
            logits, [None if motion.is_turning(c) else label_in_prompt(c, names) for c in captions]
        )


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None


def _names(config: VideoEvaluationConfig) -> list[str]:
    """Of the rows of each pipeline, where all that needs no data is right."""
    names = row_names(config.pipelines, config.names)
    files = [clips_of(name) for name in (FIRST_REAL, TEACHER, *names)]
    if twice := [file for file in files if files.count(file) > 1]:
        raise UserError(
            f"Two rows would be called {Path(twice[0]).stem}: give each pipeline a name of its own by --names."
        )
    return names
