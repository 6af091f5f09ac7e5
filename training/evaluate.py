"""Compare pipelines: quality against real images and a teacher, prompt agreement where they read prompts, and speed."""

import cm_diffusers.engine.early
from pathlib import Path

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.ranks import Ranks
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation.candidates import check_output
from cm_diffusers.evaluation.comparison import Comparison, EvaluationConfig
from cm_diffusers.evaluation.reference import ReferenceConfig
from cm_diffusers.evaluation.report import PARTIAL, markdown_table, table_json, write_report, write_table


CONFIGS = (EvaluationConfig, ReferenceConfig)


def main() -> None:
    config, data = parse_configs(CONFIGS, __doc__)
    if not config.pipelines and config.teacher is None:
        raise UserError("Nothing to evaluate: give --pipelines, --teacher or both.")
    check_output(config.output_dir)
    comparison, folder = Comparison(config, data, Ranks.patient()), Path(config.output_dir)
    setting, weights = comparison.setting, comparison.weights

    def keep(rows):
        write_table(folder / PARTIAL, markdown_table(rows, setting), table_json(rows, setting, weights))

    rows = comparison.run(keep)
    if comparison.ranks.rank == 0:
        print(write_report(folder, rows, setting, comparison.grid(), weights))


if __name__ == "__main__":
    run(main)
