"""Train a consistency model from images alone, best in a VAE's latents: sLCT (2502.01441)."""

import cm_diffusers.engine.early
from dataclasses import dataclass

from accelerate import PartialState
from transformers.hf_argparser import HfArg

from cm_diffusers.data.sources import DataConfig
from cm_diffusers.diffusion.coupling import check_batch
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.objectives.slct import SLCTConfig, SLCTObjective, freeze_norm_scales
from cm_diffusers.tasks.image_models import NEW_MODEL_CONFIGS, NewModelConfig, new_image_model
from cm_diffusers.tasks.image_runs import SHARED_CONFIGS, ResultConfig, student_scheduler, train_images
from cm_diffusers.types import Networks


@dataclass
class NormConfig:
    """Norm layers of the network."""

    norm_scales: bool = HfArg(default=False, help="Norm layers keep their trainable scale, which sLCT takes away.")


CONFIGS = (NewModelConfig, NormConfig, SLCTConfig, *SHARED_CONFIGS)


def main() -> None:
    configs = parse_configs(CONFIGS, __doc__)
    given = dict(zip(CONFIGS, configs, strict=True))
    method = given[SLCTConfig]
    if method.coupling == "ot":
        check_batch(given[DataConfig].train_batch_size)
    seed_everything(given[TrainConfig].seed)
    model = new_image_model(*(given[kind] for kind in NEW_MODEL_CONFIGS), PartialState().device)
    objective = SLCTObjective(method, model.view)
    if not given[NormConfig].norm_scales:
        freeze_norm_scales(model.network)
    scheduler = student_scheduler(model, method, given[ResultConfig], "cm", method.discretization_s_1 + 1)
    train_images("slct", model, Networks(model.network), objective, scheduler, configs)


if __name__ == "__main__":
    run(main)
