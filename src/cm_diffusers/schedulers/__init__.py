"""Samplers for consistency models, with diffusers' scheduler interface."""

from cm_diffusers.schedulers.scheduling_consistency import ConsistencyScheduler
from cm_diffusers.schedulers.scheduling_edm_consistency import EDMConsistencyScheduler
from cm_diffusers.schedulers.scheduling_flow_consistency import FlowConsistencyScheduler
from cm_diffusers.schedulers.scheduling_trigflow_consistency import TrigFlowConsistencyScheduler
from cm_diffusers.schedulers.stepping import ConsistencySchedulerOutput


__all__ = [
    "ConsistencyScheduler",
    "ConsistencySchedulerOutput",
    "EDMConsistencyScheduler",
    "FlowConsistencyScheduler",
    "TrigFlowConsistencyScheduler",
]
