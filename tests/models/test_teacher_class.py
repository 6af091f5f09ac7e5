"""A folder that was saved from another use of its network is the text-to-image teacher that it holds; others are refused."""

import pytest
from diffusers import (
    AutoencoderTiny,
    ControlNetModel,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from tiny import tiny_pipeline, tiny_unet
from tiny_xl import tiny_xl_pipeline

from cm_diffusers.evaluation.sampling import load_pipeline
from cm_diffusers.models.teachers import TeacherConfig, load_teacher, stock_pipeline
from cm_diffusers.publishing.pipelines import lcm_pipeline, lcm_scheduler
from cm_diffusers.tasks.finished_students import FinetuneConfig, load_student


WITHOUT_CHECKER = {"requires_safety_checker": False}


@pytest.fixture(scope="module")
def parts():
    return tiny_pipeline().components


@pytest.fixture(scope="module")
def xl():
    return tiny_xl_pipeline().components


@pytest.fixture(scope="module")
def tiny_vae():
    sizes = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    return AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1))


def controlled(parts):
    net = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(16, 32, 96))
    return StableDiffusionControlNetPipeline(**parts, controlnet=net, **WITHOUT_CHECKER)


MAKERS = {
    "image to image": lambda parts: StableDiffusionImg2ImgPipeline(**parts, **WITHOUT_CHECKER),
    "inpainting": lambda parts: StableDiffusionInpaintPipeline(**parts, **WITHOUT_CHECKER),
    "ControlNet": controlled,
}


@pytest.mark.parametrize("use", MAKERS)
def test_a_teacher_saved_from_another_use_trains_and_publishes(parts, use, tmp_path):
    MAKERS[use](parts).save_pretrained(tmp_path)
    teacher = load_teacher(TeacherConfig(str(tmp_path)))
    assert type(teacher) is StableDiffusionPipeline
    assert teacher.components.keys() == parts.keys()
    for width, kind in ((16, LatentConsistencyModelPipeline), (None, StableDiffusionPipeline)):
        student = lcm_pipeline(teacher, tiny_unet(time_cond_proj_dim=width), lcm_scheduler(teacher, 50, 10.0))
        assert type(student) is kind
    assert type(load_pipeline(str(tmp_path))) is StableDiffusionPipeline  # evaluation asks it with words alone


@pytest.mark.parametrize("kind", [StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline])
def test_a_teacher_of_xl(xl, kind):
    pipe = kind(**xl, force_zeros_for_empty_prompt=False)
    text = stock_pipeline(pipe)
    assert type(text) is StableDiffusionXLPipeline
    assert text.config.force_zeros_for_empty_prompt is False
    assert text.unet is pipe.unet
    assert stock_pipeline(text) is text


def test_a_student_saved_from_image_to_image(tmp_path):
    base = tiny_pipeline(unet=tiny_unet(time_cond_proj_dim=32), scheduler=LCMScheduler())
    LatentConsistencyModelImg2ImgPipeline(**base.components, **WITHOUT_CHECKER).save_pretrained(tmp_path)
    pipe, record = load_student(FinetuneConfig(str(tmp_path)))
    assert (type(pipe), record.guidance) == (LatentConsistencyModelPipeline, "embedded")


def test_a_vae_without_a_posterior_is_refused(parts, tiny_vae, tmp_path):
    StableDiffusionPipeline(**parts | {"vae": tiny_vae}, **WITHOUT_CHECKER).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"The VAE of .* is AutoencoderTiny, whose latents training cannot draw; give"
    ):
        load_teacher(TeacherConfig(str(tmp_path)))
    with pytest.raises(ValueError, match=r"vae does not load: it is AutoencoderTiny; give an AutoencoderKL"):
        load_teacher(TeacherConfig(str(tmp_path), pretrained_vae_model_name_or_path=str(tmp_path / "vae")))


def test_a_network_that_is_told_more_than_text_is_refused(tmp_path):
    unet = tiny_unet(class_embed_type="projection", projection_class_embeddings_input_dim=8)
    tiny_pipeline(unet=unet).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is told more than text by a StableDiffusionPipeline; give a text-to-image"):
        load_teacher(TeacherConfig(str(tmp_path)))
