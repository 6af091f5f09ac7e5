"""Train a continuous-time consistency model from images alone: sCT (2410.11081), in pixels or latents."""

import cm_diffusers.engine.early

from accelerate import PartialState

from cm_diffusers.diffusion.trigflow import TrigFlowView
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.models.time_weight import WithTimeWeight
from cm_diffusers.objectives.scm import SCMConfig, SCMObjective
from cm_diffusers.tasks.image_models import NEW_MODEL_CONFIGS, NewModelConfig, new_image_model
from cm_diffusers.tasks.image_runs import SHARED_CONFIGS, ResultConfig, scm_scheduler, train_images
from cm_diffusers.types import Networks


CONFIGS = (NewModelConfig, SCMConfig, *SHARED_CONFIGS)


def main() -> None:
    configs = parse_configs(CONFIGS, __doc__)
    given = dict(zip(CONFIGS, configs, strict=True))
    method = given[SCMConfig]
    seed_everything(given[TrainConfig].seed)
    model = new_image_model(*(given[kind] for kind in NEW_MODEL_CONFIGS), PartialState().device)
    objective = SCMObjective(method, TrigFlowView.of(model.view))
    nets = Networks(WithTimeWeight(model.network) if method.learned_weight else model.network)
    scheduler = scm_scheduler(model, method, given[ResultConfig])
    train_images("sct", model, nets, objective, scheduler, configs)


if __name__ == "__main__":
    run(main)
