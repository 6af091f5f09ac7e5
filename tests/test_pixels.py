"""A picture is the same to training and to pipelines, and a mask that says something changes something, or is told."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline

from cm_diffusers import ConsistencyImg2ImgPipeline, ConsistencyInpaintPipeline
from cm_diffusers.data.preprocessing import decode_image
from cm_diffusers.pipelines.ip_adapter import _bytes as for_the_feature_extractor
from cm_diffusers.pipelines.pictures import check_values, readable, readable_mask
from cm_diffusers.pixels import mask_levels, mask_of


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
HOLE = np.zeros((32, 32), np.uint8)
HOLE[8:24, 8:24] = 1


def stored(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def turned(image: Image.Image, orientation: int) -> bytes:
    exif = image.getexif()
    exif[0x0112] = orientation
    return stored(image, "JPEG", exif=exif)


@pytest.mark.parametrize(
    "content",
    [
        stored(Image.fromarray(RAMP.astype(np.uint16) * 257)),
        stored(Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF"),
        stored(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"),
        stored(Image.fromarray(np.stack([RAMP, RAMP[::-1], RAMP, RAMP.T], -1))),
        stored(Image.fromarray(np.stack([RAMP, RAMP.T], -1), "LA")),
        stored(Image.fromarray(RAMP).convert("P"), transparency=7),
        stored(Image.fromarray(RAMP), transparency=9),
        stored(Image.fromarray(RAMP[:, :9]).convert("CMYK"), "JPEG"),
        *(turned(Image.fromarray(RAMP[:, :9]).convert("RGB"), orientation) for orientation in (2, 3, 6, 8)),
    ],
)
def test_pipelines_see_what_training_sees(content):
    trained = decode_image({"bytes": content, "path": None})
    sampled = readable([Image.open(io.BytesIO(content))])[0]
    assert (np.asarray(trained) == np.asarray(sampled)).all()
    assert trained.size == sampled.size
    seen = for_the_feature_extractor(Image.open(io.BytesIO(content)))
    assert (np.asarray(seen) == np.asarray(trained)).all()


def test_pictures_of_numbers_are_refused_by_pipelines_and_left_out_by_training():
    for pixels in (np.array([[0.0, 255.0]], np.float32), np.array([[0, 100]], np.int32)):
        image = Image.fromarray(pixels)
        assert decode_image({"bytes": stored(image, "TIFF"), "path": None}) is None
        with pytest.raises(ValueError, match="store it in 8"):
            readable(image)


@pytest.mark.parametrize(
    "image", [np.full((1, 4, 4, 3), 2.0), torch.full((1, 3, 4, 4), -3.0), [torch.full((3, 4, 4), torch.nan)]]
)
def test_floats_have_a_range(image):
    with pytest.raises(ValueError, match="must lie from 0 to 1, or from -1 to 1, but it holds"):
        check_values(readable(image), 4)


def test_latents_and_images_of_either_range_are_taken():
    for image in (
        torch.full((1, 4, 4, 4), 9.0),
        torch.tensor([[[-1.0, 1.0]]] * 3),
        np.ones((4, 4, 3)),
        Image.new("L", (2, 2)),
    ):
        check_values(readable(image), 4)


def test_arrays_for_the_feature_extractor_are_bytes():
    assert for_the_feature_extractor([np.full((2, 2, 3), 0.5)])[0].max() == 128
    assert for_the_feature_extractor(np.full((2, 2, 3), 200, np.uint8)).max() == 200


def in_palette(numbers: np.ndarray, colours: list[int]) -> Image.Image:
    image = Image.fromarray(numbers, "P")
    image.putpalette(colours)
    return image


MASKS = {
    "bytes to 1": HOLE,
    "bytes to 255": HOLE * 255,
    "bytes of a class": HOLE * 7,
    "16 bits to 1": HOLE.astype(np.uint16),
    "16 bits": HOLE.astype(np.uint16) * 65535,
    "long integers": HOLE.astype(np.int64),
    "booleans": HOLE.astype(bool),
    "floats": HOLE.astype(np.float32),
    "doubles to 255": HOLE * 255.0,
    "three channels": np.repeat(HOLE[..., None], 3, -1),
    "one channel": HOLE[..., None],
    "several": HOLE[None],
}
PICTURES = {
    "bytes to 1": Image.fromarray(HOLE),
    "one bit": Image.fromarray(HOLE.astype(bool)),
    "16 bits to 1": Image.fromarray(HOLE.astype(np.uint16)),
    "16 bits": Image.fromarray(HOLE.astype(np.uint16) * 65535),
    "32 bits": Image.fromarray(HOLE.astype(np.int32)),
    "floats to 1": Image.fromarray(HOLE.astype(np.float32)),
    "floats to 255": Image.fromarray(HOLE * np.float32(255)),
    "a dark colour of a palette": in_palette(HOLE, [0, 0, 0, 128, 0, 0]),
    "colours": Image.fromarray(np.repeat(HOLE[..., None] * 255, 3, -1)),
    "opaque": Image.fromarray(np.repeat(HOLE[..., None] * 255, 3, -1)).convert("RGBA"),
    "white on nothing": Image.fromarray(np.repeat(HOLE[..., None] * 255, 4, -1)),
}


@pytest.mark.parametrize("name", MASKS)
def test_arrays_that_mean_one_mask(name):
    assert (np.squeeze(readable_mask(MASKS[name])) == HOLE).all()
    if name not in ("three channels", "one channel"):
        assert (readable_mask(torch.from_numpy(MASKS[name])[None]).squeeze().numpy() == HOLE).all()


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_mean_one_mask(name):
    assert (np.asarray(mask_of(PICTURES[name])) == HOLE * 255).all()


def test_shades_stay():
    shades = torch.tensor([0.0, 0.25, 0.75])
    assert mask_levels(shades).equal(shades)
    assert mask_levels(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])
    assert mask_levels(torch.tensor([0, 13107, 65535])).tolist() == pytest.approx([0, 0.2, 1])


def test_masks_that_say_nothing_clear_are_refused():
    for levels in ([float("nan"), 1], [-1, 255], [0, 70_000], [-1, 0]):
        with pytest.raises(ValueError, match="A mask holds numbers from"):
            mask_levels(torch.tensor(levels))
    holes = Image.fromarray(np.stack([RAMP, RAMP, RAMP, np.where(RAMP > 99, 255, 0)], -1).astype(np.uint8))
    with pytest.raises(ValueError, match="A mask with transparent places says in two ways"):
        mask_of(holes)


@pytest.fixture(scope="module")
def inpaint():
    pipe = ConsistencyInpaintPipeline.from_pipe(tiny_pipeline())
    pipe.set_progress_bar_config(disable=True)

    def draw(mask: object) -> torch.Tensor:
        options = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt"}
        image = torch.full((1, 3, 32, 32), 0.25)
        return pipe(
            "a bag", image=image, mask_image=mask, generator=torch.Generator().manual_seed(0), **options
        ).images

    return draw


@pytest.mark.parametrize("mask", [HOLE, Image.fromarray(HOLE), torch.from_numpy(HOLE)[None, None]], ids=type)
def test_a_mask_of_0_and_1_is_filled(inpaint, mask, recwarn):
    assert inpaint(mask).equal(inpaint(torch.from_numpy(HOLE)[None, None] * 1.0))
    assert not inpaint(mask).allclose(inpaint(HOLE * 0), atol=1e-3)
    assert not [one for one in recwarn if "A mask changes nothing" in str(one.message)]


def test_a_mask_that_changes_nothing_is_told(inpaint):
    dot = HOLE * 0
    dot[5, 5] = 1
    for mask in (HOLE * 0.3, dot, np.stack([HOLE, HOLE * 2, HOLE * 90]).max(0) * np.linspace(0.2, 1, 32)):
        with pytest.warns(UserWarning, match="A mask changes nothing, though it is not black"):
            inpaint(mask)


def test_an_image_of_bytes_as_floats_is_refused():
    pipe = ConsistencyImg2ImgPipeline.from_pipe(tiny_pipeline())
    with pytest.raises(ValueError, match="but it holds 0 to 255: divide bytes by 255"):
        pipe("a bag", image=torch.linspace(0, 255, 3 * 32 * 32).view(1, 3, 32, 32))
