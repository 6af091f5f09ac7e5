"""Distil a diffusion model into a continuous-time consistency model: sCD (2410.11081), of images, classes or text."""

import cm_diffusers.engine.early

from cm_diffusers.diffusion.trigflow import TrigFlowView
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.trainer import TrainConfig
from cm_diffusers.models.dropout import DropoutConfig
from cm_diffusers.models.time_weight import WithTimeWeight
from cm_diffusers.objectives.scm import SCDConfig, SCMConfig, SCMObjective
from cm_diffusers.tasks.image_models import StartConfig, load_image_model
from cm_diffusers.tasks.image_runs import SHARED_CONFIGS, ResultConfig, scm_scheduler, train_images, trainable_copy
from cm_diffusers.types import Networks


CONFIGS = (StartConfig, SCMConfig, SCDConfig, *SHARED_CONFIGS)


def main() -> None:
    configs = parse_configs(CONFIGS, __doc__)
    given = dict(zip(CONFIGS, configs, strict=True))
    method, w = given[SCMConfig], given[SCDConfig].w
    seed_everything(given[TrainConfig].seed)
    model = load_image_model(given[StartConfig])
    objective = SCMObjective(method, TrigFlowView.of(model.view), (w, w))
    student = trainable_copy(model.unet, given[DropoutConfig])
    nets = Networks(WithTimeWeight(student) if method.learned_weight else student, teacher=model.unet)
    scheduler = scm_scheduler(model, method, given[ResultConfig])
    train_images("scd", model, nets, objective, scheduler, configs, w)


if __name__ == "__main__":
    run(main)
