"""Consistency models on diffusers: few-step students, their training, and what sampling them needs.

Classes are imported when they are first asked for: diffusers takes seconds, which `--help` has no need of.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from cm_diffusers import quiet  # noqa: F401  (first)
from cm_diffusers.registration import register


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

    from cm_diffusers.models.image_to_video import ImageToVideoAdapter
    from cm_diffusers.models.two_times import TwoTimeUNet2DModel
    from cm_diffusers.pipelines import (
        ConsistencyImagesPipeline,
        ConsistencyImg2ImgPipeline,
        ConsistencyInpaintPipeline,
        ConsistencyPipeline,
        ConsistencyVideoPipeline,
    )
    from cm_diffusers.schedulers import (
        ConsistencyScheduler,
        EDMConsistencyScheduler,
        FlowConsistencyScheduler,
        TrigFlowConsistencyScheduler,
    )


__all__ = [
    "ConsistencyImagesPipeline",
    "ConsistencyImg2ImgPipeline",
    "ConsistencyInpaintPipeline",
    "ConsistencyPipeline",
    "ConsistencyScheduler",
    "ConsistencyVideoPipeline",
    "DiffusionPipeline",  # this and the mixins: where diffusers looks for the bases of this package's classes
    "EDMConsistencyScheduler",
    "FlowConsistencyScheduler",
    "ImageToVideoAdapter",
    "ModelMixin",
    "SchedulerMixin",
    "TrigFlowConsistencyScheduler",
    "TwoTimeUNet2DModel",
]
__version__ = "0.1.0"

ORIGINS = {
    "DiffusionPipeline": "diffusers",
    "ImageToVideoAdapter": "cm_diffusers.models.image_to_video",
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
    "ConsistencyScheduler": "cm_diffusers.schedulers",
    "EDMConsistencyScheduler": "cm_diffusers.schedulers",
    "FlowConsistencyScheduler": "cm_diffusers.schedulers",
    "TrigFlowConsistencyScheduler": "cm_diffusers.schedulers",
    "TwoTimeUNet2DModel": "cm_diffusers.models.two_times",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        globals()[name] = value = getattr(import_module(ORIGINS.get(name, "cm_diffusers.pipelines")), name)
        return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
