"""Published consistency models without a record: what scheduler and network tell of how they were made."""

from dataclasses import replace

from diffusers import DiffusionPipeline, LCMScheduler, SanaSprintPipeline, UNet2DConditionModel

from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import network_of
from cm_diffusers.pipelines.manners import Manners
from cm_diffusers.publishing.pipelines import lcm_record, scheduler_entry
from cm_diffusers.record import Record


PAPER_RANGES = {"embedded": (2.0, 14.0), "distilled": (6.5, 6.5)}  # of w: 2310.04378 and 2311.05556
SPRINT_RANGE = (3.0, 4.0)  # of w: guidance scales 4, 4.5 and 5 (2503.09641)
SPRINT_SCALE, SPRINT_STEPS = 4.5, 2


def inferred_record(path: str, pipe: DiffusionPipeline) -> Record:
    """The record of a latent consistency model of Stable Diffusion, or of SANA-Sprint.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(pipe, SanaSprintPipeline):
        return _of_sprint(path, pipe)
    network, scheduler = network_of(pipe), pipe.scheduler
    manners = Manners.of(None, network)
    is_told = isinstance(network, UNet2DConditionModel) and manners.guidance == "embedded"
    if not (is_told or isinstance(scheduler, LCMScheduler)):
        raise UserError(
            f"{path} is a {type(pipe).__name__} with {type(scheduler).__name__} and no record: nothing says that it is "
            "a latent consistency model; make one with distill_lcm.py first."
        )
    record = lcm_record(
        path,
        manners.guidance,
        *PAPER_RANGES[manners.guidance],
        manners.guidance_scale,
        scheduler if isinstance(scheduler, LCMScheduler) else LCMScheduler.from_config(scheduler.config),
    )
    return replace(record, recommended_num_inference_steps=manners.num_inference_steps)


def _of_sprint(path: str, pipe: SanaSprintPipeline) -> Record:
    """Its own pipeline samples it with its own scheduler, whose times are not shifted."""
    return Record("scm", path, "embedded", *SPRINT_RANGE, SPRINT_SCALE, SPRINT_STEPS, scheduler_entry(pipe.scheduler))
