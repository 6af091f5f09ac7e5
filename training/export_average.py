"""Make a pipeline, or LoRA, of a run's weights averaged otherwise, from what --ema_sigma_rels or --snapshot_steps left behind."""

import cm_diffusers.engine.early

from cm_diffusers.combining.export import ExportConfig, export_average
from cm_diffusers.engine.cli import parse_configs, run


CONFIGS = (ExportConfig,)


def main() -> None:
    export_average(*parse_configs(CONFIGS, __doc__))


if __name__ == "__main__":
    run(main)
