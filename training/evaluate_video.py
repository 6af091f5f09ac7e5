"""Compare video pipelines with real clips and a teacher: direction and steadiness of motion, drift, Fréchet distances, speed."""

import cm_diffusers.engine.early
from pathlib import Path

from cm_diffusers.data.video import VideoDataConfig
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.evaluation.candidates import check_output
from cm_diffusers.evaluation.report import PARTIAL, table_json, write_table
from cm_diffusers.evaluation.video import VideoComparison, VideoEvaluationConfig
from cm_diffusers.evaluation.video_report import markdown_table, write_report
from cm_diffusers.models.motion import MotionConfig


CONFIGS = (VideoEvaluationConfig, VideoDataConfig, MotionConfig)


def main() -> None:
    config, data, adapter = parse_configs(CONFIGS, __doc__)
    if not config.pipelines and config.teacher is None:
        raise ValueError("Nothing to evaluate: give --pipelines, --teacher or both.")
    check_output(config.output_dir)
    comparison = VideoComparison(config, data, adapter)
    setting, weights, folder = comparison.setting, comparison.weights, Path(config.output_dir)

    def keep(rows):
        write_table(folder / PARTIAL, markdown_table(rows, setting), table_json(rows, setting, weights))

    rows, captions = comparison.run(keep), comparison.reference.captions[: config.num_shown]
    print(write_report(folder, rows, setting, comparison.shown, captions, weights))


if __name__ == "__main__":
    run(main)
