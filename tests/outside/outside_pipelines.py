"""diffusers' own pipeline suites on the consistency pipelines; `run.py` puts this file into a copy of diffusers' tests."""

import pytest
import torch
from diffusers import UNet2DModel
from tiny import tiny_pipeline, tiny_unet
from tiny_xl import tiny_xl_pipeline

from cm_diffusers import (
    ConsistencyImagesPipeline,
    ConsistencyImg2ImgPipeline,
    ConsistencyInpaintPipeline,
    ConsistencyPipeline,
    EDMConsistencyScheduler,
)

from ..pipelines import pipeline_params as params
from ..pipelines.testing_utils import (
    BasePipelineTesterConfig,
    LoraTesterMixin,
    PipelineTesterMixin,
    UNetLoraTesterMixin,
)
from ..testing_utils import assert_tensors_close


def reading_pickles(pipeline_class):
    """The suites save pickles; our pipelines read them when told so, as here."""

    class Reading(pipeline_class):
        @classmethod
        def from_pretrained(cls, source, **kwargs):
            return super().from_pretrained(source, **{"use_safetensors": None, **kwargs})

        def load_lora_weights(self, source, **kwargs):
            super().load_lora_weights(source, **{"use_safetensors": None, **kwargs})

    return Reading


def components(pipe):
    return ConsistencyPipeline.from_pipe(pipe, requires_safety_checker=False).components | {
        "requires_safety_checker": False
    }


class Config(BasePipelineTesterConfig):
    pipeline_class = reading_pickles(ConsistencyPipeline)
    required_input_params_in_call_signature = params.TEXT_TO_IMAGE_PARAMS
    batch_input_params = params.TEXT_TO_IMAGE_BATCH_PARAMS
    callback_cfg_params = params.TEXT_TO_IMAGE_CALLBACK_CFG_PARAMS
    output_shape = (3, 32, 32)
    has_unconditional_branch = True

    def get_dummy_components(self):
        return components(tiny_pipeline())

    def get_dummy_inputs(self):
        return {
            "prompt": "a photo of a bag",
            "num_inference_steps": 2,
            "guidance_scale": 2.0,
            "generator": self.get_generator(),
            "output_type": "pt",
        }


class Embedded(Config):
    """A student that takes its guidance scale as an input."""

    has_unconditional_branch = False

    def get_dummy_components(self):
        torch.manual_seed(0)
        return super().get_dummy_components() | {"unet": tiny_unet(time_cond_proj_dim=32)}


class XL(Config):
    def get_dummy_components(self):
        return components(tiny_xl_pipeline())


class Img2Img(Config):
    pipeline_class = reading_pickles(ConsistencyImg2ImgPipeline)
    required_input_params_in_call_signature = params.TEXT_GUIDED_IMAGE_VARIATION_PARAMS - {"height", "width"}
    batch_input_params = params.TEXT_GUIDED_IMAGE_VARIATION_BATCH_PARAMS

    def get_dummy_inputs(self):
        image = torch.rand(1, 3, 32, 32, generator=self.get_generator(1))
        return super().get_dummy_inputs() | {"image": image, "strength": 0.8}


class Inpaint(Img2Img):
    pipeline_class = reading_pickles(ConsistencyInpaintPipeline)
    required_input_params_in_call_signature = params.TEXT_GUIDED_IMAGE_INPAINTING_PARAMS - {"height", "width"}
    batch_input_params = params.TEXT_GUIDED_IMAGE_INPAINTING_BATCH_PARAMS

    def get_dummy_inputs(self):
        mask = (torch.rand(1, 1, 32, 32, generator=self.get_generator(2)) > 0.5).float()
        return super().get_dummy_inputs() | {"mask_image": mask}


class Images(BasePipelineTesterConfig):
    pipeline_class = reading_pickles(ConsistencyImagesPipeline)
    required_input_params_in_call_signature = params.UNCONDITIONAL_IMAGE_GENERATION_PARAMS
    batch_input_params = params.UNCONDITIONAL_IMAGE_GENERATION_BATCH_PARAMS
    optional_input_params = BasePipelineTesterConfig.optional_input_params - {"num_images_per_prompt"}
    output_shape = (3, 16, 16)
    has_unconditional_branch = False

    def get_dummy_components(self):
        torch.manual_seed(0)
        blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
        unet = UNet2DModel(16, 3, 3, block_out_channels=(8, 8), norm_num_groups=4, add_attention=False, **blocks)
        return {"unet": unet, "scheduler": EDMConsistencyScheduler(), "vae": None}

    def get_dummy_inputs(self):
        return {"num_inference_steps": 2, "generator": self.get_generator(), "output_type": "pt"}


class Suite(PipelineTesterMixin):
    """Overrides are the exceptions of CONTRIBUTING.md."""

    def embedded_inputs(self, pipe):
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        inputs = self.get_dummy_inputs()
        embeddings = pipe.encode_prompt(inputs["prompt"], do_classifier_free_guidance=self.has_unconditional_branch)
        return inputs | {"prompt": None} | dict(zip(names, embeddings, strict=True))

    def test_encode_prompt_works_in_isolation(self, base_pipe_output):
        parts = self.get_dummy_components()
        texts = {name for name in parts if "text" in name or "tokenizer" in name}
        alone = self.get_pipeline(**{name: part if name in texts else None for name, part in parts.items()})
        rest = self.get_pipeline(**{name: None if name in texts else part for name, part in parts.items()})
        assert_tensors_close(rest(**self.embedded_inputs(alone))[0], base_pipe_output, atol=1e-4)

    def test_save_load_optional_components(self, tmp_path):
        pipe = self.get_pipeline()
        inputs = self.embedded_inputs(pipe)
        self.get_dummy_inputs = lambda: inputs | {"generator": self.get_generator()}
        super().test_save_load_optional_components(tmp_path)


class LoraSuite(LoraTesterMixin, UNetLoraTesterMixin):
    def test_logs_info_when_no_lora_keys_found(self):
        with pytest.raises(ValueError, match="no layer for a UNet or a text encoder"):
            self.get_pipeline().load_lora_weights({"lora_foo": torch.tensor(2.0)})


class TestPipeline(Config, Suite):
    pass


class TestEmbedded(Embedded, Suite):
    pass


class TestXL(XL, Suite):
    pass


class TestImg2Img(Img2Img, Suite):
    pass


class TestInpaint(Inpaint, Suite):
    pass


class TestLora(Config, LoraSuite):
    pass


class TestXLLora(XL, LoraSuite):
    pass


class TestImages(Images, PipelineTesterMixin):
    pass
