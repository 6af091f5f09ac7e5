"""Tune a diffusion model to be told TrigFlow's time (2503.09641, Sec. 3), of which continuous-time models are distilled."""

import cm_diffusers.engine.early
from dataclasses import replace

from cm_diffusers.diffusion.times import karras_grid
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.models.dropout import DropoutConfig
from cm_diffusers.objectives.time_rescaling import TimeRescalingConfig, TimeRescalingObjective
from cm_diffusers.tasks.image_models import StartConfig, load_image_model
from cm_diffusers.tasks.image_runs import SHARED_CONFIGS, ResultConfig, student_scheduler, train_images, trainable_copy
from cm_diffusers.types import Networks


STEPS, GRID = 35, 1000  # of sampling as recommended; points that other numbers of steps refer to
CONFIGS = (StartConfig, TimeRescalingConfig, *SHARED_CONFIGS)


def main() -> None:
    configs = parse_configs(CONFIGS, __doc__)
    given = dict(zip(CONFIGS, configs, strict=True))
    method = given[TimeRescalingConfig]
    seed_everything(given[TrainConfig].seed)
    model = load_image_model(given[StartConfig])
    objective = TimeRescalingObjective(method, model.view)
    student = trainable_copy(model.network, given[DropoutConfig])
    objective.prepare(student)
    nets = Networks(student, teacher=model.network)
    model = replace(model, view=objective.rescaled)
    sigmas = karras_grid(STEPS, method.sigma_min, method.sigma_max, method.rho).flip(0).tolist()
    scheduler = student_scheduler(model, method, given[ResultConfig], "edm", GRID, sigmas, gamma=0.0)
    train_images("edm", model, nets, objective, scheduler, configs)


if __name__ == "__main__":
    run(main)
