"""What the training scripts of models that know noise levels share: from networks and objective to a published folder."""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from transformers.hf_argparser import HfArg

from cm_diffusers.data.sources import DataConfig, source_name
from cm_diffusers.diffusion.views import FlowView
from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.errors import UserError
from cm_diffusers.models.classes import classes_of
from cm_diffusers.models.critics import CriticConfig
from cm_diffusers.models.dropout import DropoutConfig, set_dropout
from cm_diffusers.models.families.base import family_of, network_of
from cm_diffusers.models.students import HALF, StudentNetworkConfig
from cm_diffusers.models.teachers import release_encoders
from cm_diffusers.models.time_weight import without_weight
from cm_diffusers.objectives.scm import SCDConfig, SCMConfig
from cm_diffusers.publishing.hub import HubConfig, check_hub
from cm_diffusers.publishing.images import images_record
from cm_diffusers.publishing.images import network_of as settings_of
from cm_diffusers.publishing.pipelines import save_lora, save_pipeline
from cm_diffusers.publishing.provenance import Provenance, describe_run
from cm_diffusers.schedulers import EDMConsistencyScheduler, FlowConsistencyScheduler, TrigFlowConsistencyScheduler
from cm_diffusers.schedulers.stepping import ToldScheduler
from cm_diffusers.tasks.callbacks import ImageValidationConfig, image_grids
from cm_diffusers.tasks.image_models import ClassConfig, ImageModel, NewModelConfig, StartConfig
from cm_diffusers.tasks.publish import publish
from cm_diffusers.tasks.summary import announce
from cm_diffusers.tasks.text_to_image import critic_optim
from cm_diffusers.tasks.watching import WatchConfig, make_watch
from cm_diffusers.types import Networks


logger = logging.getLogger(__name__)
LEAST_OF_FLOWS = 80.0  # sigma_max of a flow's student: at least the time .988
SECOND_SIGMA = 0.821  # of two-step sampling of CIFAR-10 in iCT (2310.14189) and ECT (2406.14548)


WHAT_A_RUN_IS = (  # beside method and training
    StartConfig,
    NewModelConfig,
    SCDConfig,
    StudentNetworkConfig,
    DropoutConfig,
    ClassConfig,
    DataConfig,
    CriticConfig,
)


@dataclass
class ResultConfig:
    """How the result is sampled and stored."""

    recommended_sigmas: list[float] | None = HfArg(
        default=None,
        help="Noise levels that the result recommends to sample at, descending; a student's if not given: sigma_max and "
        f"{SECOND_SIGMA}.",
    )
    save_fp16: bool = HfArg(default=False, help=f"Store network and VAE, or the LoRA, in half precision: {HALF}.")


SHARED_CONFIGS = (
    DropoutConfig, ClassConfig, DataConfig, OptimConfig, TrainConfig, ImageValidationConfig, WatchConfig, ResultConfig,
    HubConfig,
)  # fmt: skip


def trainable_copy(unet: ModelMixin, dropout: DropoutConfig) -> nn.Module:
    student = copy.deepcopy(unet).requires_grad_(True).train()
    set_dropout(student, dropout)
    return student


def student_scheduler(
    model: ImageModel,
    method: Any,
    result: ResultConfig,
    boundary: str,
    num_scales: int,
    sigmas: Sequence[float] | None = None,
    gamma: float = 1.0,
) -> EDMConsistencyScheduler | FlowConsistencyScheduler:
    """How the result is sampled: as it was trained.

    Args:
        method: A config with sigma_min and sigma_max, and with rho where there is a grid.
        boundary: "cm" or "edm".
        num_scales: Points of the grid that numbers of steps refer to.
        sigmas: Noise levels to recommend if the flags name none; sigma_max and `SECOND_SIGMA` if not given.
        gamma: 1 for a consistency model; 0 makes a step Euler's, for a diffusion model with the boundary "edm".
    """
    levels = list(result.recommended_sigmas or sigmas or _two_levels(method))
    if isinstance(model.view, FlowView):
        return flow_scheduler(method.sigma_max, levels, gamma)
    return EDMConsistencyScheduler(
        num_train_timesteps=num_scales,
        sigma_min=method.sigma_min,
        sigma_max=method.sigma_max,
        rho=getattr(method, "rho", 7.0),
        clip_denoised=model.vae is None,
        boundary_scalings=boundary,
        gamma=gamma,
        recommended_sigmas=levels,
        **settings_of(model.view),
    )


def scm_scheduler(
    model: ImageModel, method: SCMConfig, result: ResultConfig
) -> TrigFlowConsistencyScheduler | FlowConsistencyScheduler:
    """How a student of sCM is sampled: as it was trained; one of many segments in a jump through each, without fresh noise.

    Raises:
        ValueError: It would be sampled in more or fewer jumps than it has segments.
    """
    count, d, given = method.segments, model.view.sigma_data, result.recommended_sigmas
    t_max = math.atan(method.sigma_max / d)
    borders = [method.sigma_max, *(d * math.tan(t_max * k / count) for k in range(count - 1, 0, -1))]
    if given and count > 1 and len(given) != count:
        raise UserError(
            f"A student of --segments {count} is sampled in as many jumps, but --recommended_sigmas names {len(given)}: "
            f"leave it out, or give {' '.join(f'{sigma:.4g}' for sigma in borders)}."
        )
    levels, gamma = given or (_two_levels(method) if count == 1 else borders), 1.0 if count == 1 else 0.0
    if isinstance(model.view, FlowView):
        return flow_scheduler(method.sigma_max, levels, gamma)
    return TrigFlowConsistencyScheduler(
        sigma_max=method.sigma_max,
        clip_denoised=model.vae is None and count == 1,  # a jump ends before the data
        gamma=gamma,
        recommended_sigmas=levels,
        **settings_of(model.view),
    )


def flow_scheduler(sigma_max: float, levels: Sequence[float], gamma: float) -> FlowConsistencyScheduler:
    """How the student of a flow is sampled in the stock pipelines: its jump is the denoised sample, x - t v.

    A level sigma is the time sigma / (1 + sigma). The first is told as 1, where the pipelines start: from noise alone, of
    which the exact jump makes the data. Told the time of sigma_max instead, 1 - t of that noise would be taken for data.

    Args:
        sigma_max: Most noise of the training, in EDM's coordinates.
        levels: Descending from it.
        gamma: As for `student_scheduler`.

    Raises:
        ValueError: The training ends too far below pure noise, or the levels start elsewhere.
    """
    if sigma_max < LEAST_OF_FLOWS:
        raise UserError(
            f"--sigma_max {sigma_max} ends at the time {sigma_max / (1 + sigma_max):.3g} of the flow, but its pipelines start at "
            f"1, from noise alone: give at least {LEAST_OF_FLOWS:g}."
        )
    if levels[0] < LEAST_OF_FLOWS:
        raise UserError(
            f"--recommended_sigmas starts at {levels[0]}, but pipelines of a flow start from noise alone: begin with the "
            f"--sigma_max of {sigma_max}."
        )
    return FlowConsistencyScheduler(
        shift=1.0, gamma=gamma, recommended_sigmas=[1.0, *(sigma / (1 + sigma) for sigma in levels[1:])]
    )


def boundary_of(model: ImageModel) -> str:
    """Of a method on a grid: at sigma_min as in the paper; at 0 for a flow, whose pipelines take the denoised sample itself."""
    return "edm" if isinstance(model.view, FlowView) else "cm"


def _two_levels(method: Any) -> list[float]:
    second = [SECOND_SIGMA] if method.sigma_min < SECOND_SIGMA < method.sigma_max else []
    return [method.sigma_max, *second]


def train_images(
    name: str,
    model: ImageModel,
    nets: Networks,
    objective: Any,
    scheduler: ToldScheduler,
    configs: Sequence[object],
    w: tuple[float, float] = (0.0, 0.0),
) -> None:
    """Train, save `<output_dir>/pipeline`, or `lora`, with record and card, and push it where that was asked for.

    Args:
        name: Of the method, in the record.
        model: The start, and what is around the network.
        nets: To train.
        scheduler: Of the result.
        configs: The script's, for its flags and for the card; those of `SHARED_CONFIGS` among them.
        w: Least and greatest guidance that is distilled into a student of text, which recommends their mean where it is told.
    """
    given = {type(config): config for config in configs}
    classes, data, optim, train, validation, watch, result, hub = (given[kind] for kind in SHARED_CONFIGS[1:])
    if nets.target is None or hasattr(objective, "target_decay"):
        refuse_changed(train, "ema_decay", f"with {name}: it has no averaged target, or one on a schedule")
    repo_id = check_hub(hub, train.output_dir, train.report_to)
    resolution, (guidance, scale) = None if model.pipe is None else data.resolution, _guidance(model, nets, w)
    lora = StudentNetworkConfig in given and given[StudentNetworkConfig].lora
    if getattr(nets.student, "is_told_target", False):  # in one jump, too
        validation = replace(validation, validation_nfe=validation.validation_nfe or [1, 2, 4])

    def sampler(unet: nn.Module) -> DiffusionPipeline:
        return model.sampler(without_weight(unet), scheduler)

    grids = image_grids(validation, sampler, scheduler, resolution, scale)
    watching = make_watch(watch, sampler, scale, data.resolution)
    settings = [config for kind, config in given.items() if kind in WHAT_A_RUN_IS]
    if nets.critic is not None and CriticConfig in given:
        optim = {"student": optim, "critic": critic_optim(given[CriticConfig], optim)}
    trainer = Trainer(train, nets, objective, optim, settings, callbacks=[grids])
    batches = model.batches(data, classes, train.seed, *trainer.place)
    if lora and not (data.streaming or validation.validation_prompts or watch.stop_when):
        release_encoders(model.pipe)
    kind = "lora" if lora else "pipeline"
    watcher = watching(trainer)
    trainer.fit(announce(trainer, batches, configs, kind))
    base = given[StartConfig].pretrained_teacher_model if StartConfig in given else None
    known = None if model.pipe else classes_of(model.network)
    describe = partial(describe_run, configs, model.pipe, base, source_name(data), num_classes=known)

    def save(unet: nn.Module, folder: Path, provenance: Provenance) -> None:
        pipe, steps = model.pipeline(without_weight(unet), scheduler), len(scheduler.config.recommended_sigmas)
        record = images_record(name, base or "", guidance, w[0], pipe.scheduler, steps)
        record = replace(record, w_max=w[1], recommended_guidance_scale=scale, resolution=data.resolution)
        if lora:
            save_lora(network_of(pipe), folder, record, provenance, result.save_fp16)
        else:
            save_pipeline(pipe, folder, result.save_fp16, record, provenance)

    if address := publish(trainer, kind, configs, describe, save, repo_id, watcher):
        logger.info("Published: %s", address)


def _guidance(model: ImageModel, nets: Networks, w: tuple[float, float]) -> tuple[str, float]:
    """What guidance is to the student, as in `Record`, and the scale to sample it with."""
    if model.pipe is None:
        return "distilled" if w != (0.0, 0.0) else "none", 1.0
    student = without_weight(nets.student)
    if family_of(student).guidance(student) != "embedded":
        return "distilled", 1.0
    return "embedded", 1 + sum(w) / 2
