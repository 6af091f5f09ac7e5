"""Distil a diffusion model into a consistency model: CD (2303.01469), of images alone, of classes or of text."""

import cm_diffusers.engine.early

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.models.dropout import DropoutConfig
from cm_diffusers.models.students import frozen_copy
from cm_diffusers.objectives.cd import CDConfig, CDObjective
from cm_diffusers.tasks.image_models import StartConfig, load_image_model
from cm_diffusers.tasks.image_runs import (
    SHARED_CONFIGS,
    ResultConfig,
    boundary_of,
    student_scheduler,
    train_images,
    trainable_copy,
)
from cm_diffusers.tasks.teachings import guiding_of
from cm_diffusers.tasks.text_to_image_checks import warn_of_guidance
from cm_diffusers.types import Networks


CONFIGS = (StartConfig, CDConfig, *SHARED_CONFIGS)


def main() -> None:
    configs = parse_configs(CONFIGS, __doc__)
    given = dict(zip(CONFIGS, configs, strict=True))
    method = given[CDConfig]
    seed_everything(given[TrainConfig].seed)
    warn_of_guidance(given[StartConfig].pretrained_teacher_model, method.w)
    model = load_image_model(given[StartConfig])
    boundary, guiding = boundary_of(model), guiding_of(model, model.view.told)
    objective = CDObjective(method, model.view, guiding=guiding, boundary=boundary)
    student = trainable_copy(model.network, given[DropoutConfig])
    nets = Networks(student, target=frozen_copy(student), teacher=model.network)
    scheduler = student_scheduler(model, method, given[ResultConfig], boundary, method.num_scales)
    train_images("cd", model, nets, objective, scheduler, configs, (method.w, method.w))


if __name__ == "__main__":
    run(main)
