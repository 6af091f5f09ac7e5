"""Aspect-ratio buckets: which there are, which image goes where, and batches of one bucket on every rank."""

import io
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.training_utils import find_nearest_bucket
from PIL import Image
from scripts import captioned_folder, data_flags, run_script
from tiny import tiny_pipeline
from tiny_xl import tiny_xl_pipeline

from cm_diffusers.data.buckets import BucketBatches, aspect_ratio_buckets, nearest_buckets
from cm_diffusers.data.cache import cached_posteriors
from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.framing import Framing
from cm_diffusers.data.images import image_batches
from cm_diffusers.data.preprocessing import Size, decode_image, preprocess
from cm_diffusers.data.sampler import Position
from cm_diffusers.data.sources import DataConfig, load_image_text
from cm_diffusers.data.text_image import text_image_batches


XL_BUCKETS = aspect_ratio_buckets(1024, 64, 2.0)


# ---- sizes


def test_buckets_of_stable_diffusion_xl() -> None:
    """Of those in 2307.01952, Appendix I, the largest for each shorter side, up to the bound."""
    wide = [(960, 1088), (896, 1152), (832, 1216), (768, 1344)]
    assert XL_BUCKETS == [(1024, 1024), *(size for h, w in wide for size in ((w, h), (h, w)))]


@pytest.mark.parametrize(
    ("resolution", "step", "ratio"), [(512, 64, 2.0), (1024, 32, 3.0), (32, 8, 4.0), (96, 8, 1.5)]
)
def test_buckets_have_about_one_area(resolution, step, ratio) -> None:
    buckets = aspect_ratio_buckets(resolution, step, ratio)
    assert buckets[0] == (resolution, resolution)
    assert len(set(buckets)) == len(buckets) > 1
    for h, w in buckets:
        assert h % step == w % step == 0
        assert max(h, w) <= ratio * min(h, w)
        assert resolution**2 - min(h, w) * step < h * w <= resolution**2
        assert Size(w, h) in buckets


def test_a_bound_of_one_leaves_the_square() -> None:
    assert aspect_ratio_buckets(512, 64, 1.0) == [(512, 512)]


def test_sides_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="--resolution 500 is not a multiple of --bucket_step 64: take 448 or 512"):
        aspect_ratio_buckets(500, 64, 2.0)
    with pytest.raises(ValueError, match=r"--bucket_max_ratio must be at least 1, .* but it is 0\.5"):
        aspect_ratio_buckets(512, 64, 0.5)


# ---- assignment


def bucket_of(height: int, width: int, buckets=XL_BUCKETS) -> Size:
    return buckets[nearest_buckets(np.array([[height, width]]), buckets)[0]]


@pytest.mark.parametrize(("size", "theirs"), [((620, 660), (960, 1088)), ((540, 740), (832, 1216))])
def test_nearest_is_by_ratio_and_not_by_difference_of_products(size, theirs) -> None:
    """diffusers' |h bw - w bh| grows with the bucket: it leaves the nearest ratio for a narrower one."""
    h, w = size
    assert XL_BUCKETS[find_nearest_bucket(h, w, XL_BUCKETS)] == theirs
    found = bucket_of(h, w)
    distances = {b: abs(np.log(h / w) - np.log(b.height / b.width)) for b in XL_BUCKETS}
    assert found == min(distances, key=distances.get)
    assert distances[found] < distances[theirs]


def test_tall_and_wide_are_treated_alike() -> None:
    sizes = np.random.default_rng(0).integers(100, 2000, (500, 2))
    for h, w in sizes:
        assert bucket_of(h, w) == tuple(reversed(bucket_of(w, h)))
    assert len({bucket_of(h, w) for h, w in sizes}) == len(XL_BUCKETS)


def test_a_bucket_is_nearest_to_itself_at_any_scale() -> None:
    for bucket in XL_BUCKETS:
        for scale in (1, 3, 7):
            assert bucket_of(scale * bucket.height, scale * bucket.width) == bucket


def test_ties_go_to_the_earlier_bucket() -> None:
    """2 lies halfway between 1 and 4, 5 / 40 between 1 / 10 and 25 / 160, whose logarithms round differently."""
    buckets = [Size(32, 32), Size(64, 16), Size(16, 64)]
    assert bucket_of(60, 30, buckets) == bucket_of(30, 60, buckets) == (32, 32)
    for tied in ([Size(10, 100), Size(25, 160)], [Size(25, 160), Size(10, 100)]):
        assert bucket_of(5, 40, tied) == tied[0]


def test_extreme_ratios_go_to_the_longest() -> None:
    assert bucket_of(10_000, 3) == (1344, 768)
    assert bucket_of(3, 10_000) == (768, 1344)


# ---- order


ASSIGNED = np.repeat([0, 1, 3], [13, 5, 24])[np.random.default_rng(0).permutation(42)]
PER_EPOCH = 3 + 1 + 4  # ceil(n / 6)


def epoch_of(batch_size: int, ranks: int, number: int = 0, seed: int = 0) -> list[list[np.ndarray]]:
    """[batch][rank] row numbers."""
    orders = [BucketBatches(ASSIGNED, batch_size, Position(seed, rank, ranks)) for rank in range(ranks)]
    return [[order(k) for order in orders] for k in range(number * PER_EPOCH, (number + 1) * PER_EPOCH)]


@pytest.mark.parametrize(("batch_size", "ranks"), [(6, 1), (3, 2), (2, 3), (1, 6)])
@pytest.mark.parametrize("number", [0, 1, 5])
def test_an_epoch_has_every_row(batch_size, ranks, number) -> None:
    """13, 5 and 24 rows in batches of 6: filled up by 5, 1 and 0 rows, all of the same bucket."""
    epoch = epoch_of(batch_size, ranks, number)
    counts = Counter(np.concatenate([np.concatenate(batch) for batch in epoch]).tolist())
    assert set(counts) == set(range(42))
    for bucket, refills in ((0, 5), (1, 1), (3, 0)):
        repeated = [counts[row] - 1 for row in np.flatnonzero(ASSIGNED == bucket)]
        assert sum(repeated) == refills
        assert max(repeated) <= 1


@pytest.mark.parametrize(("batch_size", "ranks"), [(3, 2), (2, 3)])
def test_ranks_share_a_bucket_and_no_row(batch_size, ranks) -> None:
    for batch in epoch_of(batch_size, ranks):
        assert {len(rows) for rows in batch} == {batch_size}
        rows = np.concatenate(batch)
        assert len(set(ASSIGNED[rows])) == 1
        if ASSIGNED[rows[0]] != 1:  # whose five rows cannot fill six places
            assert len(set(rows)) == len(rows)


def test_all_numbers_of_ranks_see_the_same_batches() -> None:
    one = [np.concatenate(batch) for batch in epoch_of(6, 1)]
    assert all(np.array_equal(a, np.concatenate(b)) for a, b in zip(one, epoch_of(2, 3), strict=True))


def test_epochs_and_seeds_differ() -> None:
    def rows(**which) -> list[int]:
        return np.concatenate([np.concatenate(batch) for batch in epoch_of(6, 1, **which)]).tolist()

    assert rows() != rows(number=1)
    assert rows() != rows(seed=1)
    buckets = [[ASSIGNED[batch[0][0]] for batch in epoch_of(6, 1, number)] for number in range(5)]
    assert len({tuple(order) for order in buckets}) > 1, "the buckets take turns in another order"
    assert buckets[0] != sorted(buckets[0])


def test_a_batch_is_a_pure_function_of_its_number() -> None:
    straight = BucketBatches(ASSIGNED, 3, Position(0, 1, 2))
    expected = [straight(k) for k in range(30)]
    for k in (29, 3, 17, 0):
        assert np.array_equal(BucketBatches(ASSIGNED, 3, Position(0, 1, 2))(k), expected[k])
        assert np.array_equal(straight(k), expected[k])


def test_a_bucket_of_fewer_rows_than_a_batch() -> None:
    order = BucketBatches(np.array([7, 7, 2]), 5, Position(0))
    small, pair = sorted((Counter(order(k).tolist()) for k in range(2)), key=len)
    assert small == {2: 5}
    assert sorted(pair.values()) == [2, 3]
    assert set(pair) == {0, 1}


# ---- batches


SIZES = [(36, 40), (64, 64), (30, 30), (40, 24), (90, 50), (24, 40), (30, 60), (48, 80), (33, 32), (100, 10)]


def png(number: int, height: int, width: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), format="PNG")
    return buffer.getvalue()


@pytest.fixture
def config(tmp_path) -> DataConfig:
    files = [*(png(i, h, w) for i, (h, w) in enumerate(SIZES)), b"not an image"]
    return DataConfig(
        train_data_dir=str(captioned_folder(tmp_path / "set", files)),
        resolution=32,
        aspect_ratio_buckets=True,
        bucket_step=8,
        train_batch_size=2,
        latent_cache_dir=str(tmp_path / "latents"),
    )


def batches(config: DataConfig, pipe, count: int, start: int = 0, **position) -> list:
    make = text_image_batches(config, Encoders.from_pipeline(pipe), 0, **position)
    return list(islice(make(start), count))


def test_latents_have_the_shape_of_their_bucket(config) -> None:
    """Rows 0, 1, 2 and 8 are square, 3, 4 and 9 tall, 5, 6 and 7 wide; a latent stands for 4 x 4 pixels."""
    shapes = Counter(tuple(batch.x0.shape[2:]) for batch in batches(config, tiny_pipeline(), 6))
    assert shapes == {(8, 8): 2, (10, 6): 2, (6, 10): 2}


def test_posteriors_are_those_of_the_covering_crop(config) -> None:
    config.center_crop = True
    pipe, dataset = tiny_pipeline(), load_image_text(config)
    framing = Framing.of(dataset, config, sized=False)
    posteriors = cached_posteriors(dataset, framing, Encoders.from_pipeline(pipe).vae)
    assert posteriors.valid.tolist() == [True] * 10 + [False]
    for row in range(10):
        target = framing.targets[framing.assigned[row]]
        pixels = preprocess(decode_image(dataset[row]["image"]), config, framing.view(row, 0), target)
        assert pixels.shape == (3, *target)
        with torch.no_grad():
            expected = pipe.vae.encode(pixels[None]).latent_dist.mean
        mean, _ = posteriors[np.array([row]), np.array([0])]
        torch.testing.assert_close(mean.float(), expected, rtol=2e-3, atol=2e-3)


def test_images_are_covered_and_not_stretched(config) -> None:
    """90 x 50 goes to 40 x 24: resized to 43 x 24, cut at the top and bottom."""
    image = Image.fromarray(np.arange(90, dtype=np.uint8)[:, None].repeat(50, 1))
    config.center_crop = True
    pixels = preprocess(
        image.convert("RGB"), config, Framing.of(load_image_text(config), config, False).view(0, 0), Size(40, 24)
    )
    rows = (pixels[0, :, 0] + 1) * 127.5
    step = 90 / 43
    torch.testing.assert_close(rows, (torch.arange(40) + 2 + 0.5) * step - 0.5, rtol=0, atol=0.6)


def test_micro_conditions_name_the_bucket(config) -> None:
    found = {}
    for batch in batches(replace(config, random_flip=True), tiny_xl_pipeline(), 12):
        for ids, x0 in zip(batch.cond["time_ids"].int().tolist(), batch.x0, strict=True):
            assert [side // 4 for side in ids[4:]] == list(x0.shape[1:])
            found[tuple(ids[:2])] = tuple(ids[4:])
    assert found.keys() == set(SIZES)
    for (h, w), target in found.items():
        assert target == ((32, 32) if 4 / 5 < h / w < 5 / 4 else (40, 24) if h > w else (24, 40))


@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_continues(config, workers) -> None:
    config = replace(config, random_flip=True, num_crops=2)
    pipe = tiny_xl_pipeline()
    straight = batches(config, pipe, 9, rank=1, world_size=2)
    resumed = batches(replace(config, dataloader_num_workers=workers), pipe, 4, start=5, rank=1, world_size=2)
    for one, two in zip(straight[5:], resumed, strict=True):
        assert torch.equal(one.x0, two.x0)
        assert one.cond.keys() == two.cond.keys()
        assert all(torch.equal(one.cond[name], two.cond[name]) for name in one.cond)


def test_ranks_get_the_same_shapes(config) -> None:
    ranks = [batches(config, tiny_pipeline(), 8, rank=rank, world_size=2) for rank in range(2)]
    for one, two in zip(*ranks, strict=True):
        assert one.x0.shape == two.x0.shape
        assert not torch.equal(one.x0, two.x0)


def test_buckets_and_squares_share_a_cache_folder(config) -> None:
    pipe, folder = tiny_pipeline(), Path(config.latent_cache_dir)
    batches(config, pipe, 1)
    names = {path.name for path in folder.iterdir()}
    squares = replace(config, aspect_ratio_buckets=False, bucket_step=64)
    square = batches(squares, pipe, 4)
    assert {batch.x0.shape for batch in square} == {(2, 4, 8, 8)}
    assert len({path.name for path in folder.iterdir()} - names) == 1
    again = batches(replace(squares, cache_latents=False), pipe, 4)
    assert all(torch.equal(one.x0, two.x0) for one, two in zip(square, again, strict=True))


def test_the_count_of_each_bucket_is_told(config, caplog) -> None:
    with caplog.at_level("INFO", "cm_diffusers.data.framing"):
        Framing.of(load_image_text(config).select(range(10)), config, sized=False)
    assert caplog.messages == ["Images by bucket (height x width): 32x32: 4, 40x24: 3, 24x40: 3."]


def test_steps_the_vae_cannot_take(config) -> None:
    with pytest.raises(ValueError, match="--bucket_step 2 is not a multiple of 4, as the VAE needs: take 4"):
        batches(replace(config, bucket_step=2), tiny_pipeline(), 1)
    with pytest.raises(ValueError, match="--bucket_step must be at least 1, but it is 0"):
        batches(replace(config, bucket_step=0), tiny_pipeline(), 1)


def test_pixel_training_has_no_buckets(config) -> None:
    with pytest.raises(ValueError, match="--aspect_ratio_buckets is for training on captions"):
        image_batches(config, 0)


def test_a_student_trains_on_buckets(config, tmp_path) -> None:
    tiny_xl_pipeline().save_pretrained(tmp_path / "teacher")
    flags = data_flags(Path(config.train_data_dir), tmp_path / "cache")
    flags |= {
        "pretrained_teacher_model": tmp_path / "teacher",
        "output_dir": tmp_path / "student",
        "max_train_steps": 3,
    }
    run_script("distill_lcm", **flags, aspect_ratio_buckets=True, bucket_step=8, unet_time_cond_proj_dim=16)
    assert (tmp_path / "student" / "pipeline" / "model_index.json").is_file()
