"""Make a pipeline of a run's weights averaged over another window, from what --ema_sigma_rels left behind."""

import cm_diffusers.engine.early
from dataclasses import dataclass, replace
from pathlib import Path

from transformers.hf_argparser import HfArg

from cm_diffusers.engine.averages import rebuild
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import network_of
from cm_diffusers.models.students import HALF
from cm_diffusers.models.teachers import load_stock
from cm_diffusers.models.time_weight import weights_without_head
from cm_diffusers.places import public
from cm_diffusers.publishing.pipelines import save_pipeline
from cm_diffusers.publishing.provenance import read_provenance
from cm_diffusers.record import read_record


@dataclass
class ExportConfig:
    """Which average (2312.02696, Sec. 3.2), and of which run."""

    run_dir: str = HfArg(help="Output folder of a finished training with --ema_sigma_rels.")
    sigma_rel: float = HfArg(help="Width: standard deviation of the average over steps, as a share of all.")
    step: int | None = HfArg(default=None, help="Of which checkpoint; the last if not given.")
    output_dir: str = HfArg(default="runs/average", help="Where the pipeline goes.")
    save_fp16: bool = HfArg(default=False, help=f"Store network and VAE in half precision: {HALF}.")


CONFIGS = (ExportConfig,)


def main() -> None:
    (config,) = parse_configs(CONFIGS, __doc__)
    if Path(config.output_dir).exists():
        raise UserError(f"--output_dir {config.output_dir} exists already: give a new folder.")
    source = Path(config.run_dir) / "pipeline"
    if not (source / "model_index.json").is_file():
        raise UserError(f"{config.run_dir} has no folder pipeline: the training has not ended, or it made a LoRA.")
    provenance = read_provenance(source)
    average, step = rebuild(Path(config.run_dir), config.sigma_rel, config.step)
    settings = provenance.settings | {"sigma_rel": config.sigma_rel, "average_of_step": step}
    provenance = replace(provenance, name=public(config.output_dir), settings=settings)
    pipe = load_stock(source)
    network = pipe.unet if hasattr(pipe, "unet") else network_of(pipe)
    network.load_state_dict(network.state_dict() | weights_without_head(average))
    save_pipeline(pipe, Path(config.output_dir), config.save_fp16, read_record(source), provenance)


if __name__ == "__main__":
    run(main)
