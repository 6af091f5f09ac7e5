"""Distil a diffusion model into a continuous-time consistency model: sCD (2410.11081), a full network or a LoRA (--lora)."""

import cm_diffusers.engine.early

from cm_diffusers.diffusion.trigflow import TrigFlowView
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.models.students import StudentNetworkConfig
from cm_diffusers.objectives.scm import SCDConfig, SCMConfig, SCMObjective
from cm_diffusers.tasks.image_models import StartConfig, load_image_model
from cm_diffusers.tasks.image_runs import SHARED_CONFIGS, ResultConfig, scm_scheduler, train_images
from cm_diffusers.tasks.scd import check_flags, check_model, guidance_embedding_dim, student_and_teacher
from cm_diffusers.tasks.teachings import guiding_of
from cm_diffusers.tasks.text_to_image_checks import warn_of_guidance


CONFIGS = (StartConfig, SCMConfig, SCDConfig, StudentNetworkConfig, *SHARED_CONFIGS)


def main() -> None:
    configs = parse_configs(CONFIGS, __doc__)
    start, method, taught, student, dropout, *_ = configs
    given = dict(zip(CONFIGS, configs, strict=True))
    train, w = given[TrainConfig], (taught.w_min, taught.w_max)
    check_flags(student, method, taught, train)
    seed_everything(train.seed)
    warn_of_guidance(start.pretrained_teacher_model, taught.w_max)
    model = load_image_model(start)
    check_model(model, student, taught)
    dim, view = guidance_embedding_dim(student, taught, model), TrigFlowView.of(model.view)
    objective = SCMObjective(method, view, w, guiding_of(model, view.told, dim), taught.dmd_weight)
    nets = student_and_teacher(model, student, dropout, dim, method.learned_weight, taught.dmd_weight > 0)
    scheduler = scm_scheduler(model, method, given[ResultConfig])
    train_images("scd", model, nets, objective, scheduler, configs, w)


if __name__ == "__main__":
    run(main)
