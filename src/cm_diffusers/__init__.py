"""Consistency models on diffusers: few-step students, their training, and what sampling them needs."""

from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from cm_diffusers import quiet  # noqa: F401  (first)
from cm_diffusers.models.image_to_video import ImageToVideoAdapter
from cm_diffusers.pipelines import (
    ConsistencyImagesPipeline,
    ConsistencyImg2ImgPipeline,
    ConsistencyInpaintPipeline,
    ConsistencyPipeline,
    ConsistencyVideoPipeline,
)
from cm_diffusers.registration import register
from cm_diffusers.schedulers import ConsistencyScheduler, EDMConsistencyScheduler


__all__ = [
    "ConsistencyImagesPipeline",
    "ConsistencyImg2ImgPipeline",
    "ConsistencyInpaintPipeline",
    "ConsistencyPipeline",
    "ConsistencyScheduler",
    "ConsistencyVideoPipeline",
    "DiffusionPipeline",  # this and the mixins: where diffusers looks for the bases of this package's classes
    "EDMConsistencyScheduler",
    "ImageToVideoAdapter",
    "ModelMixin",
    "SchedulerMixin",
]
__version__ = "0.1.0"

register()
