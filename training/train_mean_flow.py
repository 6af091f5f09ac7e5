"""Train a mean flow from images alone (2505.13447), in pixels or latents: jumps between any two noise levels."""

import cm_diffusers.engine.early
from dataclasses import replace

from accelerate import PartialState

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.errors import UserError
from cm_diffusers.models.classes import ANY_CLASS
from cm_diffusers.models.dropout import DropoutConfig
from cm_diffusers.models.with_target import with_target
from cm_diffusers.objectives.mean_flow import MeanFlowConfig, MeanFlowObjective
from cm_diffusers.tasks.image_models import NEW_MODEL_CONFIGS, ClassConfig, NewModelConfig, new_image_model
from cm_diffusers.tasks.image_runs import (
    SHARED_CONFIGS,
    ResultConfig,
    student_scheduler,
    train_images,
    trainable_copy,
)
from cm_diffusers.types import Networks


CONFIGS = (NewModelConfig, MeanFlowConfig, *SHARED_CONFIGS)
GRID = 18  # points that numbers of steps refer to in sampling; training has none


def main() -> None:
    configs = parse_configs(CONFIGS, __doc__)
    given = dict(zip(CONFIGS, configs, strict=True))
    method, known = given[MeanFlowConfig], given[ClassConfig].num_classes
    if method.condition_dropout:
        if known is None:
            raise UserError(
                "--condition_dropout hides classes: give --num_classes and --label_column, or leave it out."
            )
    seed_everything(given[TrainConfig].seed)
    classes = replace(given[ClassConfig], num_classes=known + 1) if method.condition_dropout else given[ClassConfig]
    parts = given | {ClassConfig: classes}
    model = new_image_model(*(parts[kind] for kind in NEW_MODEL_CONFIGS), PartialState().device)
    if method.condition_dropout:
        model.network.register_to_config(**{ANY_CLASS: known})
    objective = MeanFlowObjective(method, model.view, known if method.condition_dropout else None)
    student = trainable_copy(with_target(model.network), given[DropoutConfig])
    scheduler = student_scheduler(model, method, given[ResultConfig], "edm", GRID, gamma=0.0)
    w = (1 + method.w) / (1 - method.guidance_mix) - 1
    train_images("mean_flow", model, Networks(student), objective, scheduler, configs, (w, w))


if __name__ == "__main__":
    run(main)
