"""ConsistencyPipeline draws what the stock pipelines draw, for every shape of student."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.utils.torch_utils import randn_tensor
from tiny import tiny_pipeline, tiny_text_encoder
from tiny_xl import tiny_text_encoder_2, tiny_xl_pipeline, tiny_xl_unet
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from cm_diffusers.pipelines import ConsistencyPipeline
from cm_diffusers.schedulers import ConsistencyScheduler


ASSETS = Path(__file__).parents[2] / "assets"
STUDENT, LORA, TEACHER = ASSETS / "fashion_lcm", ASSETS / "fashion_lcm_lora", ASSETS / "fashion_teacher"
PROMPTS = ["a photo of a bag", "a photo of an ankle boot"]

pytestmark = pytest.mark.filterwarnings("ignore:Nothing says:UserWarning", "ignore:There is no safety checker")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(pipe, prompt=PROMPTS, seed=0, **options) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "generator": seeded(seed), **options}
    return pipe(prompt, output_type="np", **options).images


def with_lcm(pipe):
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return pipe


def ours(pipe) -> ConsistencyPipeline:
    return ConsistencyPipeline.from_pipe(pipe)


def stock_xl(pipe) -> StableDiffusionXLPipeline:
    return with_lcm(StableDiffusionXLPipeline(**pipe.components, add_watermarker=False))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_embedded_student_equals_the_stock_lcm_pipeline(steps: int) -> None:
    stock = LatentConsistencyModelPipeline.from_pretrained(STUDENT)
    options = {"num_inference_steps": steps, "guidance_scale": 3.0}
    mine = images(ConsistencyPipeline.from_pretrained(STUDENT), **options)
    np.testing.assert_allclose(mine, images(stock, **options), atol=1e-4)


@pytest.mark.filterwarnings("ignore:guidance_scale")
def test_the_guidance_scale_acts_through_the_embedding() -> None:
    pipe = ConsistencyPipeline.from_pretrained(STUDENT)
    assert not np.allclose(images(pipe, guidance_scale=1.0), images(pipe, guidance_scale=5.0), atol=1e-2)


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.5, "negative_prompt": ["a photo of a coat"] * 2}])
def test_a_lora_student_equals_the_stock_pipeline(options: dict) -> None:
    stock = with_lcm(StableDiffusionPipeline.from_pretrained(TEACHER))
    stock.load_lora_weights(LORA)
    mine = images(ConsistencyPipeline.from_pretrained(LORA), **options)
    np.testing.assert_allclose(mine, images(stock, **{"guidance_scale": 1.0, **options}), atol=1e-4)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("negative", [None, ["a coat", "a dress"]])
@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.filterwarnings("ignore:The negative prompt")
def test_an_sdxl_student_equals_the_stock_pipeline(zeros: bool, negative: list | None, scale: float) -> None:
    pipe = tiny_xl_pipeline()
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    options = {
        "height": 32,
        "width": 64,
        "guidance_scale": scale,
        "negative_prompt": negative,
        "prompt_2": ["a bag", "a boot"],
        "num_images_per_prompt": 2,
        "original_size": (64, 48),
        "crops_coords_top_left": (8, 4),
        "target_size": (32, 64),
    }
    stock = stock_xl(pipe)
    stock.register_to_config(force_zeros_for_empty_prompt=zeros)
    mine = images(ours(pipe), **options)
    assert mine.shape == (4, 32, 64, 3)
    np.testing.assert_allclose(mine, images(stock, **options), atol=1e-4)


def test_an_embedded_sdxl_student_equals_the_stock_pipeline() -> None:
    pipe = tiny_xl_pipeline(unet=tiny_xl_unet(time_cond_proj_dim=16))
    mine = images(ours(pipe), guidance_scale=3.0)
    np.testing.assert_allclose(mine, images(stock_xl(pipe), guidance_scale=3.0), atol=1e-4)


def test_sdxl_runs_with_its_second_text_encoder_alone() -> None:
    pipe = tiny_xl_pipeline(text_encoder=None, tokenizer=None, unet=tiny_xl_unet(cross_attention_dim=24))
    np.testing.assert_allclose(images(ours(pipe)), images(stock_xl(pipe), guidance_scale=1.0), atol=1e-4)


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
def test_clip_skip_leaves_out_layers(make) -> None:
    """Stock Stable Diffusion fails here with transformers from 5.6 on: its text model is flat (diffusers #14124)."""
    pipe = ours(make())
    whole, skipped = (pipe.encode_prompt("a bag", clip_skip=skip)[0] for skip in (0, 1))
    body = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
    body.encoder.layers = body.encoder.layers[:-1]
    if make is tiny_xl_pipeline:
        body = pipe.text_encoder_2.text_model
        body.encoder.layers = body.encoder.layers[:-1]
    shorter = pipe.encode_prompt("a bag")[0]
    torch.testing.assert_close(skipped, shorter)
    assert not torch.allclose(whole, skipped)


@pytest.mark.parametrize("encoder", [tiny_text_encoder, tiny_text_encoder_2], ids=["flat", "nested"])
def test_clip_skip_finds_the_final_norm_of_old_and_new_transformers(encoder) -> None:
    pipe = ours(tiny_pipeline(text_encoder=encoder()))
    assert encoder is tiny_text_encoder or hasattr(pipe.text_encoder, "text_model")
    torch.testing.assert_close(pipe.encode_prompt("a bag", clip_skip=0)[0], pipe.encode_prompt("a bag")[0])


def test_long_prompts_are_cut_with_a_warning() -> None:
    pipe = ours(tiny_pipeline())
    with pytest.warns(UserWarning, match="CLIP reads 16 tokens.*boot"):
        long = pipe.encode_prompt("a photo of a bag " * 4 + "boot")[0]
    assert long.shape == (1, 16, 32)


def test_an_image_does_not_depend_on_its_batch() -> None:
    pipe = ConsistencyPipeline.from_pretrained(STUDENT)
    batch = images(pipe, generator=[seeded(3), seeded(4)])
    alone = images(pipe, PROMPTS[1], generator=[seeded(4)])
    np.testing.assert_allclose(batch[1:], alone, atol=1e-5)


def test_tcd_students_are_sampled_as_with_the_stock_scheduler() -> None:
    stock = tiny_pipeline()
    stock.scheduler = TCDScheduler.from_config(stock.scheduler.config)
    pipe = ours(stock)
    assert isinstance(pipe.scheduler, ConsistencyScheduler)
    assert (pipe.scheduler.config.gamma, pipe.scheduler.config.boundary_scalings) == (0.3, "none")
    given = {"timesteps": [999, 759, 499, 259], "num_inference_steps": None}
    mine = images(pipe, **given)
    pipe.scheduler = stock.scheduler
    np.testing.assert_allclose(mine, images(pipe, **given), atol=1e-4)


@pytest.mark.parametrize("kind", [ConsistencyScheduler, LCMScheduler])
def test_prompt_embeddings_stand_in_for_prompts(kind) -> None:
    pipe = ours(tiny_xl_pipeline())
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    states, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=True)
    embeddings = {
        "prompt_embeds": states,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
    }
    expected = images(pipe, guidance_scale=1.5)
    np.testing.assert_allclose(images(pipe, None, guidance_scale=1.5, **embeddings), expected, atol=1e-5)


def test_callbacks_see_the_preview_and_can_interrupt() -> None:
    pipe = ConsistencyPipeline.from_pretrained(STUDENT)
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((int(timestep), tensors["latents"].clone(), tensors["denoised"].clone()))
        pipe._interrupt = step == 1
        return tensors

    result = pipe(
        PROMPTS[0],
        num_inference_steps=4,
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "denoised"],
    ).images
    assert [t for t, *_ in seen] == [999, 759]
    assert pipe.num_timesteps == 4
    torch.testing.assert_close(result, seen[-1][1])
    noise = randn_tensor((1, 4, 8, 8), generator=seeded())
    one_step = pipe(PROMPTS[0], num_inference_steps=1, latents=noise, output_type="latent").images
    torch.testing.assert_close(seen[0][2], one_step)


def test_callbacks_change_what_they_return() -> None:
    pipe = ConsistencyPipeline.from_pretrained(STUDENT)
    result = pipe(
        PROMPTS,
        output_type="latent",
        callback_on_step_end=lambda pipe, step, timestep, tensors: {"latents": torch.zeros_like(tensors["latents"])},
    )
    assert result.images.abs().max() == 0


def test_the_guidance_can_be_cut_off_by_the_stock_callback() -> None:
    pipe, calls = ours(tiny_pipeline()), []
    pipe.unet.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    images(
        pipe,
        PROMPTS[0],
        guidance_scale=1.5,
        callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0),
    )
    assert calls == [2, 1]


@pytest.mark.parametrize("kind", [ConsistencyScheduler, LCMScheduler])
def test_output_types(kind) -> None:
    pipe = ours(tiny_pipeline())
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    shared = {"num_inference_steps": 1, "latents": torch.randn(2, 4, 8, 8)}
    pil, array, tensor = (pipe(PROMPTS, output_type=kind, **shared).images for kind in ("pil", "np", "pt"))
    np.testing.assert_array_equal(np.asarray(pil[1]), (array[1] * 255).round().astype(np.uint8))
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert np.array_equal(pipe(PROMPTS, output_type="np", return_dict=False, **shared)[0], array)


def test_half_precision_students_run_with_a_float32_text_encoder() -> None:
    pipe = ours(tiny_xl_pipeline())
    # Latents, not a seed: torch 2.6 draws others in bfloat16.
    start = {"num_inference_steps": 1, "latents": torch.randn(2, 4, 8, 8)}
    expected = images(pipe, **start)
    pipe.unet.to(torch.bfloat16)
    pipe.vae.to(torch.bfloat16)
    assert np.abs(images(pipe, **start) - expected).mean() < 0.03


def test_the_sdxl_vae_is_upcast_from_half_precision_for_the_while() -> None:
    pipe, seen = ours(tiny_xl_pipeline()), []
    pipe.vae.to(torch.float16)
    pipe.vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    images(pipe, num_inference_steps=1)
    assert seen == [torch.float32]
    assert pipe.vae.dtype == torch.float16


def test_lora_scale_zero_is_the_base_model() -> None:
    pipe = ConsistencyPipeline.from_pretrained(LORA)
    without = images(pipe, cross_attention_kwargs={"scale": 0.0})
    pipe.unload_lora_weights()
    np.testing.assert_allclose(without, images(pipe), atol=1e-5)


def test_every_offloaded_component_exists() -> None:
    names = ConsistencyPipeline.model_cpu_offload_seq.split("->")
    modules, _ = ConsistencyPipeline._get_signature_keys(ConsistencyPipeline)
    assert set(names) | {*ConsistencyPipeline._optional_components} <= set(modules)
    assert names == ["text_encoder", "text_encoder_2", "image_encoder", "unet", "vae"]


@pytest.mark.parametrize("flagged", [True, False])
def test_the_safety_checker_is_run(flagged: bool) -> None:
    pipe = ours(tiny_pipeline())
    plain = images(pipe)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config={**vision, "patch_size": 16}, projection_dim=16))
    torch.nn.init.constant_(checker.concept_embeds_weights, -2.0 if flagged else 2.0)  # the cosine that is too much
    pipe.register_modules(safety_checker=checker, feature_extractor=CLIPImageProcessor(size=32, crop_size=32))
    result = pipe(PROMPTS, num_inference_steps=2, generator=seeded(), output_type="np")
    assert result.nsfw_content_detected == [flagged, flagged]
    np.testing.assert_array_equal(result.images, np.zeros_like(plain) if flagged else plain)


def test_controlnet_runs_in_the_stock_pipeline_with_our_scheduler() -> None:
    pipe = tiny_pipeline()
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8, 16))
    torch.nn.init.normal_(control.controlnet_down_blocks[0].weight)
    stock = StableDiffusionControlNetPipeline(**pipe.components, controlnet=control, requires_safety_checker=False)
    results = []
    for kind in (ConsistencyScheduler, LCMScheduler):
        stock.scheduler = kind.from_config(pipe.scheduler.config)
        results.append(images(stock, PROMPTS, image=torch.rand(1, 3, 32, 32, generator=seeded()), guidance_scale=1.5))
    np.testing.assert_allclose(*results, atol=1e-4)
    assert not np.allclose(results[0], images(ours(pipe), guidance_scale=1.5), atol=1e-3)


def ip_adapter(unet, image_dim: int) -> dict:
    """Random IP-Adapter weights in the published layout."""
    width = unet.config.cross_attention_dim
    projection = {
        "proj.weight": (4 * width, image_dim),
        "proj.bias": (4 * width,),
        "norm.weight": width,
        "norm.bias": width,
    }
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    keys = {
        f"{2 * i + 1}.to_{part}_ip.weight": (a.to_q.out_features, width) for i, a in enumerate(layers) for part in "kv"
    }
    return {
        "image_proj": {name: torch.randn(shape) * 0.3 for name, shape in projection.items()},
        "ip_adapter": {name: torch.randn(shape) * 0.3 for name, shape in keys.items()},
    }


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_ip_adapters_act_as_in_the_stock_pipelines(make, scale: float) -> None:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=24,
    )
    stock = make(image_encoder=CLIPVisionModelWithProjection(vision).eval())
    stock.feature_extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    stock = with_lcm(stock)
    without = images(ours(stock), guidance_scale=scale)
    stock.load_ip_adapter(ip_adapter(stock.unet, 24), subfolder="", weight_name="")
    pipe = ours(stock)
    picture = images(pipe, PROMPTS[:1], ip_adapter_image=torch.rand(1, 3, 32, 32))
    options = {"ip_adapter_image": torch.from_numpy(picture).permute(0, 3, 1, 2), "guidance_scale": scale}
    mine = images(pipe, **options)
    np.testing.assert_allclose(mine, images(stock, **options), atol=1e-4)
    assert not np.allclose(mine, without, atol=1e-2)
    with pytest.raises(ValueError, match="An IP-Adapter is loaded: give ip_adapter_image"):
        images(pipe)
    with pytest.raises(ValueError, match="1 IP-Adapters are loaded, but 2 images given"):
        images(pipe, ip_adapter_image=[options["ip_adapter_image"]] * 2)
    with pytest.raises(ValueError, match="hold the unconditional and the conditional half; found 1"):
        images(pipe, ip_adapter_image_embeds=[torch.zeros(1, 1, 24)], guidance_scale=1.5)
    embeds = stock.prepare_ip_adapter_image_embeds(options["ip_adapter_image"], None, "cpu", 1, scale > 1)
    np.testing.assert_allclose(images(pipe, ip_adapter_image_embeds=embeds, guidance_scale=scale), mine, atol=1e-4)
