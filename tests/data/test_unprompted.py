"""Pixels and latents without captions: classes stay with their images, and statistics are those of what is drawn."""

import io
import logging
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from pyarrow import parquet
from tiny import tiny_vae
from torch import Tensor, nn

from cm_diffusers import ConsistencyImagesPipeline, EDMConsistencyScheduler
from cm_diffusers.data.cache import Vae
from cm_diffusers.data.images import image_batches
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.data.unprompted import measure_statistics, unprompted_batches
from cm_diffusers.models.families.base import Latents
from cm_diffusers.models.families.latents import posterior


LEVELS = [0, 25, 50, 75, 100, 125, 150, 175, 200, 225]  # grey of row i, whose class is i
SLOPE, NOISE, SCALE, SHIFT = (1.0, 3.0), (0.5, 0.25), 0.5, 0.75


class AffineVae(nn.Module):
    """Posteriors that are known: means 2 + slope * pixels, averaged over 2x2 squares, and a fixed std per channel."""

    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, pixels: Tensor) -> SimpleNamespace:
        grey = nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 2)
        slope, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (SLOPE, NOISE))
        mean = 2 + slope * grey
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=std.expand_as(mean)))


def vae_of(model: nn.Module, fingerprint: str = "affine") -> Vae:
    return Vae(lambda: model, fingerprint, Latents(posterior, None, SHIFT, SCALE, 2, 4))


def encoded(pixels: np.ndarray) -> bytes:
    Image.fromarray(pixels).save(buffer := io.BytesIO(), format="PNG")
    return buffer.getvalue()


def write(folder: Path, images: list[bytes | None], **columns: list) -> str:
    folder.mkdir()
    rows = {"image": [{"bytes": content, "path": None} for content in images], "label": list(range(len(images)))}
    parquet.write_table(pa.table(rows | columns), folder / "data.parquet")
    return str(folder)


def grey(level: int) -> bytes:
    return encoded(np.full((8, 12, 3), level, dtype=np.uint8))


def settings(tmp_path: Path, folder: str) -> DataConfig:
    return DataConfig(
        train_data_dir=folder,
        resolution=8,
        train_batch_size=4,
        cache_dir=str(tmp_path / "hf"),
    )


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where latents are cached by default: on pixels, the flag for it is refused."""
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return settings(tmp_path, write(tmp_path / "set", [grey(level) for level in LEVELS]))


def first(batches, count: int = 1, start: int = 0) -> list:
    return list(islice(batches(start), count))


def all_of(batches, count: int) -> Tensor:
    return torch.cat([batch.x0 for batch in first(batches, count)])


def per_channel(latents: Tensor) -> tuple[Tensor, Tensor]:
    std, mean = torch.std_mean(latents.double(), dim=(0, 2, 3), correction=0)
    return mean, std


# ---- batches


def test_pixels_are_those_of_image_batches(config):
    config = replace(config, random_flip=True)
    ours, theirs = first(unprompted_batches(config, 3), 3), first(image_batches(config, 3), 3)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.x0, other.x0)
        assert (one.cond, one.uncond) == ({}, {})


def level_in(x0: Tensor, vae: Vae | None) -> Tensor:
    """Grey (B,) that an image or its latents show."""
    if vae is None:
        return (x0.mean((1, 2, 3)) + 1) * 127.5
    z = (
        x0[:, 1] / SCALE + SHIFT
    )  # the channel of slope 3, in which rows are 0.6 apart, and noise averaged over 16 places
    return (((z.mean((1, 2)) - 2) / SLOPE[1]) + 1) * 127.5


@pytest.mark.parametrize("vae", [None, vae_of(AffineVae())], ids=["pixels", "latents"])
@pytest.mark.parametrize("workers", [0, 2])
def test_classes_stay_with_their_images(config, tmp_path, caplog, vae, workers):
    images = [grey(level) for level in LEVELS]
    images[3], images[7] = b"no image", None
    config = replace(config, train_data_dir=write(tmp_path / "damaged", images), random_flip=True)
    options = {"label_column": "label", "num_classes": 10, "vae": vae}
    with caplog.at_level(logging.WARNING):
        straight = first(unprompted_batches(config, 5, 1, 2, **options), 7)
    (message,) = caplog.messages
    assert "8 images to train on; left out, images that cannot be read: 1 (row 3); left out, " in message
    resumed = unprompted_batches(replace(config, dataloader_num_workers=workers), 5, 1, 2, **options)
    for one, other in zip(straight[4:], first(resumed, 3, start=4), strict=True):
        assert torch.equal(one.x0, other.x0)
        assert torch.equal(one.cond["class_labels"], other.cond["class_labels"])
    labels = torch.cat([batch.cond["class_labels"] for batch in straight])
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) == {0, 1, 2, 4, 5, 6, 8, 9}
    shown = level_in(torch.cat([batch.x0 for batch in straight]), vae)
    assert (shown - torch.tensor(LEVELS)[labels]).abs().max() < (0.01 if vae is None else 12)
    assert all(batch.uncond == {} for batch in straight)


@pytest.mark.parametrize("vae", [None, vae_of(AffineVae())], ids=["pixels", "latents"])
def test_ranks_share_an_epoch_and_draw_apart(config, vae):
    config = replace(config, train_batch_size=5)
    batches = [
        first(unprompted_batches(config, 0, rank, 2, label_column="label", num_classes=10, vae=vae))[0]
        for rank in range(2)
    ]
    assert sorted(torch.cat([batch.cond["class_labels"] for batch in batches]).tolist()) == list(range(10))
    alone = first(unprompted_batches(config, 1, 0, 2, vae=vae))[0]
    assert not torch.equal(alone.x0, batches[0].x0)


def test_latents_are_scaled_draws_of_the_posteriors(config):
    latents = all_of(unprompted_batches(config, 0, vae=vae_of(AffineVae())), 500)
    mean, std = per_channel(latents)
    pixels = torch.tensor(LEVELS).double() / 127.5 - 1
    expected = [SCALE * (2 + slope * pixels.mean() - SHIFT) for slope in SLOPE]
    torch.testing.assert_close(mean, torch.stack(expected), atol=0.01, rtol=0)
    expected = [
        SCALE * (slope**2 * pixels.var(correction=0) + s**2).sqrt() for slope, s in zip(SLOPE, NOISE, strict=True)
    ]
    torch.testing.assert_close(std, torch.stack(expected), atol=0.01, rtol=0)


# ---- statistics


def test_statistics_in_closed_form(config):
    found = measure_statistics(config, vae_of(AffineVae()))
    pixels = torch.tensor(LEVELS).double() / 127.5 - 1
    for i, (slope, s) in enumerate(zip(SLOPE, NOISE, strict=True)):
        assert found.mean[i] == pytest.approx(SCALE * (2 + slope * pixels.mean().item() - SHIFT), abs=5e-4)  # float16
        variance = slope**2 * pixels.var(correction=0).item() + s**2
        assert found.std[i] == pytest.approx(SCALE * variance**0.5, rel=5e-4)


@pytest.fixture
def varied(tmp_path: Path) -> DataConfig:
    """Images whose crops and mirrored copies differ."""
    draws = np.random.default_rng(0)
    ramps = [np.linspace(0, draws.integers(80, 256), 24).astype(np.uint8) for _ in range(6)]
    images = [encoded(np.broadcast_to(ramp[None, :, None], (8, 24, 3)).copy()) for ramp in ramps]
    return replace(settings(tmp_path, write(tmp_path / "ramps", images)), num_crops=2, random_flip=True)


def test_statistics_are_those_of_draws(varied):
    vae = vae_of(AffineVae())
    found = measure_statistics(varied, vae)
    drawn = all_of(unprompted_batches(varied, 0, vae=vae), 1500)  # about 250 of each of 24 views
    mean, std = per_channel(drawn)
    torch.testing.assert_close(torch.tensor(found.mean).double(), mean, atol=0.015, rtol=0)
    torch.testing.assert_close(torch.tensor(found.std).double(), std, atol=0, rtol=0.015)
    once = measure_statistics(replace(varied, num_crops=1), vae)
    assert abs(once.mean[1] - found.mean[1]) > 0.03  # the variants count


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_standardised_latents_have_sigma_data_in_each_channel(varied, sigma_data):
    vae = vae_of(AffineVae())
    options = {"statistics": measure_statistics(varied, vae), "sigma_data": sigma_data}
    mean, std = per_channel(all_of(unprompted_batches(varied, 0, vae=vae, **options), 1500))
    torch.testing.assert_close(mean, torch.zeros(2).double(), atol=0.02 * sigma_data, rtol=0)
    torch.testing.assert_close(std, torch.full((2,), sigma_data).double(), atol=0, rtol=0.015)


def test_statistics_do_not_depend_on_where_the_cache_is(varied):
    vae = vae_of(AffineVae())
    found = measure_statistics(varied, vae)
    assert measure_statistics(varied, replace(vae, load=lambda: pytest.fail("is cached"))) == found
    assert measure_statistics(replace(varied, cache_latents=False), vae) == found


def test_a_channel_that_does_not_vary_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.NOISE", (0.5, 0.0))
    config = replace(config, train_data_dir=write(tmp_path / "same", [grey(77)] * 3))
    with pytest.raises(ValueError, match=r"Channels \[1\] of the latents do not vary over the 3 images"):
        measure_statistics(config, vae_of(AffineVae(), "without noise"))


def test_the_pipeline_undoes_what_training_did(config):
    torch.manual_seed(0)
    model = tiny_vae()
    vae = Vae.from_model(model)
    statistics = measure_statistics(config, vae)
    plain, standardised = (
        first(unprompted_batches(config, 0, vae=vae, statistics=given))[0].x0 for given in (None, statistics)
    )
    assert not torch.allclose(plain, standardised, atol=0.1)
    blocks = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(sample_size=2, in_channels=4, out_channels=4, norm_num_groups=4, **blocks)
    moments = {"latents_mean": statistics.mean, "latents_std": statistics.std}
    pipe = ConsistencyImagesPipeline(unet, EDMConsistencyScheduler(clip_denoised=False), model, **moments)
    pipe.set_progress_bar_config(disable=True)

    def sampled(output_type: str) -> Tensor:
        put = {"callback_on_step_end": lambda *_: {"latents": standardised}}  # as if the student had drawn them
        return pipe(batch_size=4, output_type=output_type, **put).images

    torch.testing.assert_close(sampled("latent"), plain, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        images = model.decode(plain / model.config.scaling_factor).sample / 2 + 0.5
    torch.testing.assert_close(sampled("pt"), images.clamp(0, 1), atol=1e-5, rtol=0)


# ---- wrong input


@pytest.mark.parametrize(("label", "found"), [(3.5, "3.5"), ("cat", "'cat'"), (-1, "-1"), (10, "10"), (None, "None")])
@pytest.mark.parametrize("vae", [None, vae_of(AffineVae())], ids=["pixels", "latents"])
def test_what_is_no_class_is_refused(config, tmp_path, label, found, vae):
    folder = write(tmp_path / "labels", [grey(1), grey(2)], kind=[None if label is None else type(label)(1), label])
    with pytest.raises(ValueError, match="--label_column kind must hold whole numbers from 0 to 9, but a row holds"):
        unprompted_batches(replace(config, train_data_dir=folder), 0, label_column="kind", num_classes=10, vae=vae)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"label_column": "age"}, "no column named age: choose from the columns found: image, label"),
        ({}, {"num_classes": 10}, "The network has 10 classes, but the images have none: give --label_column"),
        ({"aspect_ratio_buckets": True}, {}, "--aspect_ratio_buckets has no effect"),
        ({"streaming": True}, {}, "--streaming has no effect"),
        ({"proportion_empty_prompts": 0.1}, {}, "--proportion_empty_prompts has no effect"),
        ({"caption_column": "words"}, {}, "--caption_column has no effect"),
        ({"shuffle_buffer_size": 9}, {}, "--shuffle_buffer_size has no effect without --streaming"),
    ],
)
@pytest.mark.parametrize("vae", [None, vae_of(AffineVae())], ids=["pixels", "latents"])
def test_wrong_input_gets_one_sentence(config, change, options, message, vae):
    with pytest.raises(ValueError, match=message) as error:
        unprompted_batches(replace(config, **change), 0, vae=vae, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"num_crops": 2}, {"vae_dtype": "bfloat16"}])
def test_flags_of_the_cache_are_for_latents(config, change):
    with pytest.raises(ValueError, match=f"--{next(iter(change))} has no effect on pixels without prompts"):
        unprompted_batches(replace(config, **change), 0)
    x0 = first(unprompted_batches(replace(config, **change), 0, vae=vae_of(AffineVae())))[0].x0
    assert x0.shape == (4, 2, 4, 4)


def test_no_image_to_be_read(config, tmp_path):
    folder = write(tmp_path / "damaged", [b"x", b"y"])
    with pytest.raises(ValueError, match=r"None of the 2 images of .* can be used: left out, .* cannot be read: 2"):
        measure_statistics(replace(config, train_data_dir=folder), vae_of(AffineVae()))
