import io
import json
import logging
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from pyarrow import parquet
from tiny import tiny_pipeline
from tiny_xl import tiny_xl_pipeline
from transformers import HfArgumentParser

from cm_diffusers.data.cache import Vae, cached_posteriors, folder_fingerprint, module_fingerprint
from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.framing import Framing
from cm_diffusers.data.images import image_batches
from cm_diffusers.data.preprocessing import View, decode_image, preprocess
from cm_diffusers.data.sampler import Position, batch_rows
from cm_diffusers.data.sources import DataConfig, load_image_text
from cm_diffusers.data.text_image import text_image_batches, token_batches


RESOLUTION, ROWS = 8, 10


def picture(number: int, width: int = 12, height: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(number: int) -> bytes:
    picture(number).save(buffer := io.BytesIO(), format="PNG")
    return buffer.getvalue()


def write_parquet(folder: Path, captions=None, images=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    images = images or [png(i) for i in range(ROWS)]
    columns = {"image": [{"bytes": b, "path": None} for b in images], "label": list(range(len(images)))}
    columns["text"] = captions or [f"caption {i}" for i in range(len(images))]
    parquet.write_table(pa.table(columns), folder / "data.parquet")
    return folder


@pytest.fixture
def config(tmp_path) -> DataConfig:
    return DataConfig(
        train_data_dir=str(write_parquet(tmp_path / "set")),
        resolution=RESOLUTION,
        center_crop=True,
        train_batch_size=4,
        encode_batch_size=4,
        cache_dir=str(tmp_path / "hf"),
        latent_cache_dir=str(tmp_path / "latents"),
    )


@pytest.fixture(scope="module")
def model() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2, scaling_factor=0.5).eval()


@pytest.fixture
def vae(model) -> Vae:
    return Vae.from_model(model)


def encode_prompts(texts: list[str]) -> dict[str, torch.Tensor]:
    """(N, 2, 3), told apart by the text: the first character codes, 0 for none."""
    codes = torch.tensor([[ord(c) for c in text[:6].ljust(6, "\0")] for text in texts])
    return {"encoder_hidden_states": codes.reshape(-1, 2, 3).float() / 8}


def text_of(embedding: torch.Tensor) -> list[str]:
    return ["".join(map(chr, (row.flatten() * 8).int().tolist())).rstrip("\0") for row in embedding]


def refuse(*_) -> None:
    raise AssertionError("must not be called")


def latents(config, vae, seed=0, encode=encode_prompts, **position):
    return text_image_batches(config, Encoders(vae, encode, "fake"), seed, **position)


def first(batches, count=1, start=0):
    return list(islice(batches(start), count))


def assert_same(one, two) -> None:
    assert torch.equal(one.x0, two.x0)
    for a, b in ((one.cond, two.cond), (one.uncond, two.uncond)):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


# ---- sampler


def test_ranks_share_every_epoch():
    positions = [Position(3, rank, 3) for rank in range(3)]
    rows = [batch_rows(k, 5, 30, position) for k in range(4) for position in positions]
    assert sorted(np.concatenate(rows[:6])) == list(range(30))
    assert sorted(np.concatenate(rows[6:])) == list(range(30))
    assert not np.array_equal(np.concatenate(rows[:6]), np.concatenate(rows[6:]))


def test_batch_spans_epochs_without_partial_batches():
    rows = np.concatenate([batch_rows(k, 4, 3, Position(0)) for k in range(3)])
    assert rows.shape == (12,)
    assert all(sorted(rows[i : i + 3]) == [0, 1, 2] for i in range(0, 12, 3))


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_is_a_pure_function_of_its_number(config, vae, workers):
    config = replace(config, random_flip=True, center_crop=False, num_crops=2, proportion_empty_prompts=0.3)
    batches = latents(config, vae, rank=1, world_size=2)
    straight = first(batches, 6)
    state = torch.get_rng_state()
    resumed = first(latents(replace(config, dataloader_num_workers=workers), vae, rank=1, world_size=2), 3, start=3)
    assert torch.equal(state, torch.get_rng_state())
    for one, two in zip(straight[3:], resumed, strict=True):
        assert_same(one, two)
    other_seed, other_rank = first(latents(config, vae, seed=1))[0], first(latents(config, vae, world_size=2))[0]
    assert not torch.equal(straight[0].x0, other_seed.x0)
    assert not torch.equal(straight[0].x0, other_rank.x0)
    assert not torch.equal(straight[0].x0, straight[1].x0)


# ---- images


def test_pixels_and_labels_are_those_of_the_files(config):
    batches = image_batches(replace(config, train_batch_size=ROWS), 0, label_column="label")
    batch = first(batches)[0]
    assert sorted(batch.cond["class_labels"].tolist()) == list(range(ROWS))
    for pixels, label in zip(batch.x0, batch.cond["class_labels"], strict=True):
        expected = np.asarray(picture(int(label)))[:, 2:10].transpose(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(pixels, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)


def test_image_batches_resume_and_differ_by_epoch(config):
    config = replace(config, random_flip=True, center_crop=False)
    straight, resumed = first(image_batches(config, 0), 5), first(image_batches(config, 0), 2, start=3)
    assert_same(straight[3], resumed[0])
    assert_same(straight[4], resumed[1])


def test_random_flip_mirrors_about_half(config):
    batches = image_batches(replace(config, random_flip=True, train_batch_size=200), 0, label_column="label")
    plain = image_batches(replace(config, train_batch_size=ROWS), 0, label_column="label")
    originals = dict(zip(*(first(plain)[0].cond["class_labels"].tolist(), first(plain)[0].x0), strict=True))
    batch = first(batches)[0]
    kinds = Counter()
    for pixels, label in zip(batch.x0, batch.cond["class_labels"].tolist(), strict=True):
        same, mirrored = torch.equal(pixels, originals[label]), torch.equal(pixels.flip(-1), originals[label])
        assert same or mirrored
        kinds[mirrored] += 1
    assert 70 < kinds[True] < 130


def test_random_crops_reach_both_edges(config):
    batches = image_batches(replace(config, center_crop=False, train_batch_size=400), 0, label_column="label")
    batch = first(batches)[0]
    whole = {i: torch.from_numpy(np.asarray(picture(i)).transpose(2, 0, 1) / 127.5 - 1).float() for i in range(ROWS)}
    offsets = set()
    for pixels, label in zip(batch.x0, batch.cond["class_labels"].tolist(), strict=True):
        found = [o for o in range(5) if torch.allclose(pixels, whole[label][:, :, o : o + 8], atol=1e-6)]
        assert len(found) == 1
        offsets.update(found)
    assert offsets == {0, 1, 2, 3, 4}


def test_large_sets_are_decoded_when_needed(config, monkeypatch):
    kept = first(image_batches(config, 0), 3)
    monkeypatch.setattr("cm_diffusers.data.images.MEMORY_LIMIT", 0)
    for one, two in zip(kept, first(image_batches(config, 0), 3), strict=True):
        assert_same(one, two)


@pytest.mark.parametrize("limit", [0, 2**30])
def test_unreadable_images_are_counted_and_skipped(config, tmp_path, caplog, monkeypatch, limit):
    monkeypatch.setattr("cm_diffusers.data.images.MEMORY_LIMIT", limit)
    images = [png(0), b"not an image", png(2)[:60], None, png(4)]
    folder = write_parquet(tmp_path / "damaged", images=images)
    config = replace(config, train_data_dir=str(folder))
    with caplog.at_level(logging.WARNING):
        batches = image_batches(config, 0, label_column="label")
    (message,) = caplog.messages
    assert message.endswith(
        "damaged: 2 images to train on; left out, images that cannot be read: 2 (row 1, row 2); "
        "left out, images that are not there: 1 (row 3)."
    )
    seen = torch.cat([batch.cond["class_labels"] for batch in first(batches, 3)])
    assert set(seen.tolist()) == {0, 4}


def test_no_readable_image(config, tmp_path):
    folder = write_parquet(tmp_path / "damaged", images=[b"x", b"y"])
    with pytest.raises(
        ValueError,
        match=r"None of the 2 images of .*damaged can be used: left out, .* cannot be read: 2 \(row 0, row 1\)\.$",
    ):
        image_batches(replace(config, train_data_dir=str(folder)), 0)


# ---- preprocessing


def test_interpolation_acts(config):
    image = picture(0, 40, 20)
    results = {name: preprocess(image, replace(config, interpolation_type=name), View()) for name in
               ("bilinear", "bicubic", "lanczos", "nearest")}  # fmt: skip
    assert len({tuple(value.flatten().tolist()) for value in results.values()}) == 4
    nearest = torch.from_numpy(np.asarray(picture(0, 40, 20).resize((16, 8), Image.NEAREST)).copy())
    assert torch.equal(results["nearest"], nearest[:, 4:12].permute(2, 0, 1).float().div(127.5).sub(1))


@pytest.mark.parametrize("size", [(3, 5), (7, 100), (8, 8), (1000, 9)])
def test_every_shape_becomes_a_square(config, size):
    assert preprocess(picture(1, *size), config, View(1.0, 1.0)).shape == (3, RESOLUTION, RESOLUTION)


def test_rotated_and_grey_images_are_upright_rgb():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter
    Image.new("L", (4, 2), 9).save(buffer := io.BytesIO(), format="PNG", exif=exif)
    image = decode_image({"bytes": buffer.getvalue(), "path": None})
    assert image.size == (2, 4)
    assert image.getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize("orientation", [1, 6])
def test_sixteen_bits_are_scaled_down(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    levels = np.array([[0, 256, 32768], [65535, 255, 511]], dtype=np.uint16)
    Image.fromarray(levels).save(buffer := io.BytesIO(), format="PNG", exif=exif)
    found = np.asarray(decode_image({"bytes": buffer.getvalue(), "path": None}))[..., 0]
    expected = np.array([[0, 1, 128], [255, 0, 1]])
    assert found.tolist() == (expected if orientation == 1 else np.rot90(expected, -1)).tolist()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode):
    pixels = np.array([[[100, 100, 100, 0], [100, 100, 100, 255]]], dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer := io.BytesIO(), format="PNG")
    image = decode_image({"bytes": buffer.getvalue(), "path": None})
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (100,) * 3]


# ---- sources


def test_no_source_and_two_sources(config):
    with pytest.raises(ValueError, match="exactly one is needed and none was given"):
        load_image_text(replace(config, train_data_dir=None))
    with pytest.raises(ValueError, match="exactly one is needed and --dataset_name and --train_data_dir"):
        load_image_text(replace(config, dataset_name="some/set"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bucket_step": 32}, "--bucket_step has no effect without --aspect_ratio_buckets"),
        ({"bucket_max_ratio": 3.0}, "--bucket_max_ratio has no effect without --aspect_ratio_buckets"),
        ({"num_crops": 2}, "--num_crops has no effect with --center_crop"),
        ({"dataset_config_name": "x"}, "--dataset_config_name has no effect without --dataset_name"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers must be at least 0, but it is -1"),
    ],
)
def test_flags_without_effect_or_out_of_range(config, changes, message):
    with pytest.raises(ValueError, match=message):
        load_image_text(replace(config, **changes))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet", "0.txt"])
def test_damaged_captions_name_the_file(config, tmp_path, name):
    write_images(tmp_path / "folder")
    (tmp_path / "folder" / name).write_bytes(
        b'{"file_name": "0.png"' if name != "0.txt" else "caf\xe9".encode("latin-1")
    )
    if name == "metadata.csv":
        (tmp_path / "folder" / name).write_bytes(b"a,b\n1\n2,3,4\n")
    with pytest.raises(ValueError, match=rf"^--train_data_dir: the file .*{name} cannot be read: .*\.$") as error:
        load_image_text(replace(config, train_data_dir=str(tmp_path / "folder")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("resolution", 0), ("resolution", -8), ("train_batch_size", 0), ("num_crops", 0), ("max_train_samples", 0)],
)
def test_counts_must_be_positive(config, name, value):
    with pytest.raises(ValueError, match=f"--{name} must be at least 1, but it is {value}"):
        load_image_text(replace(config, **{name: value}))


def test_share_and_filter_are_checked(config):
    with pytest.raises(ValueError, match=r"between 0 and 1, but it is 1\.5"):
        load_image_text(replace(config, proportion_empty_prompts=1.5))
    with pytest.raises(ValueError, match="bilinear, bicubic, lanczos, nearest, but it is cubic"):
        load_image_text(replace(config, interpolation_type="cubic"))


def test_missing_column_lists_the_columns_found(config):
    with pytest.raises(ValueError, match=r"no column named caption: .* image, label, text"):
        load_image_text(replace(config, caption_column="caption"))
    with pytest.raises(ValueError, match=r"no column named picture: .* image, label, text"):
        load_image_text(replace(config, image_column="picture"), [])


def test_missing_and_empty_folders(config, tmp_path):
    with pytest.raises(ValueError, match="absent is not a folder"):
        load_image_text(replace(config, train_data_dir=str(tmp_path / "absent")))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no image and no parquet file; among its 0 files: nothing"):
        load_image_text(replace(config, train_data_dir=str(empty)))
    (empty / "notes.md").write_text("x")
    with pytest.raises(ValueError, match=r"among its 1 files: \.md"):
        load_image_text(replace(config, train_data_dir=str(empty)))
    (empty / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(ValueError, match="holds no rows"):
        load_image_text(replace(config, train_data_dir=str(empty)))


def write_images(folder: Path) -> list[dict]:
    folder.mkdir()
    rows = [{"file_name": f"{i}.png", "text": f"caption {i}"} for i in range(3)]
    for i, row in enumerate(rows):
        (folder / row["file_name"]).write_bytes(png(i))
    return rows


def add_captions(folder: Path, rows: list[dict], kind: str) -> None:
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        lines = ["file_name,text", *(f'{row["file_name"]},"{row["text"]}"' for row in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines))
    elif kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    else:
        for row in rows:
            (folder / row["file_name"]).with_suffix(".txt").write_text(row["text"] + "\n")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt"])
def test_image_folders(config, tmp_path, kind):
    rows = write_images(tmp_path / "folder")
    add_captions(tmp_path / "folder", rows, kind)
    dataset = load_image_text(replace(config, train_data_dir=str(tmp_path / "folder")))
    assert dataset.column_names == ["image", "text"]
    assert dataset["text"][:] == ["caption 0", "caption 1", "caption 2"]
    for i, row in enumerate(dataset):
        assert np.array_equal(np.asarray(decode_image(row["image"])), np.asarray(picture(i)))


def test_captions_are_needed_only_where_asked_for(config, tmp_path):
    write_images(tmp_path / "folder")
    config = replace(config, train_data_dir=str(tmp_path / "folder"))
    assert load_image_text(config, []).column_names == ["image"]
    with pytest.raises(ValueError, match="3 images but no captions"):
        load_image_text(config)


def test_metadata_needs_file_names(config, tmp_path):
    write_images(tmp_path / "folder")
    (tmp_path / "folder" / "metadata.jsonl").write_text('{"name": "0.png", "text": "a"}')
    with pytest.raises(ValueError, match=r"needs a column file_name .* the columns found: name, text"):
        load_image_text(replace(config, train_data_dir=str(tmp_path / "folder")))


def test_split_names_a_subfolder(config, tmp_path):
    write_parquet(tmp_path / "both" / "train")
    write_parquet(tmp_path / "both" / "test", images=[png(50)])
    config = replace(config, train_data_dir=str(tmp_path / "both"))
    assert len(load_image_text(config)) == ROWS
    assert len(load_image_text(replace(config, dataset_split="test"))) == 1


def test_dataset_name_loads_with_datasets(config):
    config = replace(config, dataset_name=config.train_data_dir, train_data_dir=None)
    assert load_image_text(config)["text"][:] == [f"caption {i}" for i in range(ROWS)]
    with pytest.raises(ValueError, match="Unknown split"):
        load_image_text(replace(config, dataset_split="dev"))


def test_max_train_samples_is_a_fixed_subset(config):
    subsets = [load_image_text(replace(config, max_train_samples=4))["text"][:] for _ in range(2)]
    assert subsets[0] == subsets[1]
    assert len(set(subsets[0])) == 4
    assert len(load_image_text(replace(config, max_train_samples=99))) == ROWS


def test_config_is_a_command_line():
    args = ["--train_data_dir", "x", "--no_cache_latents", "--random_flip", "--interpolation_type", "lanczos"]
    config = HfArgumentParser(DataConfig).parse_args_into_dataclasses(args)[0]
    assert (config.cache_latents, config.random_flip, config.center_crop) == (False, True, False)
    assert (config.train_data_dir, config.interpolation_type) == ("x", "lanczos")


# ---- latents, embeddings and their cache


def test_latents_are_scaled_samples_of_the_posterior(config, model, vae):
    vae = replace(vae, latents=vae.latents._replace(scale=0.5, shift=0.25))
    batches = first(latents(replace(config, train_batch_size=ROWS), vae), 400)
    number = text_of(batches[0].cond["encoder_hidden_states"])[0]
    assert number == "captio"
    dataset = load_image_text(config)
    pixels = torch.stack([preprocess(decode_image(row["image"]), config, View()) for row in dataset])
    with torch.no_grad():
        posterior = model.encode(pixels).latent_dist
    order = [batch_rows(k, ROWS, ROWS, Position(0)) for k in range(400)]
    draws = torch.stack([batch.x0[np.argsort(rows)] for batch, rows in zip(batches, order, strict=True)])
    error = draws.mean(0) - (posterior.mean - 0.25) * 0.5
    assert (error.abs() / (posterior.std * 0.5) * 20).max() < 5  # standard errors of 400 draws
    torch.testing.assert_close(draws.std(0), posterior.std * 0.5, rtol=0.2, atol=0)


def test_cached_equals_uncached_bit_for_bit(config, vae):
    config = replace(config, random_flip=True, center_crop=False, num_crops=2)
    uncached = first(latents(replace(config, cache_latents=False), vae), 4)
    assert not Path(config.latent_cache_dir).exists()
    for one, two in zip(uncached, first(latents(config, vae), 4), strict=True):
        assert_same(one, two)
    folders = list(Path(config.latent_cache_dir).iterdir())
    assert len(folders) == 4 + 1 + 1  # crops times flips, captions, what is in the files
    assert [len(list(folder.iterdir())) for folder in folders] == [1] * 6


def test_second_run_calls_neither_vae_nor_text_tower(config, vae):
    before = first(latents(config, vae), 3)
    after = first(latents(config, replace(vae, load=refuse), encode=refuse), 3)
    for one, two in zip(before, after, strict=True):
        assert_same(one, two)
    with pytest.raises(AssertionError, match="must not be called"):
        latents(replace(config, cache_latents=False), replace(vae, load=refuse))


@pytest.mark.parametrize(
    "change",
    [
        {"resolution": 6},
        {"interpolation_type": "nearest"},
        {"center_crop": False},
        {"random_flip": True},
        {"vae_dtype": "bfloat16"},
    ],
)
def test_what_changes_an_encoding_changes_its_key(config, vae, change):
    latents(config, vae)
    with pytest.raises(AssertionError, match="must not be called"):
        latents(replace(config, **change), replace(vae, load=refuse))
    with pytest.raises(AssertionError, match="must not be called"):
        latents(config, replace(vae, load=refuse, fingerprint="other"))


def test_caching_continues_after_a_crash(config, model, vae, monkeypatch):
    monkeypatch.setattr("cm_diffusers.data.shards.SHARD_ROWS", 4)
    calls = []

    class Crashing(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def encode(self, pixels):
            calls.append(len(pixels))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return model.encode(pixels)

    broken = replace(vae, load=Crashing)
    with pytest.raises(KeyboardInterrupt):
        latents(config, broken)
    assert {path.suffix for path in Path(config.latent_cache_dir).glob("*/*")} == {".safetensors"}
    continued = first(latents(config, broken), 3)
    assert calls == [4, 4, 4, 2]  # the first shard is not encoded again
    for one, two in zip(continued, first(latents(replace(config, cache_latents=False), vae), 3), strict=True):
        assert_same(one, two)


def test_flips_and_crops_are_cached_variants(config, vae):
    config = replace(config, center_crop=False, random_flip=True, num_crops=3)
    dataset = load_image_text(config)
    framing = Framing.of(dataset, config, sized=False)
    posteriors = cached_posteriors(dataset, framing, vae)
    assert framing.variants == 6
    rows = np.zeros(6, dtype=int)
    mean, std = posteriors[rows, np.arange(6)]
    assert mean.dtype == std.dtype == torch.float16
    assert len({tuple(value.flatten().tolist()) for value in mean}) >= 4  # five crop places: two may coincide
    assert not torch.equal(mean[0], mean[1])


def test_unusable_rows_are_counted_and_skipped(config, vae, tmp_path, caplog):
    images = [png(0), b"junk", png(2), png(3), png(4), None]
    folder = write_parquet(tmp_path / "bad", ["a", "b", "", "  ", "e", ""], images)
    config = replace(config, train_data_dir=str(folder))
    with caplog.at_level(logging.WARNING):
        batches = latents(config, vae)
    (message,) = caplog.messages
    assert message.endswith(
        "bad: 2 images and 2 captions to train on; left out, images that cannot be read: 1 (row 1); "
        "left out, images that are not there: 1 (row 5); left out, images without a caption: 2 (row 2, row 3)."
    )
    assert (batches.found.images, batches.found.captions) == (2, 2)
    assert {reason: counted.number for reason, counted in batches.found.skipped.items()} == {
        "images that cannot be read": 1, "images that are not there": 1, "images without a caption": 2,
    }  # fmt: skip
    seen = {text for batch in first(batches, 4) for text in text_of(batch.cond["encoder_hidden_states"])}
    assert seen == {"a", "e"}


def test_no_usable_row(config, vae, tmp_path):
    config = replace(config, train_data_dir=str(write_parquet(tmp_path / "bad", ["", "b"], [png(0), b"junk"])))
    with pytest.raises(
        ValueError, match=r"None of the 2 images .* cannot be read: 1 \(row 1\); .* without a caption: 1"
    ):
        latents(config, vae)


def test_one_of_several_captions_is_drawn(config, vae, tmp_path):
    folder = write_parquet(tmp_path / "lists", [["x", "y", ""], ["z", None, "w"]], [png(0), png(1)])
    config = replace(config, train_data_dir=str(folder), train_batch_size=200)
    batch = first(latents(config, vae))[0]
    counts = Counter(text_of(batch.cond["encoder_hidden_states"]))
    assert set(counts) == {"x", "y", "z", "w"}
    assert min(counts.values()) > 30
    assert set(text_of(batch.uncond["encoder_hidden_states"])) == {""}
    assert batch.uncond["encoder_hidden_states"].shape == batch.cond["encoder_hidden_states"].shape


def test_captions_must_be_text(config, vae):
    with pytest.raises(ValueError, match=r"--caption_column label must hold a text .* a row holds int"):
        latents(replace(config, caption_column="label"), vae)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_share_of_empty_prompts(config, vae, share):
    config = replace(config, proportion_empty_prompts=share, train_batch_size=400)
    texts = text_of(first(latents(config, vae))[0].cond["encoder_hidden_states"])
    assert texts.count("") / 400 == pytest.approx(share, abs=0.07 if 0 < share < 1 else 0)


def test_embeddings_that_are_not_finite_are_refused(config, vae):
    with pytest.raises(ValueError, match="embeddings are not finite: encode prompts in float32"):
        latents(config, vae, encode=lambda texts: {"encoder_hidden_states": torch.full((len(texts), 1, 1), np.inf)})
    assert len(list(Path(config.latent_cache_dir).glob("*"))) == 2  # the files and the images; no shard of captions


class Tokenizer:
    model_max_length = 2

    def __call__(self, texts, padding=None, truncation=None, return_tensors=None):
        ids = torch.tensor([[int(text.split()[1]) + 1 if text else 0, 7] for text in texts])
        return type("Encoding", (), {"input_ids": ids})


def test_token_batches_match_the_images(config, vae):
    config = replace(config, proportion_empty_prompts=0.0)
    tokens, embedded = first(token_batches(config, vae, Tokenizer(), 0)), first(latents(config, vae))
    ids = tokens[0].cond["input_ids"]
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[row + 1, 7] for row in batch_rows(0, 4, ROWS, Position(0))]
    assert tokens[0].uncond["input_ids"].tolist() == [[0, 7]] * 4
    assert torch.equal(tokens[0].x0, embedded[0].x0)


def test_vae_from_a_folder_is_read_lazily(config, model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "pipe" / "vae")
    vae = Vae.from_pretrained(str(tmp_path / "pipe"))
    assert vae.latents.scale == 0.5
    before = first(latents(config, vae), 2)
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", refuse)
    for one, two in zip(before, first(latents(config, Vae.from_pretrained(str(tmp_path / "pipe"))), 2), strict=True):
        assert_same(one, two)


def test_fingerprints_follow_the_weights(model, tmp_path):
    model.save_pretrained(tmp_path / "one")
    twin = AutoencoderKL.from_pretrained(tmp_path / "one")
    assert module_fingerprint(twin) == module_fingerprint(model)
    with torch.no_grad():
        next(twin.parameters()).view(-1)[0] += 1e-3
    assert module_fingerprint(twin) != module_fingerprint(model)
    twin.save_pretrained(tmp_path / "two")
    assert folder_fingerprint(tmp_path / "one") != folder_fingerprint(tmp_path / "two")
    with pytest.raises(ValueError, match=r"must hold config\.json and \.safetensors weights"):
        folder_fingerprint(tmp_path)


def test_fingerprints_follow_the_configuration(model):
    """Of what neither the weights nor the printed module show, and of nothing that saving adds."""
    before = module_fingerprint(model)
    other = AutoencoderKL.from_config({**model.config, "scaling_factor": 0.7})
    other.load_state_dict(model.state_dict())
    assert module_fingerprint(other) != before
    other.register_to_config(scaling_factor=model.config.scaling_factor, _name_or_path="elsewhere")
    assert module_fingerprint(other) == before


def test_encoders_are_told_apart_by_all_that_acts_on_a_prompt(tmp_path):
    def fingerprint(change=lambda pipe: None, make=tiny_pipeline):
        change(pipe := make())
        return Encoders.from_pipeline(pipe).fingerprint

    changes = [
        lambda pipe: None,
        lambda pipe: setattr(pipe.tokenizer, "model_max_length", 8),
        lambda pipe: setattr(pipe.tokenizer, "pad_token", "a</w>"),
        lambda pipe: setattr(pipe.text_encoder.config, "eos_token_id", 2),
        lambda pipe: setattr(pipe.text_encoder.config, "num_attention_heads", 2),
        lambda pipe: pipe.tokenizer.add_tokens(["zebra"]),
    ]
    assert len({fingerprint(change) for change in changes}) == len(changes)
    of_xl = [*changes[:3], lambda pipe: setattr(pipe.tokenizer_2, "pad_token", "a</w>")]
    assert len({fingerprint(change, tiny_xl_pipeline) for change in of_xl}) == len(of_xl)
    for make in (tiny_pipeline, tiny_xl_pipeline):
        pipe = make()
        pipe.save_pretrained(tmp_path / make.__name__)
        again = type(pipe).from_pretrained(tmp_path / make.__name__)
        Encoders.from_pipeline(again).encode_prompts(["a coat"])
        assert fingerprint(make=lambda again=again: again) == fingerprint(make=make)


def test_encoding_leaves_the_callers_vae_alone(config, model, vae):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    latents(replace(config, vae_dtype="bfloat16"), vae)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.dtype == torch.float32


def test_prepared_images_load(tmp_path):
    """The parquet files of `prepare_fashion_mnist` as `datasets` sees them."""
    folder = Path(__file__).parents[2] / "assets" / "fashion_captioned"
    config = DataConfig(train_data_dir=str(folder), resolution=32, cache_dir=str(tmp_path), dataset_split="test")
    dataset = load_image_text(config, ["text", "label"])
    assert Counter(dataset["label"][:]) == dict.fromkeys(range(10), 500)
    names = dataset.features["label"].names
    assert isinstance(dataset.features["label"], datasets.ClassLabel)
    for row in dataset.select(range(50)):
        name = names[row["label"]]
        phrase = name if name == "trousers" else f"an {name}" if name == "ankle boot" else f"a {name}"
        assert row["text"] == [f"a photo of {phrase}", phrase]
    pixels = preprocess(decode_image(dataset[0]["image"]), config, View())
    assert pixels.shape == (3, 32, 32)
    assert pixels[:, :2].max() == pixels[:, :, -2:].max() == -1  # the black frame around 28x28
    assert pixels.max() > 0


def test_metadata_may_name_files_and_nothing_else(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (4, 4)).save(folder / f"{i}.png")
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{i}.png"}) + "\n" for i in range(3)))
    rows = load_image_text(DataConfig(train_data_dir=str(folder)), [])
    assert [Path(row["image"]["path"]).name for row in rows] == ["0.png", "1.png", "2.png"]
