"""Train a consistency model from images alone: iCT (2310.14189), in pixels or latents, with classes or without."""

import cm_diffusers.engine.early

from accelerate import PartialState

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.objectives.ict import ICTConfig, ICTObjective
from cm_diffusers.tasks.image_models import NEW_MODEL_CONFIGS, NewModelConfig, new_image_model
from cm_diffusers.tasks.image_runs import SHARED_CONFIGS, ResultConfig, student_scheduler, train_images
from cm_diffusers.types import Networks


CONFIGS = (NewModelConfig, ICTConfig, *SHARED_CONFIGS)


def main() -> None:
    configs = parse_configs(CONFIGS, __doc__)
    given = dict(zip(CONFIGS, configs, strict=True))
    method = given[ICTConfig]
    seed_everything(given[TrainConfig].seed)
    model = new_image_model(*(given[kind] for kind in NEW_MODEL_CONFIGS), PartialState().device)
    objective = ICTObjective(method, model.view)
    scheduler = student_scheduler(model, method, given[ResultConfig], "cm", method.discretization_s_1 + 1)
    train_images("ict", model, Networks(model.network), objective, scheduler, configs)


if __name__ == "__main__":
    run(main)
