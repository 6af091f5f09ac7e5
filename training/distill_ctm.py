"""Distil a diffusion model without prompts into a consistency trajectory model: CTM (2310.02279), jumps to any noise level."""

import cm_diffusers.engine.early

import torch

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.models.critics import CriticConfig, make_view_critic
from cm_diffusers.models.dropout import DropoutConfig
from cm_diffusers.models.recomputation import recompute_activations
from cm_diffusers.models.students import frozen_copy
from cm_diffusers.models.with_target import with_target
from cm_diffusers.objectives.ctm import CTMConfig, CTMObjective
from cm_diffusers.tasks.image_models import StartConfig, load_image_model
from cm_diffusers.tasks.image_runs import (
    SHARED_CONFIGS,
    ResultConfig,
    student_scheduler,
    train_images,
    trainable_copy,
)
from cm_diffusers.tasks.text_to_image_checks import check_adversary
from cm_diffusers.types import Networks


CONFIGS = (StartConfig, CTMConfig, CriticConfig, *SHARED_CONFIGS)


def main() -> None:
    configs = parse_configs(CONFIGS, __doc__)
    given = dict(zip(CONFIGS, configs, strict=True))
    method, judge = given[CTMConfig], given[CriticConfig]
    check_adversary(method, judge, given[TrainConfig].max_train_steps)
    seed_everything(given[TrainConfig].seed)
    model = load_image_model(given[StartConfig])
    student = trainable_copy(with_target(model.network), given[DropoutConfig])
    critic = make_view_critic(model.network, model.view, judge)
    nets = Networks(student, target=frozen_copy(student), teacher=model.network, critic=critic)
    if given[TrainConfig].gradient_checkpointing:
        recompute_activations(nets.target)  # which the gradient passes through, too
    torch._functorch.config.donated_buffer = False  # of compiled networks, which it passes through twice
    objective = CTMObjective(method, model.view, critic=critic is not None)
    scheduler = student_scheduler(model, method, given[ResultConfig], "edm", method.num_scales, gamma=0.0)
    train_images("ctm", model, nets, objective, scheduler, configs)


if __name__ == "__main__":
    run(main)
