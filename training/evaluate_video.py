"""Compare video pipelines with real clips and a teacher: direction and steadiness of motion, drift, Fréchet distances, speed."""

import cm_diffusers.engine.early
from pathlib import Path

from cm_diffusers.data.video import VideoDataConfig
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.evaluation.video import VideoComparison, VideoEvaluationConfig
from cm_diffusers.evaluation.video_report import write_report
from cm_diffusers.models.motion import MotionConfig


CONFIGS = (VideoEvaluationConfig, VideoDataConfig, MotionConfig)


def main() -> None:
    config, data, adapter = parse_configs(CONFIGS, __doc__)
    if not config.pipelines and config.teacher is None:
        raise ValueError("Nothing to evaluate: give --pipelines, --teacher or both.")
    comparison = VideoComparison(config, data, adapter)
    rows, captions = comparison.run(), comparison.reference.captions[: config.num_shown]
    folder, shown = Path(config.output_dir), comparison.shown
    print(write_report(folder, rows, comparison.setting, shown, captions, comparison.weights))


if __name__ == "__main__":
    run(main)
