"""Samplers for consistency models, with diffusers' scheduler interface."""

from cm_diffusers.schedulers.scheduling_consistency import ConsistencyScheduler, ConsistencySchedulerOutput


__all__ = ["ConsistencyScheduler", "ConsistencySchedulerOutput"]
