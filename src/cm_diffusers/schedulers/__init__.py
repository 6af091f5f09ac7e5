"""Samplers for consistency models, with diffusers' scheduler interface."""

from cm_diffusers.schedulers.scheduling_consistency import ConsistencyScheduler, ConsistencySchedulerOutput
from cm_diffusers.schedulers.scheduling_edm_consistency import EDMConsistencyScheduler


__all__ = ["ConsistencyScheduler", "ConsistencySchedulerOutput", "EDMConsistencyScheduler"]
