"""Sweep steps, guidance, gamma, LoRA scale and pipelines, and show which combinations no other beats (2406.10429)."""

import cm_diffusers.engine.early
from pathlib import Path

from accelerate import PartialState

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation.candidates import check_output
from cm_diffusers.evaluation.front_page import write_page
from cm_diffusers.evaluation.front_plot import write_plots
from cm_diffusers.evaluation.front_points import FrontsConfig
from cm_diffusers.evaluation.front_report import Report, write_tables
from cm_diffusers.evaluation.reference import ReferenceConfig
from cm_diffusers.evaluation.sweep import Sweep
from cm_diffusers.tasks.fronts import reward_judges


CONFIGS = (FrontsConfig, ReferenceConfig)


def main() -> None:
    config, data = parse_configs(CONFIGS, __doc__)
    if not config.pipelines and config.teacher is None:
        raise UserError("Nothing to sweep: give --pipelines, --teacher or both.")
    check_output(config.output_dir)
    sweep, folder = Sweep(config, data, reward_judges(config.rewards, PartialState().device)), Path(config.output_dir)
    report = Report.of(sweep, sweep.run())
    print(write_tables(folder, report))
    write_plots(folder, report)
    write_page(folder, report)


if __name__ == "__main__":
    run(main)
