"""Inference pipelines of consistency models."""

from cm_diffusers.pipelines.pipeline_consistency import ConsistencyPipeline
from cm_diffusers.pipelines.pipeline_consistency_images import ConsistencyImagesPipeline
from cm_diffusers.pipelines.pipeline_consistency_img2img import ConsistencyImg2ImgPipeline
from cm_diffusers.pipelines.pipeline_consistency_inpaint import ConsistencyInpaintPipeline
from cm_diffusers.pipelines.pipeline_consistency_video import ConsistencyVideoPipeline


__all__ = [
    "ConsistencyImagesPipeline",
    "ConsistencyImg2ImgPipeline",
    "ConsistencyInpaintPipeline",
    "ConsistencyPipeline",
    "ConsistencyVideoPipeline",
]
