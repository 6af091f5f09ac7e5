"""How a checkpoint wants to be sampled: from its record, or from what the checkpoint itself shows."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import SchedulerMixin
from torch import nn

from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import family_of
from cm_diffusers.models.target_input import knows_target
from cm_diffusers.record import Record
from cm_diffusers.schedulers.scheduling_consistency import ConsistencyScheduler
from cm_diffusers.schedulers.scheduling_edm_consistency import EDMConsistencyScheduler
from cm_diffusers.schedulers.scheduling_trigflow_consistency import TrigFlowConsistencyScheduler


FEW_STEP_SCHEDULERS = (
    "ConsistencyScheduler",
    "EDMConsistencyScheduler",
    "TrigFlowConsistencyScheduler",
    "FlowConsistencyScheduler",
    "SCMScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
IN_SIGMA = {  # of students that know noise levels -> what samples as it says
    "EDMConsistencyScheduler": EDMConsistencyScheduler,
    "CMStochasticIterativeScheduler": EDMConsistencyScheduler,
    "TrigFlowConsistencyScheduler": TrigFlowConsistencyScheduler,
    "SCMScheduler": TrigFlowConsistencyScheduler,
}
GRID_FIELDS = (
    "prediction_type",
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
    "original_inference_steps",
    "timestep_scaling",
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "boundary_scalings",
    "network",
    "shift",
)
TCD_GAMMA = 0.3  # TCDScheduler's own default (2402.19159)
LCM_GUIDANCE_SCALE = 8.0  # the LCM paper's evaluations (2310.04378)
LCM_STEPS = 4
BURNS_ABOVE = 2.0


@dataclass(frozen=True)
class Manners:
    """What may be asked of a student; guidance scales are in the convention of records, 1 is none.

    Attributes:
        guidance: As in `Record`.
        lowest, highest: Guidance scales an embedded student was trained with; None where nothing tells.
        guidance_scale, num_inference_steps: What to sample with unless the caller says otherwise.
        guided: As in `Family`: what callers give for a scale, which messages name.
        target_dim: As in `Record`.
        one_step: As in `Record`.
    """

    guidance: str
    lowest: float | None
    highest: float | None
    guidance_scale: float
    num_inference_steps: int
    guided: Callable[[float], Mapping[str, float | str]] = field(compare=False, repr=False)
    target_dim: int | None = None
    one_step: bool = False

    @classmethod
    def of(cls, record: Record | None, network: nn.Module) -> "Manners":
        guided = family_of(_whole(network)).guided
        if record is not None and contradiction(record, network) is None:
            scales = (record.w_min + 1, record.w_max + 1, record.recommended_guidance_scale)
            steps, told = record.recommended_num_inference_steps, (guided, record.target_dim, record.one_step)
            return cls(record.guidance, *scales, steps, *told)
        if _embeds(network):
            return cls("embedded", None, None, LCM_GUIDANCE_SCALE, LCM_STEPS, guided)
        return cls("distilled", None, None, 1.0, LCM_STEPS, guided)

    def check(self, guidance_scale: float, negative: bool) -> None:
        """Warns of or refuses what the student was not made for.

        Args:
            guidance_scale: The caller's, in the convention of records.
            negative: Whether a negative prompt was given.

        Raises:
            ValueError: The student has no branch for it.
        """
        if self.guidance == "embedded":
            self._check_embedded(guidance_scale, negative)
        elif self.guidance == "none":
            if guidance_scale > 1 or negative:
                raise UserError(
                    f"This student was distilled without guidance and takes neither {self._argument} above "
                    f"{self._told(1)} (found {self._told(guidance_scale)}) nor a negative prompt; leave both out."
                )
        else:
            self._check_distilled(guidance_scale, negative)

    @property
    def _argument(self) -> str:
        return next(iter(self.guided(1.0)))

    def _told(self, scale: float) -> str:
        """A guidance scale as callers give it."""
        return f"{self.guided(scale)[self._argument]:g}"

    def check_way(self, steps: int | None, from_noise: bool) -> None:
        """
        Args:
            steps: The caller's; None where the scheduler or the record decides.
            from_noise: Whether sampling starts from pure noise.

        Raises:
            ValueError: The student knows only the one step from pure noise to the data.
        """
        if self.one_step and not from_noise:
            raise UserError(
                "This student makes images of pure noise alone, in one step: it cannot change an image that it is given; use "
                "it as text to image, or another student for this."
            )
        if self.one_step and steps not in (None, 1):
            raise UserError(
                f"This student makes its images in one step, which no other can follow: leave the number of steps out or give 1, "
                f"not {steps}."
            )

    def _check_embedded(self, guidance_scale: float, negative: bool) -> None:
        if negative:
            raise UserError(
                "This student takes guidance as a number and has no unconditional branch, so a negative prompt cannot "
                "act; leave it out (of Stable Diffusion, an LCM-LoRA on its base model takes one)."
            )
        if self.lowest is not None and not self.lowest <= guidance_scale <= self.highest:
            warnings.warn(
                f"{self._argument} {self._told(guidance_scale)} is outside the {self._told(self.lowest)} to "
                f"{self._told(self.highest)} that this student was trained with; expect worse images.",
                stacklevel=7,
            )

    def _check_distilled(self, guidance_scale: float, negative: bool) -> None:
        if guidance_scale > max(BURNS_ABOVE, self.guidance_scale):
            warnings.warn(
                f"{self._argument} {self._told(guidance_scale)} adds to the guidance that is in this student's weights and "
                f"burns the images; use {self._told(1)} to {self._told(BURNS_ABOVE)}.",
                stacklevel=7,
            )
        if negative and guidance_scale <= 1:
            warnings.warn(
                f"The negative prompt has no effect at {self._argument} {self._told(guidance_scale)}; raise it a little above "
                f"{self._told(1)}.",
                stacklevel=7,
            )


def _whole(network: nn.Module) -> nn.Module:
    return getattr(network, "_orig_mod", network)  # of a compiled one


def _embeds(network: nn.Module, target_dim: int | None = None) -> bool:
    """Whether guidance is an input, beside another one of this size if there is that."""
    network = _whole(network)
    told = family_of(network).guidance(network) == "embedded"
    return told and (target_dim is None or network.config.time_cond_proj_dim > target_dim)


def contradiction(record: Record, network: nn.Module) -> str | None:
    """How the record contradicts the network about its inputs, on which the network decides; None if it does not."""
    if record.target_dim is not None and not knows_target(network):
        return "The record says that the network is told where each step goes, but this network has no input for that"
    embeds = _embeds(network, record.target_dim)
    if embeds == (record.guidance == "embedded"):
        return None
    takes = "takes guidance as an embedding" if embeds else "takes no embedding of guidance"
    return f"The record says that guidance is {record.guidance!r}, but this network {takes}"


def refuse_contradiction(source: object, record: Record, network: nn.Module) -> None:
    """
    Raises:
        ValueError: The record that lies beside the network does not fit it.
    """
    if reason := contradiction(record, network):
        raise UserError(f"{source} is not as it was published: {reason[0].lower()}{reason[1:]}; get it anew.")


def consistency_scheduler(class_name: str, config: Mapping[str, Any]) -> ConsistencyScheduler:
    """The scheduler that samples as `class_name` with `config` does, or would, if it was for many steps.

    Every field is handed on, also those that the other scheduler left at its default. The result bears a mark, see
    `adopted_from`.
    """
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    if class_name == "TCDScheduler":
        fields = {"gamma": TCD_GAMMA, "boundary_scalings": "none", **fields}
    if class_name not in FEW_STEP_SCHEDULERS:
        fields["clip_sample"] = False  # DDIM's default is for pixels; Stable Diffusion's pipelines switch it off, too
    scheduler = ConsistencyScheduler.from_config(fields)
    scheduler._adopted_from = class_name
    return scheduler


def adopted_from(scheduler: SchedulerMixin) -> str | None:
    """The class that a scheduler was made from by `consistency_scheduler`; None if it is the caller's own."""
    return getattr(scheduler, "_adopted_from", None)


def tells_of_distillation(scheduler: SchedulerMixin) -> bool:
    """Whether it is, or was made from, a scheduler for few steps."""
    return (adopted_from(scheduler) or type(scheduler).__name__) in FEW_STEP_SCHEDULERS


def mismatches(scheduler: SchedulerMixin, record: Record | None) -> list[str]:
    """What of a scheduler contradicts the record, each as one phrase with both values."""
    kind = type(scheduler).__name__
    found = [] if kind in FEW_STEP_SCHEDULERS else [f"{kind} is not a consistency scheduler"]
    for name in GRID_FIELDS if record is not None else ():
        if name in record.scheduler and name in scheduler.config:
            ours, theirs = scheduler.config[name], record.scheduler[name]
            if ours != theirs:
                found.append(f"{name} is {ours!r}, in training it was {theirs!r}")
    return found
