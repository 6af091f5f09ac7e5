"""What objectives of latent consistency are told of a teacher or a student, whatever its family."""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from diffusers import DiffusionPipeline, SanaSprintPipeline, SchedulerMixin
from torch import Tensor, nn

from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.diffusion.teaching import Guiding, Teaching, Told, embedded_in_time, flow_teaching, vp_teaching
from cm_diffusers.diffusion.times import Phases, solver_grid
from cm_diffusers.diffusion.views import FlowView
from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import family_of, network_of
from cm_diffusers.models.target_input import check_takes_target
from cm_diffusers.publishing.pipelines import lcm_scheduler, tcd_scheduler
from cm_diffusers.schedulers.scheduling_flow_consistency import FlowConsistencyScheduler
from cm_diffusers.schedulers.scheduling_trigflow_consistency import TrigFlowConsistencyScheduler
from cm_diffusers.tasks.image_models import ImageModel


class OnGrid(Protocol):
    """The config of a method that is sampled on a grid of times; with `timestep_scaling_factor`, if its jumps have scalings."""

    num_ddim_timesteps: int
    shift: float | None


class OfTrajectories(OnGrid, Protocol):
    """That of a method whose jumps end anywhere: it is sampled with this gamma, and where it has phases at their starts."""

    gamma: float
    phases: int | None


def teaching_of(
    teacher: DiffusionPipeline, guidance_embedding_dim: int | None, method: OnGrid, target_dim: int | None = None
) -> Teaching:
    """
    Args:
        guidance_embedding_dim: Of the student's own embedding; None where it has none, or has the teacher's.
        target_dim: Of the embedding of where a jump ends; None for a student that is not told.

    Raises:
        ValueError: A flag is for teachers of another kind, or a shift is missing.
    """
    if target_dim is not None:
        check_takes_target(network_of(teacher))
    return replace(_teaching_of(teacher, guidance_embedding_dim, method), target_dim=target_dim)


def _teaching_of(teacher: DiffusionPipeline, guidance_embedding_dim: int | None, method: OnGrid) -> Teaching:
    network = network_of(teacher)
    family = family_of(network)
    process, points = family.process(teacher), method.num_ddim_timesteps
    if isinstance(process, DiscreteVP):
        refuse_changed(method, "shift", "for a teacher that is no flow")
        prediction_type = family.prediction_type(teacher)
        return vp_teaching(process, prediction_type, guidance_embedding_dim, points, scaling_of(method))
    refuse_changed(method, "timestep_scaling_factor", "for a teacher of a flow, whose jump needs no scalings")
    shift, kind = method.shift or shift_of(teacher.scheduler), family.guidance(network)
    told = family.told(network) if kind == "embedded" or guidance_embedding_dim is not None else None
    return flow_teaching(family.call, shift, points, Guiding(kind, told, family.combine))


def guiding_of(
    model: ImageModel, flow_time: Callable[[Tensor], Tensor], guidance_embedding_dim: int | None = None
) -> Guiding:
    """How guidance reaches a teacher that is seen in other coordinates, and its student.

    Args:
        model: The teacher.
        flow_time: Times of these coordinates -> those of a flow, as its view tells them to the network.
        guidance_embedding_dim: As for `teaching_of`.
    """
    if not isinstance(model.view, FlowView):
        return Guiding(told=None if guidance_embedding_dim is None else embedded_in_time(guidance_embedding_dim))
    family = family_of(model.network)
    return Guiding(
        family.guidance(model.network),
        told_of(model.network),
        lambda text, without, w, t: family.combine(text, without, w, flow_time(t)),
    )


def teaching_of_student(student: DiffusionPipeline) -> Teaching:
    """Of a student on the grid of its scheduler."""
    network, config = network_of(student), student.scheduler.config
    family = family_of(network)
    process = family.process(student)
    if isinstance(process, DiscreteVP):
        grid = config.original_inference_steps, config.timestep_scaling
        return vp_teaching(process, family.prediction_type(student), network.config.time_cond_proj_dim, *grid)
    grid = config.get("shift", 1.0), config.get("original_inference_steps", 50)
    return flow_teaching(family.call, *grid, Guiding("none", told_of(network)))


def told_of(network: nn.Module) -> Told | None:
    """How a network is told its guidance; None where it is not."""
    family = family_of(network)
    return family.told(network) if family.guidance(network) == "embedded" else None


def loop_scheduler(student: DiffusionPipeline) -> SchedulerMixin:
    """What samples a student in a loop that only calls network and scheduler: SANA-Sprint's pipeline converts between them."""
    if not isinstance(student, SanaSprintPipeline):
        return student.scheduler
    flow = {"network": "flow", "prediction_type": "flow_prediction", "time_scale": 1.0}
    return TrigFlowConsistencyScheduler(sigma_data=1.0, **flow)


def scaling_of(method: OnGrid) -> float | None:
    """Of t in the scalings; None for a method whose jumps have none."""
    return getattr(method, "timestep_scaling_factor", None)


def student_scheduler(teacher: DiffusionPipeline, method: OnGrid) -> SchedulerMixin:
    """What samples a student as it is trained, on the teacher's times."""
    points, scaling = method.num_ddim_timesteps, scaling_of(method)
    family = family_of(network_of(teacher))
    process = family.process(teacher)
    if isinstance(process, DiscreteVP):
        if scaling is not None:
            return lcm_scheduler(teacher, points, scaling)
        grid = solver_grid(process.num_train_timesteps, points)
        return tcd_scheduler(teacher, points, method.gamma, starts_of(grid, method))
    options = {}
    if scaling is None:
        options["gamma"] = method.gamma
        if family.sigmas != "unknown" and (
            starts := starts_of(torch.arange(1, points + 1, dtype=torch.float64) / points, method)
        ):
            options["recommended_sigmas"] = starts
    shift = method.shift or shift_of(teacher.scheduler)
    return FlowConsistencyScheduler(shift=shift, original_inference_steps=points, **options)


def starts_of(grid: Tensor, method: OfTrajectories) -> list | None:
    """The times of a grid at which phases start, descending; None without phases."""
    if method.phases is None:
        return None
    before = torch.cat([grid.new_zeros(1), grid[:-1]])
    return Phases.of(grid, before, method.phases).starts.flip(0).tolist()


def shift_of(scheduler: SchedulerMixin) -> float:
    """Of a teacher's time grid, as its scheduler has it.

    Raises:
        ValueError: It depends on the size of the image.
    """
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        raise UserError(
            "The teacher shifts its times by the size of the image (use_dynamic_shifting of its scheduler), but a student has "
            "one grid: give --shift, e.g. 3.16 for 1024 pixels of Flux.1; docs/guides/flow_teachers.md has others."
        )
    return config.get("flow_shift") or config.get("shift") or 1.0
