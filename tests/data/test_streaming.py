"""Data read while training: tar shards and parquet files, resumed, shared between ranks, damaged."""

import gzip
import io
import json
import logging
import os
import tarfile
import threading
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from pyarrow import parquet
from tiny_xl import tiny_xl_pipeline

from cm_diffusers.data import streamed
from cm_diffusers.data.cache import Vae
from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.sampler import SHUFFLE, ahead
from cm_diffusers.data.sources import DataConfig, load_image_text
from cm_diffusers.data.streaming import streaming_batches
from cm_diffusers.data.tars import tar_rows, tar_shards
from cm_diffusers.data.text_image import text_image_batches
from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import Latents
from cm_diffusers.models.families.latents import posterior


FILES, ROWS = 4, 5  # 20 samples in all
BROKEN = b"no image"
NOT_KEPT = {"latent_cache_dir": DataConfig().latent_cache_dir}  # of a stream of tables


def picture(number: int) -> Image.Image:
    """One colour, so that the latents tell the image whatever the crop."""
    return Image.new("RGB", (12, 10), (number * 12, 255 - number * 12, 128))


def encoded(number: int, kind: str = "PNG") -> bytes:
    picture(number).save(buffer := io.BytesIO(), format=kind)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def tars(folder: Path, changes: dict[int, dict[str, bytes]] | None = None) -> str:
    for file in range(FILES):
        members = {}
        for i in range(file * ROWS, (file + 1) * ROWS):
            sample = {"png": encoded(i), "txt": f"c{i}".encode()} | (changes or {}).get(i, {})
            members |= {f"{i:03}.{field}": content for field, content in sample.items() if content}
        write_tar(folder / f"{file:02}.tar", members)
    return str(folder / f"{{00..{FILES - 1:02}}}.tar")


def parquets(folder: Path) -> str:
    folder.mkdir()
    for file in range(FILES):
        rows = range(file * ROWS, (file + 1) * ROWS)
        table = {"image": [{"bytes": encoded(i), "path": None} for i in rows], "text": [f"c{i}" for i in rows]}
        parquet.write_table(pa.table(table), folder / f"{file}.parquet")
    return str(folder)


@pytest.fixture
def config(tmp_path) -> DataConfig:
    return DataConfig(
        train_shards_path_or_url=tars(tmp_path / "tars"),
        streaming=True,
        resolution=8,
        random_flip=True,
        train_batch_size=3,
        shuffle_buffer_size=4,
        encode_batch_size=2,
        proportion_empty_prompts=0.1,
        cache_dir=str(tmp_path / "hf"),
        latent_cache_dir=str(tmp_path / "cache"),
    )


@pytest.fixture(params=["tar", "parquet"])
def either(request, config, tmp_path) -> DataConfig:
    if request.param == "tar":
        return config
    return tables(config, tmp_path)


def tables(config, tmp_path) -> DataConfig:
    folder = parquets(tmp_path / "parquet")
    return replace(config, train_shards_path_or_url=None, train_data_dir=folder, **NOT_KEPT)


def encode_prompts(texts: list[str]) -> dict[str, torch.Tensor]:
    codes = torch.tensor([[ord(c) for c in text.ljust(3, "\0")] for text in texts])
    return {"encoder_hidden_states": codes.reshape(-1, 1, 3).float()}


def captions(batch, kind="cond") -> list[str]:
    states = getattr(batch, kind)["encoder_hidden_states"]
    return ["".join(map(chr, row.flatten().int().tolist())).rstrip("\0") for row in states]


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2, scaling_factor=0.5).eval()
    return Encoders(Vae.from_model(vae), encode_prompts, "fake")


def take(config, encoders, number, start=0, seed=0, **position):
    return list(islice(streaming_batches(config, encoders, seed, **position)(start), number))


def plain(config, **changes) -> DataConfig:
    """Nothing random but the order."""
    return replace(config, proportion_empty_prompts=0.0, train_batch_size=5, **changes)


def assert_same(one, two) -> None:
    assert torch.equal(one.x0, two.x0)
    for a, b in ((one.cond, two.cond), (one.uncond, two.uncond)):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("rank", [0, 1])
def test_restart_continues_bit_for_bit_over_epochs(either, encoders, rank):
    """Batches of 3 from 10 samples a rank: starts before, at and after the ends of epochs."""
    whole = take(either, encoders, 9, rank=rank, world_size=2)
    for start in (1, 3, 4, 7):
        for one, two in zip(take(either, encoders, 2, start, rank=rank, world_size=2), whole[start:], strict=False):
            assert_same(one, two)
    assert not torch.equal(whole[0].x0, take(either, encoders, 1, rank=rank, world_size=2, seed=1)[0].x0)


def test_what_was_seen_is_neither_decoded_nor_encoded(config, encoders, monkeypatch):
    seen = []
    decode = Image.open
    monkeypatch.setattr(Image, "open", lambda *a: seen.append(a) or decode(*a))
    batches = streaming_batches(config, encoders, 0)(6)
    next(batches)
    batches.close()
    assert len(seen) == 6, "batch 6 and, ahead, batch 7"


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_batch_is_made_while_one_is_used_and_not_by_who_uses_it(either, encoders, workers):
    """Its host may wait for the device, and the one that trains does not."""
    made, encoded_again = [], threading.Event()

    def encode(texts: list[str]) -> dict[str, torch.Tensor]:
        made.append(threading.get_ident())
        if texts != [""] and len(set(made)) > 1:
            encoded_again.set()
        return encode_prompts(texts)

    config = replace(either, dataloader_num_workers=workers, encode_batch_size=3)
    batches = streaming_batches(config, replace(encoders, encode_prompts=encode), 0)(0)
    next(batches)
    assert encoded_again.wait(60), "though nobody has asked for it"
    next(batches)
    batches.close()
    first, *others = made
    assert first == threading.get_ident()
    assert set(others[2:]).isdisjoint({first})


def test_what_is_made_ahead_is_made_on_the_gpu_of_who_uses_it(monkeypatch):
    """A thread begins on the first."""
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: told.append((gpu, threading.get_ident())))
    numbers = ahead(count())
    assert [next(numbers), next(numbers)] == [0, 1]
    numbers.close()
    ((gpu, thread),) = told
    assert gpu == 3
    assert thread != threading.get_ident()


def test_what_is_wrong_with_a_batch_is_said_when_it_is_asked_for(either, encoders):
    def encode(texts: list[str]) -> dict[str, torch.Tensor]:
        calls.append(texts)
        if len(calls) > 2:
            raise UserError("one sentence")
        return encode_prompts(texts)

    calls: list[list[str]] = []
    config = replace(either, encode_batch_size=3)
    batches = streaming_batches(config, replace(encoders, encode_prompts=encode), 0)(0)
    next(batches)
    with pytest.raises(UserError, match="one sentence"):
        next(batches)


def test_a_pipeline_may_be_sampled_while_its_prompts_are_encoded():
    """Of a tokenizer in use by two threads one of them finds that it is "already borrowed"."""
    pipe = tiny_xl_pipeline()
    encoders, expected = Encoders.from_pipeline(pipe), Encoders.from_pipeline(pipe).encode_prompts(["a", ""])
    parts = [pipe.tokenizer, pipe.tokenizer_2]
    pipe.tokenizer = pipe.tokenizer_2 = None
    found = encoders.encode_prompts(["a", ""])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not {*map(id, parts)} & {*map(id, encoders.tokenizers)}


def test_every_epoch_holds_every_sample_once_in_another_order(either, encoders):
    order = [text for batch in take(plain(either), encoders, 12) for text in captions(batch)]
    epochs = [order[:20], order[20:40], order[40:]]
    assert all(sorted(epoch) == sorted(f"c{i}" for i in range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_files_order_is_a_permutation_of_our_own(either, encoders, monkeypatch):
    """Epoch e reads them in the order of (seed, SHUFFLE, e, 0), whatever `datasets` does, and never waits.

    Blocks of one sample leave the rows of a table as they are; a window of a tar is at least one file.
    """
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("slept"))
    order = [
        text for batch in take(plain(either, shuffle_buffer_size=1), encoders, 12, seed=7) for text in captions(batch)
    ]

    def shuffled(*key: int, number: int) -> list[int]:
        return np.random.default_rng([7, SHUFFLE, *key]).permutation(number).tolist()

    expected = []
    for epoch in range(3):
        for window, file in enumerate(shuffled(epoch, 0, number=FILES)):
            rows = range(ROWS) if either.train_data_dir else shuffled(epoch, 1 + window, number=ROWS)
            expected += [f"c{file * ROWS + i}" for i in rows]
    assert order == expected


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_read_different_samples(either, encoders, ranks):
    """Two divide the four files, three do not."""
    config = replace(plain(either), train_batch_size=1)
    lengths = [10, 10] if ranks == 2 else [7, 7, 6]
    found = [
        captions(batch)[0]
        for rank, length in enumerate(lengths)
        for batch in take(config, encoders, length, rank=rank, world_size=ranks)
    ]
    assert sorted(found) == sorted(f"c{i}" for i in range(20))


def test_samples_are_shuffled_within_blocks(config, encoders, tmp_path):
    one_file = plain(tables(config, tmp_path))
    for file in range(1, FILES):
        (tmp_path / "parquet" / f"{file}.parquet").unlink()
    orders = {size: captions(take(replace(one_file, shuffle_buffer_size=size), encoders, 1)[0]) for size in (1, 3, 99)}
    assert orders[1] == ["c0", "c1", "c2", "c3", "c4"]
    assert set(orders[3][:3]) == {"c0", "c1", "c2"}
    assert orders[3] != orders[1] != orders[99]


def test_images_go_with_their_captions(config, encoders):
    """The cached source's latents of the same captions; a colour does not depend on the crop."""
    config = plain(config, vae_dtype="float32")
    cached = replace(config, streaming=False, shuffle_buffer_size=1000, cache_latents=False, center_crop=True)
    expected = {}
    for batch in islice(text_image_batches(cached, encoders, 0)(0), 4):
        expected |= dict(zip(captions(batch), batch.x0.mean((2, 3)), strict=True))
    for batch in take(config, encoders, 4):
        for text, latent in zip(captions(batch), batch.x0.mean((2, 3)), strict=True):
            distances = {other: (value - latent).abs().max() for other, value in expected.items()}
            assert distances[text] < 0.7, "posterior noise"
    assert len(expected) == 20


def test_share_of_empty_prompts_and_the_unconditional_branch(config, encoders):
    batches = take(replace(config, proportion_empty_prompts=0.5), encoders, 100)
    texts = [text for batch in batches for text in captions(batch)]
    assert 0.4 < texts.count("") / len(texts) < 0.6
    assert {text for batch in batches for text in captions(batch, "uncond")} == {""}


def test_crops_and_flips_are_drawn_for_every_batch(tmp_path, config, encoders):
    gradient = np.tile(np.arange(16, dtype=np.uint8)[None, :, None] * 15, (8, 1, 3))
    Image.fromarray(gradient).save(buffer := io.BytesIO(), format="PNG")
    path = write_tar(tmp_path / "one.tar", {"0.png": buffer.getvalue(), "0.txt": b"c"})
    config = replace(config, train_shards_path_or_url=str(path), train_batch_size=1)

    class Pixels:  # a VAE that shows what it is given
        dtype, device = torch.float32, torch.device("cpu")

        def eval(self):
            return self

        def to(self, *_):
            return self

        def encode(self, pixels):
            distribution = type("D", (), {"mean": pixels, "std": torch.zeros_like(pixels)})
            return type("E", (), {"latent_dist": distribution})

    shown = replace(encoders, vae=Vae(Pixels, "pixels", Latents(posterior, None, 0.0, 1.0, 1, 3)))
    rows = [batch.x0[0, 0, 0] for batch in take(config, shown, 60)]
    lows = {round((min(row[0], row[-1]).item() + 1) * 127.5 / 15) for row in rows}
    assert lows == set(range(9)), "the crop's left end, every place"
    assert 15 < sum(bool(row[0] > row[-1]) for row in rows) < 45
    centred = take(replace(config, center_crop=True, random_flip=False), shown, 3)
    assert [batch.x0[0, 0, 0, 0].item() for batch in centred] == pytest.approx([4 * 15 / 127.5 - 1] * 3)


def test_sdxl_gets_its_sizes_and_crops(config):
    pipe = tiny_xl_pipeline()
    config = replace(config, resolution=16, train_batch_size=4, proportion_empty_prompts=1.0)
    (batch,) = take(config, Encoders.from_pipeline(pipe), 1)
    ids = batch.cond["time_ids"]
    assert ids[:, :2].tolist() == [[10, 12]] * 4  # height, width of the file
    assert ids[:, 4:].tolist() == [[16, 16]] * 4
    assert ids[:, 2].unique().tolist() == [0]  # resized to 16 x 19
    assert len(ids[:, 3].unique()) > 1
    assert 0 <= ids[:, 3].min() <= ids[:, 3].max() <= 3
    assert torch.equal(batch.uncond["time_ids"], ids)
    assert batch.cond["text_embeds"].shape == (4, 20)
    assert not batch.cond["encoder_hidden_states"].any(), "SDXL's empty prompt is zeros"


def test_samples_that_lack_something_are_counted_and_skipped(tmp_path, config, encoders, caplog):
    changes = {0: {"txt": b""}, 6: {"png": b""}, 7: {"png": BROKEN}, 12: {"txt": b" \n"}}
    config = plain(config, train_shards_path_or_url=tars(tmp_path / "damaged", changes))
    with caplog.at_level(logging.WARNING, "cm_diffusers.data.found"):
        stream = streaming_batches(config, encoders, 0)
        known = "left out, samples without a caption: 1 (000); left out, samples without an image: 1 (006)."
        assert caplog.messages[-1].endswith(known)  # by the names in the tar
        texts = [text for batch in islice(stream(0), 4) for text in captions(batch)]
    assert not {"c0", "c6", "c7", "c12"} & set(texts)
    assert "so far left out, samples whose image cannot be read: 1 (007.png)" in caplog.text
    assert stream.found.skipped["samples without a caption"].names == ["000", "012.png"]


def test_an_unreadable_image_does_not_move_the_others(tmp_path, config, encoders):
    """The sample after it takes its place, so that a resume need not decode."""
    changes = {3: {"png": BROKEN}, 9: {"png": BROKEN}}
    config = plain(config, train_shards_path_or_url=tars(tmp_path / "damaged", changes))
    whole = take(config, encoders, 9)
    intact = take(replace(config, train_shards_path_or_url=tars(tmp_path / "whole")), encoders, 10)
    found, expected = ([text for batch in batches for text in captions(batch)] for batches in (whole, intact))
    for text, wanted, following in zip(found, expected, expected[1:], strict=False):
        assert text == (following if wanted in ("c3", "c9") else wanted)
    for start in (2, 5, 8):
        assert_same(take(config, encoders, 1, start)[0], whole[start])


def test_tables_are_read_apart_with_the_same_batches(tmp_path, config, encoders, monkeypatch):
    """From batch 3 on, over epochs, and with samples that lack something."""
    config = tables(config, tmp_path)
    path = tmp_path / "parquet" / "0.parquet"
    rows = parquet.read_table(path).to_pylist()
    rows[1]["image"]["bytes"], rows[2]["text"] = BROKEN, " "
    parquet.write_table(pa.Table.from_pylist(rows), path)
    decode, state = streamed.decode_image, torch.get_rng_state()

    def decode_and_tell(record):
        (tmp_path / f"decoded-by-{os.getpid()}").touch()
        return decode(record)

    alone = streaming_batches(config, encoders, 0)
    expected = [*islice(alone(3), 14)]
    monkeypatch.setattr(streamed, "decode_image", decode_and_tell)
    apart = streaming_batches(replace(config, dataloader_num_workers=3), encoders, 0)
    for one, two in zip(expected, islice(apart(3), 14), strict=True):
        assert_same(one, two)
        assert one.texts == two.texts
    assert torch.equal(torch.get_rng_state(), state)
    assert alone.found.skipped == apart.found.skipped
    assert len(alone.found.skipped) == 2
    (told,) = tmp_path.glob("decoded-by-*")
    assert told.name != f"decoded-by-{os.getpid()}"


def test_what_is_wrong_is_one_sentence_also_from_another_process(tmp_path, config, encoders):
    config = replace(tables(config, tmp_path), dataloader_num_workers=2)
    for path in (tmp_path / "parquet").glob("*.parquet"):
        rows = [row | {"text": ""} for row in parquet.read_table(path).to_pylist()]
        parquet.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(
        ValueError, match=r"^None of the 20 samples of .* left out, samples without a caption: 20 "
    ) as found:
        next(streaming_batches(config, encoders, 0)(0))
    assert "\n" not in str(found.value)


def test_members_of_samples_may_differ(tmp_path):
    members = {
        "a/0.jpg": encoded(0, "JPEG"), "a/0.json": json.dumps({"caption": "from json", "w": 1}).encode(),
        "a/1.webp": encoded(1, "WEBP"), "a/1.txt": b"from txt\n", "a/1.json": json.dumps({"w": "many"}).encode(),
        "b/1.seg.png": encoded(2), "b/1.png": encoded(3), "b/1.json": json.dumps({"caption": ["x", "y"]}).encode(),
        "b/2.png": encoded(4), "b/2.json": b"not json", "b/._2.png": BROKEN,
    }  # fmt: skip
    rows = list(tar_rows([str(write_tar(tmp_path / "x.tar", members))], "png", "caption"))
    assert [row["png"]["path"] for row in rows] == ["a/0.jpg", "a/1.webp", "b/1.png", "b/2.png"]
    assert [row["caption"] for row in rows] == [["from json"], ["from txt"], ["x", "y"], [""]]
    assert rows[2]["png"]["bytes"] == encoded(3)
    assert rows[0]["__fields__"] == "jpg, json (caption, w)"


def test_shard_patterns(tmp_path, monkeypatch):
    monkeypatch.setattr("cm_diffusers.data.tars.get_filesystem_class", lambda protocol: None)
    for name in ("08", "09", "10", "x"):
        write_tar(tmp_path / f"{name}.tar", {})
    names = [str(tmp_path / f"{name}.tar") for name in ("08", "09", "10", "x")]
    assert tar_shards(f"{tmp_path}/{{08..10}}.tar") == names[:3]
    assert tar_shards(f"{tmp_path}/{{x,09}}.tar") == [names[3], names[1]]
    assert tar_shards(f"{tmp_path}/*.tar") == names
    assert tar_shards("https://host/{0..1}.tar?download=1") == [f"https://host/{i}.tar?download=1" for i in (0, 1)]
    with pytest.raises(ValueError, match=r"names 4 shards or patterns, of which 1 are not there, such as .*11\.tar"):
        tar_shards(f"{tmp_path}/{{08..11}}.tar")
    with pytest.raises(ValueError, match="1 are not there"):
        tar_shards(f"{tmp_path}/y*.tar")


def test_tars_load_without_streaming_and_follow_the_files(tmp_path, config):
    config = replace(config, streaming=False, shuffle_buffer_size=1000)
    first = load_image_text(config)
    assert first["text"][:] == [[f"c{i}"] for i in range(20)]
    assert first[3]["image"]["bytes"] == encoded(3)
    tars(tmp_path / "tars", {0: {"txt": b"another"}})
    assert load_image_text(config)["text"][0] == ["another"]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("damage", ["cut", "no tar", "cut gzip"])
def test_damaged_shards(tmp_path, config, encoders, damage, streaming):
    path = write_tar(tmp_path / "x.tar", {f"{i}.png": np.random.bytes(3000) for i in range(9)})
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:9999], "no tar": b"<html>" * 999, "cut gzip": gzip.compress(whole)[:9999]}[damage])
    config = replace(config, train_shards_path_or_url=str(path), streaming=streaming, shuffle_buffer_size=1000)
    with pytest.raises(
        ValueError, match=r"^--train_shards_path_or_url .*: The shard .*x\.tar cannot be read as a tar file"
    ):
        take(config, encoders, 1) if streaming else load_image_text(config)


@pytest.mark.parametrize("streaming", [True, False])
def test_truncated_parquet_files(tmp_path, config, encoders, streaming):
    folder = parquets(tmp_path / "parquet")
    path = Path(folder) / "2.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    config = replace(config, train_shards_path_or_url=None, train_data_dir=folder, streaming=streaming, **NOT_KEPT)
    with pytest.raises(
        ValueError, match=r"^--train_data_dir: the file .*2\.parquet cannot be read: Parquet magic .*\.$"
    ):
        take(config, encoders, 1) if streaming else load_image_text(replace(config, shuffle_buffer_size=1000))


@pytest.mark.parametrize("streaming", [True, False])
def test_data_sets_out_of_reach(config, encoders, streaming):
    config = replace(
        config, train_shards_path_or_url=None, dataset_name="nobody/nothing", streaming=streaming, **NOT_KEPT
    )
    with pytest.raises(ValueError, match=r"^--dataset_name nobody/nothing cannot be read: .*\.$") as error:
        take(config, encoders, 1) if streaming else load_image_text(replace(config, shuffle_buffer_size=1000))
    assert "\n" not in str(error.value)


def test_cached_tars_without_the_caption_entry(tmp_path, config):
    change = {"txt": b"", "json": b'{"caption": "c", "w": 1}'}
    path = tars(tmp_path / "bad", dict.fromkeys(range(20), change))
    config = replace(config, train_shards_path_or_url=path, streaming=False, shuffle_buffer_size=1000)
    with pytest.raises(
        ValueError, match=r"None of the 20 samples .*: they hold \[png, json \(caption, w\)\]; name what"
    ):
        load_image_text(config)
    assert load_image_text(config, []).column_names == ["image"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"txt": b""},
            r"None of the 20 samples of .* has both an image \(image\) and a caption \(text\): they hold \[png\]",
        ),
        ({"png": b""}, r"they hold \[txt\]"),
        ({"txt": b"", "json": b'{"caption": "c", "w": 1}'}, r"they hold \[png, json \(caption, w\)\]"),
        ({"png": BROKEN}, "None of the images of a whole epoch can be read"),
    ],
)
def test_data_without_a_usable_sample(tmp_path, config, encoders, change, message):
    config = replace(config, train_shards_path_or_url=tars(tmp_path / "bad", dict.fromkeys(range(20), change)))
    with pytest.raises(ValueError, match=message):
        take(config, encoders, 1)


def test_more_processes_than_samples(tmp_path, config, encoders):
    table = {"image": [{"bytes": encoded(0), "path": None}], "text": ["c"]}
    parquet.write_table(pa.table(table), tmp_path / "one.parquet")
    changes = {"train_shards_path_or_url": None, "train_data_dir": str(tmp_path)} | NOT_KEPT
    with pytest.raises(ValueError, match=r"gave this process no sample: it is empty, or has fewer"):
        take(replace(config, **changes), encoders, 1, rank=1, world_size=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data_dir": "x"}, "exactly one is needed and --train_data_dir and --train_shards_path_or_url were given"),
        ({"train_shards_path_or_url": None}, "exactly one is needed and none was given"),
        ({"train_shards_path_or_url": None, "train_data_dir": ".", **NOT_KEPT}, "reads parquet files from --train_data_dir"),
        ({"dataset_config_name": "x"}, "--dataset_config_name has no effect with --train_shards_path_or_url"),
        ({"train_shards_path_or_url": None, "train_data_dir": ".", "cache_latents": False, **NOT_KEPT},
         "--cache_latents has no effect with --streaming of tables"),
        ({"dataset_split": "test"}, "--dataset_split has no effect with --train_shards_path_or_url"),
        ({"aspect_ratio_buckets": True}, "--aspect_ratio_buckets has no effect with --streaming"),
        ({"num_crops": 2}, "--num_crops has no effect with --streaming"),
        ({"max_train_samples": 9}, "--max_train_samples has no effect with --streaming"),
        ({"train_shards_path_or_url": None, "train_data_dir": "."}, "--latent_cache_dir has no effect with --streaming of"),
        ({"shuffle_buffer_size": 0}, "--shuffle_buffer_size must be at least 1, but it is 0"),
    ],
)  # fmt: skip
def test_wrong_settings(config, encoders, changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        streaming_batches(replace(config, **changes), encoders, 0)


def test_missing_column_lists_the_columns_found(config, encoders, tmp_path):
    config = tables(config, tmp_path)
    with pytest.raises(ValueError, match="no column named caption: choose from the columns found: image, text"):
        streaming_batches(replace(config, caption_column="caption"), encoders, 0)


def test_who_reads_images_whole_refuses_to_stream(config, encoders):
    with pytest.raises(ValueError, match="--streaming does not act here"):
        text_image_batches(config, encoders, 0)
    with pytest.raises(ValueError, match="--shuffle_buffer_size has no effect without --streaming"):
        text_image_batches(replace(config, streaming=False), encoders, 0)
