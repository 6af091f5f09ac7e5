"""Compare pipelines: quality against real images and a teacher, prompt agreement where they read prompts, and speed."""

import cm_diffusers.engine.early
from pathlib import Path

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.evaluation.comparison import Comparison, EvaluationConfig
from cm_diffusers.evaluation.reference import ReferenceConfig
from cm_diffusers.evaluation.report import write_report


CONFIGS = (EvaluationConfig, ReferenceConfig)


def main() -> None:
    config, data = parse_configs(CONFIGS, __doc__)
    if not config.pipelines and config.teacher is None:
        raise ValueError("Nothing to evaluate: give --pipelines, --teacher or both.")
    comparison = Comparison(config, data)
    rows = comparison.run()
    folder = Path(config.output_dir)
    print(write_report(folder, rows, comparison.setting, comparison.grid(), comparison.weights))


if __name__ == "__main__":
    run(main)
