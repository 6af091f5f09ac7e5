"""Train a consistency model from images alone, with the curriculum of the first paper: CT (2303.01469)."""

import cm_diffusers.engine.early

from accelerate import PartialState

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.models.students import frozen_copy
from cm_diffusers.objectives.ct import CTConfig, CTObjective
from cm_diffusers.tasks.image_models import NEW_MODEL_CONFIGS, NewModelConfig, new_image_model
from cm_diffusers.tasks.image_runs import SHARED_CONFIGS, ResultConfig, student_scheduler, train_images
from cm_diffusers.types import Networks


CONFIGS = (NewModelConfig, CTConfig, *SHARED_CONFIGS)


def main() -> None:
    configs = parse_configs(CONFIGS, __doc__)
    given = dict(zip(CONFIGS, configs, strict=True))
    method = given[CTConfig]
    seed_everything(given[TrainConfig].seed)
    model = new_image_model(*(given[kind] for kind in NEW_MODEL_CONFIGS), PartialState().device)
    objective = CTObjective(method, model.view)
    nets = Networks(model.network, target=frozen_copy(model.network))
    scheduler = student_scheduler(model, method, given[ResultConfig], "cm", method.discretization_s_1 + 1)
    train_images("ct", model, nets, objective, scheduler, configs)


if __name__ == "__main__":
    run(main)
