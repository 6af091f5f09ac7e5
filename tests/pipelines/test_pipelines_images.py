"""Image to image and inpainting: equal to stock where stock is right, and right where it is not."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    LatentConsistencyModelImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from tiny import tiny_pipeline, tiny_unet
from tiny_xl import tiny_xl_pipeline, tiny_xl_unet

from cm_diffusers.pipelines import ConsistencyImg2ImgPipeline, ConsistencyInpaintPipeline, ConsistencyPipeline
from pipelines.test_pipelines import PROMPTS, STUDENT, images, seeded, with_lcm


pytestmark = pytest.mark.filterwarnings("ignore:Nothing says:UserWarning", "ignore:There is no safety checker")


def picture(count: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=seeded(7))


def half_mask() -> torch.Tensor:
    """White on the right."""
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    return mask


def inpainting(make, channels: int):
    unet = (tiny_unet if make is tiny_pipeline else tiny_xl_unet)(in_channels=channels)
    pipe = make(unet=unet)
    kind = StableDiffusionInpaintPipeline if make is tiny_pipeline else StableDiffusionXLInpaintPipeline
    extra = {"requires_safety_checker": False} if make is tiny_pipeline else {"add_watermarker": False}
    return with_lcm(kind(**pipe.components, **extra))


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_img2img_equals_the_stock_lcm_pipeline(strength: float) -> None:
    stock = LatentConsistencyModelImg2ImgPipeline.from_pretrained(STUDENT)
    options = {"image": picture(2), "strength": strength, "guidance_scale": 3.0, "num_inference_steps": 3}
    mine = images(ConsistencyImg2ImgPipeline.from_pretrained(STUDENT), **options)
    np.testing.assert_allclose(mine, images(stock, **options), atol=1e-4)


def test_img2img_of_sdxl_takes_the_same_noise_and_conditions() -> None:
    """Stock SDXL skips steps instead of shortening the grid, so both are given timesteps."""
    stock = with_lcm(StableDiffusionXLImg2ImgPipeline(**tiny_xl_pipeline().components, add_watermarker=False))
    pipe = ConsistencyImg2ImgPipeline.from_pipe(stock)
    options = {"timesteps": [999, 499], "guidance_scale": 1.5, "strength": 1.0}
    mine = images(pipe, image=picture(2), num_inference_steps=None, **options)
    expected = images(stock, image=picture(2), **options)
    np.testing.assert_allclose(mine, expected, atol=1e-4)


def test_all_steps_are_used_from_the_strength_on() -> None:
    pipe, seen = ConsistencyImg2ImgPipeline.from_pretrained(STUDENT), []
    pipe.unet.register_forward_pre_hook(lambda module, inputs: seen.append(int(inputs[1])))
    images(pipe, image=picture(), strength=0.4, num_inference_steps=4)
    assert seen == [399, 299, 199, 99]
    assert pipe.num_timesteps == 4


def test_custom_timesteps_are_shortened_and_end_without_noise() -> None:
    """LCMScheduler kept the old length and so put noise on the result (diffusers #7651)."""
    pipe, seen = ConsistencyImg2ImgPipeline.from_pretrained(STUDENT), []

    def callback(pipe, step, timestep, tensors):
        seen.append((int(timestep), tensors["denoised"]))
        return tensors

    clean = pipe(
        PROMPTS,
        image=picture(),
        strength=0.5,
        timesteps=[999, 759, 499, 259],
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["denoised"],
    ).images
    assert [t for t, _ in seen] == [499, 259]
    torch.testing.assert_close(clean, seen[-1][1])


@pytest.mark.parametrize(
    "form",
    [
        lambda x: PIL.Image.fromarray((x[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)),
        lambda x: x.permute(0, 2, 3, 1).numpy(),
        lambda x: [x[0]],
    ],
    ids=["pil", "array", "list"],
)
def test_forms_of_an_image(form) -> None:
    pipe = ConsistencyImg2ImgPipeline.from_pretrained(STUDENT)
    x = (picture() * 255).round() / 255
    expected = images(pipe, image=x, num_inference_steps=1)
    np.testing.assert_allclose(images(pipe, image=form(x), num_inference_steps=1), expected, atol=1e-4)


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "L", "LA", "P", "1"])
def test_pil_images_of_any_mode_are_read_as_rgb(mode: str) -> None:
    image = PIL.Image.fromarray((picture()[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)).convert(mode)
    pipe, white = ConsistencyImg2ImgPipeline.from_pretrained(STUDENT), PIL.Image.new("L", (32, 32), 255)
    expected = images(pipe, image=image.convert("RGB"), num_inference_steps=1)
    np.testing.assert_array_equal(images(pipe, image=image, num_inference_steps=1), expected)
    inpaint = ConsistencyInpaintPipeline.from_pipe(pipe)
    results = [images(inpaint, image=x, mask_image=white, strength=0.5) for x in (image, image.convert("RGB"))]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("form", [lambda x: x, lambda x: x.permute(0, 2, 3, 1).numpy(), list], ids=["t", "np", "list"])
def test_bytes_count_to_255(form) -> None:
    """Stock takes them for fractions, so all is white."""
    pipe, x = ConsistencyImg2ImgPipeline.from_pretrained(STUDENT), (picture() * 255).byte()
    options = {"strength": 0.2, "num_inference_steps": 2}
    expected = images(pipe, image=x.float() / 255, **options)
    np.testing.assert_allclose(images(pipe, image=form(x), **options), expected, atol=1e-5)


def test_latents_are_images_too() -> None:
    pipe = ConsistencyImg2ImgPipeline.from_pretrained(STUDENT)
    clean = torch.randn(1, 4, 8, 8)
    options = {"strength": 0.02, "num_inference_steps": 1, "output_type": "latent"}
    result = pipe(PROMPTS[0], image=clean, **options).images
    assert (result - clean).abs().mean() < 0.3  # at timestep 19 there is hardly any noise


def test_the_size_is_the_images_rounded_down_or_the_callers() -> None:
    pipe = ConsistencyImg2ImgPipeline.from_pretrained(STUDENT)
    image = PIL.Image.new("RGB", (43, 38))
    assert images(pipe, image=image, num_inference_steps=1).shape == (2, 36, 40, 3)
    assert images(pipe, image=image, num_inference_steps=1, height=64, width=32).shape == (2, 64, 32, 3)


def test_each_prompt_keeps_its_image() -> None:
    """Stock tiles the images but repeats the prompts, which crosses them when each has several results."""
    pipe = ConsistencyImg2ImgPipeline.from_pretrained(STUDENT)
    generators = [seeded(seed) for seed in range(4)]
    options = {"num_inference_steps": 2, "strength": 0.5}
    both = images(pipe, image=picture(2), num_images_per_prompt=2, generator=generators, **options)
    alone = images(pipe, PROMPTS[1], image=picture(2)[1:], generator=[seeded(2)], **options)
    np.testing.assert_allclose(both[2:3], alone, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
def test_inpainting_equals_stock_for_one_step(make) -> None:
    """For more steps stock draws the noise of an encoding that it does not use."""
    stock = inpainting(make, 4)
    options = {"image": picture(), "mask_image": half_mask(), "num_inference_steps": 1, "strength": 1.0}
    options |= {"height": 32, "width": 32, "guidance_scale": 1.5}
    mine = images(ConsistencyInpaintPipeline.from_pipe(stock), **options)
    np.testing.assert_allclose(mine, images(stock, **options), atol=1e-4)


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_an_inpainting_unet_equals_stock(make, scale: float) -> None:
    stock = inpainting(make, 9)
    options = {"image": picture(), "mask_image": half_mask(), "num_inference_steps": 3, "strength": 1.0}
    options |= {"height": 32, "width": 32, "guidance_scale": scale}
    mine = images(ConsistencyInpaintPipeline.from_pipe(stock), **options)
    np.testing.assert_allclose(mine, images(stock, **options), atol=1e-4)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_what_is_not_masked_survives(strength: float) -> None:
    pipe = ConsistencyInpaintPipeline.from_pretrained(STUDENT)
    clean = torch.randn(1, 4, 8, 8)
    result = pipe(
        PROMPTS, image=clean, mask_image=half_mask(), strength=strength, generator=seeded(), output_type="latent"
    ).images
    torch.testing.assert_close(result[..., :4], clean[..., :4].repeat(2, 1, 1, 1))
    assert (result[..., 4:] - clean[..., 4:]).abs().mean() > 0.1


def test_the_known_part_is_noised_like_the_sample_between_steps() -> None:
    pipe, seen = ConsistencyInpaintPipeline.from_pretrained(STUDENT), []
    noise, clean = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        return tensors

    pipe(PROMPTS[0], image=clean, mask_image=half_mask(), latents=noise, callback_on_step_end=callback)
    for latents, t in zip(seen, [759, 499, 259], strict=False):
        alpha = pipe.scheduler.alphas_cumprod[t]
        expected = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        torch.testing.assert_close(latents[..., :4], expected[..., :4])
    torch.testing.assert_close(seen[3][..., :4], clean[..., :4])


@pytest.mark.parametrize(
    "mask",
    [
        half_mask()[0],
        half_mask()[0, 0],
        half_mask()[0, 0].numpy(),
        half_mask().bool(),
        half_mask()[0, 0].bool().numpy(),
        (half_mask() * 255).byte(),
        PIL.Image.fromarray(half_mask()[0, 0].byte().numpy() * 255),
    ],
    ids=["CHW", "HW", "array", "bool", "bool array", "bytes", "pil"],
)
def test_forms_of_a_mask(mask) -> None:
    pipe = ConsistencyInpaintPipeline.from_pretrained(STUDENT)
    expected = images(pipe, image=picture(), mask_image=half_mask())
    np.testing.assert_array_equal(images(pipe, image=picture(), mask_image=mask), expected)


def test_inpainting_does_not_depend_on_the_batch() -> None:
    pipe = ConsistencyInpaintPipeline.from_pretrained(STUDENT)
    both = images(pipe, image=picture(2), mask_image=half_mask(), generator=[seeded(1), seeded(2)])
    alone = images(pipe, PROMPTS[1], image=picture(2)[1:], mask_image=half_mask(), generator=[seeded(2)])
    np.testing.assert_allclose(both[1:], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, "strength must be above 0 .* and at most 1 .*, got 0.0"),
        ({"strength": 1.1}, "got 1.1"),
        *(({"strength": bad}, f"strength must be above 0 .* got {bad!r}") for bad in (None, "0.5", float("nan"))),
        ({"strength": 0.01, "num_inference_steps": 1}, "take a strength of at least 0.02 or more original"),
        ({"image": np.zeros((32, 32, 4), np.float32)}, r"must have 3 channels, .* got \(4, 32, 32\)"),
        (
            {"image": torch.rand(1, 4, 32, 32)},
            "4 channels is read as latents, here of 128 x 128 pixels; give 3 channels",
        ),
        ({"image": torch.rand(1, 4, 32, 32), "height": 32, "width": 32}, r"3 channels, .* got \(4, 32, 32\)"),
        ({"image": picture().long()}, "integers must be uint8, from 0 to 255, got torch.int64"),
        ({"image": [picture()[0], torch.rand(3, 16, 32)]}, r"of one size .*, got \[\(32, 32\), \(16, 32\)\]"),
        ({"image": None}, "An image must be a PIL image, an array, a tensor, latents or a list"),
        ({"image": picture(3)}, "3 images cannot be spread over 2 results"),
        (
            {"image": torch.randn(1, 4, 8, 8), "height": 64},
            r"3 channels, or be latents of the shape \(4, 16, 8\); got \(4, 8, 8\)",
        ),
        ({"strength": 0.05}, "num_inference_steps is 4, but .* 0.05 .* 2 "),
        ({"height": 30}, "multiples of 4, got 30 and 32"),
    ],
)
def test_what_img2img_cannot_do(options: dict, message: str) -> None:
    pipe = ConsistencyImg2ImgPipeline.from_pretrained(STUDENT)
    with pytest.raises(ValueError, match=message):
        pipe(PROMPTS, **{"image": picture(), **options})


def test_what_inpainting_cannot_do() -> None:
    pipe = ConsistencyInpaintPipeline.from_pretrained(STUDENT)
    with pytest.raises(ValueError, match="The mask is 16 x 32, the image 32 x 32; make them one size"):
        pipe(PROMPTS, image=picture(), mask_image=half_mask()[..., :16, :])
    with pytest.raises(ValueError, match="must be of one size"):
        pipe(PROMPTS, image=picture(2), mask_image=[half_mask()[0], half_mask()[0, :, :16]])
    inpaint = ConsistencyInpaintPipeline.from_pipe(inpainting(tiny_pipeline, 9))
    with pytest.raises(ValueError, match="needs the image itself, not its latents"):
        inpaint(PROMPTS, image=torch.randn(1, 4, 8, 8), mask_image=half_mask())
    for kind in (ConsistencyPipeline, ConsistencyImg2ImgPipeline):
        with pytest.raises(ValueError, match="9 input channels; use ConsistencyInpaintPipeline"):
            kind.from_pipe(inpaint)(PROMPTS, **({} if kind is ConsistencyPipeline else {"image": picture()}))
