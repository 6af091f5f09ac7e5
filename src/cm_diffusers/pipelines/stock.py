"""Our schedulers and pipelines as diffusers alone loads them: stock classes, in whose configs our own fields ride."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConfigMixin,
    DiffusionPipeline,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    SCMScheduler,
    TCDScheduler,
)

from cm_diffusers.models.families.base import Sigmas, family_of, network_of
from cm_diffusers.models.merged_text import silent_t5, silent_tokenizer
from cm_diffusers.schedulers.scheduling_consistency import ConsistencyScheduler
from cm_diffusers.schedulers.scheduling_edm_consistency import EDMConsistencyScheduler
from cm_diffusers.schedulers.scheduling_flow_consistency import FlowConsistencyScheduler
from cm_diffusers.schedulers.scheduling_trigflow_consistency import TrigFlowConsistencyScheduler


def _parameters(kind: type[ConfigMixin]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(kind).parameters)


CARRIERS = {  # of all our fields
    EDMConsistencyScheduler: CMStochasticIterativeScheduler,
    TrigFlowConsistencyScheduler: SCMScheduler,
}
PRIVATE_RECORD = "_record"  # field of a config of a class that does not know it, which diffusers passes over
CARRIERS_OF_FLOWS = (FlowMatchEulerDiscreteScheduler, FlowMapEulerDiscreteScheduler)  # see `stock_entry`


class CarriedSchedulerMixin:
    """Samples with a scheduler of ours where a stock one carries its fields."""

    def register_modules(self, **modules: Any) -> None:
        """As in diffusers; a stock scheduler that carries our fields would sample by its own alone, and becomes ours."""
        if (scheduler := modules.get("scheduler")) is not None:
            modules["scheduler"] = carried(scheduler)
        super().register_modules(**modules)


def carried(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler of ours whose fields a stock one carries; another one as it is."""
    for ours, stock in (*CARRIERS.items(), *((FlowConsistencyScheduler, kind) for kind in CARRIERS_OF_FLOWS)):
        own = set(_parameters(ours)) - set(_parameters(stock))
        if isinstance(scheduler, stock) and set(scheduler.config) & own:
            return ours.from_config(scheduler.config)
    return scheduler


def parts_of(kind: type[DiffusionPipeline], pipe: DiffusionPipeline) -> dict[str, Any]:
    """What a class is made with, as far as another pipeline knows it."""
    modules, options = kind._get_signature_keys(kind)
    parts, config = {name: getattr(pipe, name, None) for name in modules}, pipe.config
    # a stock pipeline that was made from another holds what it does not know under a private name
    return parts | {name: config[key] for name in options for key in (f"_{name}", name) if key in config}


@contextmanager
def saved_stock(pipe: DiffusionPipeline) -> Iterator[None]:
    """The pipeline with the stock scheduler that its folder names, and with a part in each place that must not be empty."""
    scheduler, silent = pipe.scheduler, _silent_parts(pipe)
    if isinstance(scheduler, FlowConsistencyScheduler):
        steps = len(scheduler.config.recommended_sigmas or [1.0])
        pipe.scheduler = stock_entry(scheduler, steps, family_of(network_of(pipe)).sigmas).scheduler
    else:
        pipe.scheduler = stock_scheduler(scheduler)
    pipe.register_modules(**silent)
    try:
        yield
    finally:
        pipe.scheduler = scheduler
        pipe.register_modules(**dict.fromkeys(silent))


def _silent_parts(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Of Stable Diffusion 3 without T5: diffusers loads no folder without one, unless it is told so."""
    if pipe.components.get("text_encoder_3", pipe) is not None:
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # equal pipelines are saved as equal files
        tower = silent_t5(network_of(pipe).config.joint_attention_dim)
    return {"text_encoder_3": tower, "tokenizer_3": silent_tokenizer()}


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


class StockEntry(NamedTuple):
    """How diffusers alone samples a student of a flow-matching teacher.

    Attributes:
        scheduler: A stock one with all our fields in its config.
        arguments: Of the stock pipeline's call.
    """

    scheduler: SchedulerMixin
    arguments: dict[str, Any]


def stock_entry(scheduler: FlowConsistencyScheduler, steps: int, sigmas: Sigmas) -> StockEntry:
    """What samples nearest to ours in so many steps: with the right times, but noise of its own, all fresh at any gamma
    above 0, and drawn at the last step, too.

    Left to itself `FlowMatchEulerDiscreteScheduler` shifts twice and ends at a time near 0. Its grid is right where u's are
    given; without, that of one step more is, to about .01, with a last evaluation that changes next to nothing.
    `FlowMapEulerDiscreteScheduler` shifts once, but adds no noise, and takes no `mu`.

    Args:
        sigmas: How the stock pipeline has the u's: it passes an even grid by itself, with a `mu` ("passed": Flux, Qwen-Image,
            Z-Image, Chroma, Lumina 2), leaves them to its caller ("accepted": SD3, Sana), or takes none ("unknown": Wan, whose
            students cannot keep `recommended_sigmas`).
    """
    recommended, stochastic = scheduler.config.recommended_sigmas or [], scheduler.config.gamma > 0
    even_is_right = sigmas == "passed" or not stochastic
    if sigmas == "passed" or stochastic:
        stock = _carrying(FlowMatchEulerDiscreteScheduler, scheduler, True, stochastic_sampling=stochastic)
    else:
        stock = _carrying(FlowMapEulerDiscreteScheduler, scheduler, True)
    if sigmas == "unknown":
        return StockEntry(stock, {"num_inference_steps": steps + (not even_is_right)})
    if len(recommended) == steps:
        return StockEntry(stock, {"sigmas": recommended})
    grid = {"num_inference_steps": steps} if even_is_right else {"sigmas": [1 - i / steps for i in range(steps)]}
    return StockEntry(stock, grid)


def _carrying(kind: type[SchedulerMixin], scheduler: SchedulerMixin, whole: bool, **settings: Any) -> SchedulerMixin:
    """
    Args:
        whole: Also the fields that `kind` does not know; diffusers warns of them.
        settings: Of `kind`, beside the fields.
    """
    known, own = _parameters(kind), _parameters(type(scheduler))
    fields = {name: value for name, value in scheduler.config.items() if name in known or name in own} | settings
    stock = kind(**{name: value for name, value in fields.items() if name in known})
    if whole:
        stock.register_to_config(**fields)
    return stock


def stock_index(index: dict[str, Any], kind: type[DiffusionPipeline]) -> dict[str, Any]:
    """The content of `model_index.json` as a stock class writes it."""
    modules, options = kind._get_signature_keys(kind)
    private = {name for name in index if name[0] == "_"} - {PRIVATE_RECORD}
    known = {name: value for name, value in index.items() if name in {*modules, *options, *private}}
    return known | {"_class_name": kind.__name__}
