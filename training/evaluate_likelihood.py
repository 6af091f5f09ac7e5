"""Measure how likely a diffusion model, or a consistency trajectory model, finds images: bits per dimension (2011.13456)."""

import cm_diffusers.engine.early
import json
from pathlib import Path

import torch

from cm_diffusers.data.sources import DataConfig, source_name
from cm_diffusers.diffusion.views import check_sigmas
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.evaluation.candidates import check_output
from cm_diffusers.evaluation.likelihood import LikelihoodConfig
from cm_diffusers.evaluation.report import hardware, write_table
from cm_diffusers.tasks.image_models import ClassConfig, StartConfig, load_image_model
from cm_diffusers.tasks.likelihoods import measure


CONFIGS = (StartConfig, LikelihoodConfig, ClassConfig, DataConfig)


def main() -> None:
    start, config, classes, data = parse_configs(CONFIGS, __doc__)
    check_output(config.output_dir)
    model = load_image_model(start)
    check_sigmas(model.view, config.sigma_min, config.sigma_max)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.network.to(device)
    batches = model.batches(data, classes, config.seed, device=device)
    found = measure(model, (batch.to(device) for batch in batches(0)), config)
    result = found | {"images": config.num_images, "seed": config.seed, "tolerance": config.tolerance}
    result |= {"model": start.pretrained_teacher_model, "data": source_name(data), "hardware": hardware()}
    cells = [f"{found['bits_per_dimension']:.3f} +- {found['standard_error']:.3f}", found["of"], found["evaluations"]]
    lines = ["| bits per dimension | of | evaluations of the network |", "| ---: | --- | ---: |"]
    table = "\n".join([*lines, f"| {' | '.join(map(str, cells))} |"])
    note = f"{config.num_images} images, seed {config.seed}; {result['hardware']}."
    write_table(Path(config.output_dir), f"{table}\n\n{note}\n", json.dumps(result, indent=2) + "\n")
    print(table)


if __name__ == "__main__":
    run(main)
