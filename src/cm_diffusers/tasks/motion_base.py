"""The image model that motion modules go into."""

from diffusers import DiffusionPipeline, UNet2DConditionModel

from cm_diffusers.engine.sharding import comes_from_the_first
from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import network_of
from cm_diffusers.models.teachers import TeacherConfig, load_network, load_teacher


def load_image_model(config: TeacherConfig) -> DiffusionPipeline:
    """As `load_teacher`; its network is on "meta" where it `comes_from_the_first`.

    Raises:
        ValueError: As there, or its network is no UNet, which is found before its weights are read.
    """
    pipe = load_teacher(config, late=True)
    if not isinstance(network := network_of(pipe), UNet2DConditionModel):
        raise UserError(
            f"Motion modules go between the layers of a UNet, but {config.pretrained_teacher_model} has a "
            f"{type(network).__name__}: give a Stable Diffusion as --pretrained_teacher_model."
        )
    if not comes_from_the_first():
        load_network(pipe, config)
    return pipe
