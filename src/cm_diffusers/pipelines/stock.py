"""Our schedulers and pipelines as diffusers alone loads them: stock classes, in whose configs our own fields ride."""

import inspect
from typing import Any

from diffusers import (
    CMStochasticIterativeScheduler,
    ConfigMixin,
    DiffusionPipeline,
    LCMScheduler,
    SchedulerMixin,
    SCMScheduler,
    TCDScheduler,
)

from cm_diffusers.schedulers.scheduling_consistency import ConsistencyScheduler
from cm_diffusers.schedulers.scheduling_edm_consistency import EDMConsistencyScheduler
from cm_diffusers.schedulers.scheduling_trigflow_consistency import TrigFlowConsistencyScheduler


def _parameters(kind: type[ConfigMixin]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(kind).parameters)


CARRIERS = {  # of all our fields
    EDMConsistencyScheduler: CMStochasticIterativeScheduler,
    TrigFlowConsistencyScheduler: SCMScheduler,
}


class CarriedSchedulerMixin:
    """Samples with a scheduler of ours where a stock one carries its fields."""

    def register_modules(self, **modules: Any) -> None:
        """As in diffusers; a stock scheduler that carries our fields would sample by its own alone, and becomes ours."""
        scheduler = modules.get("scheduler")
        for ours, stock in CARRIERS.items():
            carried = set(_parameters(ours)) - set(_parameters(stock))
            if isinstance(scheduler, stock) and set(scheduler.config) & carried:
                modules["scheduler"] = ours.from_config(scheduler.config)
        super().register_modules(**modules)


def stock_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The stock scheduler nearest to one of ours, with every field in its config; another one as it is."""
    if type(scheduler) in CARRIERS:
        return _carrying(CARRIERS[type(scheduler)], scheduler, True)
    if not isinstance(scheduler, ConsistencyScheduler):
        return scheduler
    kind = LCMScheduler if scheduler.config.boundary_scalings == "lcm" else TCDScheduler
    own = {
        name: one.default for name, one in _parameters(ConsistencyScheduler).items() if name not in _parameters(kind)
    }
    return _carrying(kind, scheduler, kind is TCDScheduler or not own.items() <= scheduler.config.items())


def _carrying(kind: type[SchedulerMixin], scheduler: SchedulerMixin, whole: bool) -> SchedulerMixin:
    """
    Args:
        whole: Also the fields that `kind` does not know; diffusers warns of them.
    """
    known, own = _parameters(kind), _parameters(type(scheduler))
    fields = {name: value for name, value in scheduler.config.items() if name in known or name in own}
    stock = kind(**{name: value for name, value in fields.items() if name in known})
    if whole:
        stock.register_to_config(**fields)
    return stock


def stock_index(index: dict[str, Any], kind: type[DiffusionPipeline]) -> dict[str, Any]:
    """The content of `model_index.json` as a stock class writes it."""
    modules, options = kind._get_signature_keys(kind)
    known = {name: value for name, value in index.items() if name in modules or name in options or name[0] == "_"}
    return known | {"_class_name": kind.__name__}
