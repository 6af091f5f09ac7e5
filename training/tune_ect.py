"""Tune a diffusion model into a consistency model: ECT (2406.14548), of images alone, of classes or of text."""

import cm_diffusers.engine.early

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.models.dropout import DropoutConfig
from cm_diffusers.objectives.ect import ECTConfig, ECTObjective
from cm_diffusers.tasks.image_models import StartConfig, load_image_model
from cm_diffusers.tasks.image_runs import SHARED_CONFIGS, ResultConfig, student_scheduler, train_images, trainable_copy
from cm_diffusers.tasks.teachings import guiding_of
from cm_diffusers.types import Networks


GRID = 40  # points for numbers of steps to refer to: ECT itself has no grid


CONFIGS = (StartConfig, ECTConfig, *SHARED_CONFIGS)


def main() -> None:
    configs = parse_configs(CONFIGS, __doc__)
    given = dict(zip(CONFIGS, configs, strict=True))
    method = given[ECTConfig]
    seed_everything(given[TrainConfig].seed)
    model = load_image_model(given[StartConfig])
    objective = ECTObjective(method, model.view, guiding_of(model, model.view.told))
    nets = Networks(trainable_copy(model.network, given[DropoutConfig]))
    scheduler = student_scheduler(model, method, given[ResultConfig], "edm", GRID)
    train_images("ect", model, nets, objective, scheduler, configs)


if __name__ == "__main__":
    run(main)
