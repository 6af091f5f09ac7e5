"""Train a diffusion model of images without captions (EDM, 2206.00364): what CD distils and ECT tunes."""

import cm_diffusers.engine.early

from accelerate import PartialState

from cm_diffusers.diffusion.times import karras_grid
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.objectives.edm import EDMConfig, EDMObjective
from cm_diffusers.tasks.image_models import NEW_MODEL_CONFIGS, NewModelConfig, new_image_model
from cm_diffusers.tasks.image_runs import SHARED_CONFIGS, ResultConfig, student_scheduler, train_images
from cm_diffusers.types import Networks


STEPS, GRID = 35, 1000  # of sampling as recommended; points that other numbers of steps refer to
CONFIGS = (NewModelConfig, EDMConfig, *SHARED_CONFIGS)


def main() -> None:
    configs = parse_configs(CONFIGS, __doc__)
    given = dict(zip(CONFIGS, configs, strict=True))
    method = given[EDMConfig]
    seed_everything(given[TrainConfig].seed)
    model = new_image_model(*(given[kind] for kind in NEW_MODEL_CONFIGS), PartialState().device)
    objective = EDMObjective(method, model.view)
    sigmas = karras_grid(STEPS, method.sigma_min, method.sigma_max, method.rho).flip(0).tolist()
    # without fresh noise these are Euler steps of the probability flow
    scheduler = student_scheduler(model, method, given[ResultConfig], "edm", GRID, sigmas, gamma=0.0)
    train_images("edm", model, Networks(model.network), objective, scheduler, configs)


if __name__ == "__main__":
    run(main)
