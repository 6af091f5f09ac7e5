"""Encodings found by row: what inserted and removed rows cost, shares of processes, files read once, and the cache's upkeep."""

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, Value, load_from_disk
from diffusers import AutoencoderKL
from PIL import Image
from processes import run_worker
from safetensors.torch import save_file
from scripts import run_script

from cm_diffusers.data import contents, housekeeping, kept
from cm_diffusers.data import images as pixels
from cm_diffusers.data.cache import Vae
from cm_diffusers.data.captions import Captions
from cm_diffusers.data.contents import Digests
from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.images import image_batches
from cm_diffusers.data.kept import Kept, Wanted, keep
from cm_diffusers.data.keys import Keys, keys_of
from cm_diffusers.data.shards import shard_key
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.data.text_image import text_image_batches


SETTING = shard_key("numbers")


@pytest.fixture
def config(tmp_path) -> DataConfig:
    return DataConfig(latent_cache_dir=str(tmp_path / "cache"))


def wanted(names: Sequence[str], seen: list[str], setting: str = SETTING) -> Wanted:
    """Rows whose encoding is the length of their name and the sum of its characters."""

    def encode(rows: Sequence[int]) -> Iterator[dict[str, torch.Tensor]]:
        for row in rows:
            seen.append(names[row])
            yield {"x": torch.tensor([[len(names[row]), sum(map(ord, names[row]))]])}

    return Wanted(setting, keys_of(names), encode)


def rows_of(found: Kept, number: int) -> list[list[int]]:
    return [tensors["x"][place].tolist() for tensors, place in map(found.row, range(number))]


def expected(names: Sequence[str]) -> list[list[int]]:
    return [[len(name), sum(map(ord, name))] for name in names]


def test_only_new_rows_are_encoded_wherever_they_are_put(config):
    seen, names = [], [f"row {i}" for i in range(10)]
    assert rows_of(keep([wanted(names, seen)], config, "rows", 4)[0], 10) == expected(names)
    assert seen == names
    changed = ["first", *names[:3], "inside", *names[5:], names[2]]  # two put in, two taken out, one twice
    found = keep([wanted(changed, seen)], config, "rows", 4)[0]
    assert rows_of(found, len(changed)) == expected(changed)
    assert seen[10:] == ["first", "inside"]
    assert found.fill("x", np.zeros((len(changed), 2), np.int64)).tolist() == expected(changed)
    some = Kept.together(len(changed) + 1, [(np.arange(len(changed)), found)])
    assert some.fill("x", np.full((len(changed) + 1, 2), 7)).tolist() == [*expected(changed), [7, 7]]


@pytest.mark.parametrize("in_memory", [False, True])
def test_equal_rows_are_encoded_once(config, in_memory):
    seen, names = [], ["b", "a", "b", "b"]
    found = keep([wanted(names, seen)], replace(config, cache_latents=not in_memory), "rows")[0]
    assert seen == ["b", "a"]
    assert rows_of(found, 4) == expected(names)
    assert Path(config.latent_cache_dir).exists() != in_memory


def test_rows_of_another_setting_are_others(config):
    seen = []
    keep([wanted(["a"], seen), wanted(["a"], seen, shard_key("others"))], config, "rows")
    assert seen == ["a", "a"]


@pytest.mark.parametrize("machines", [1, 2])
def test_every_process_encodes_its_share(config, monkeypatch, machines):
    """Four processes on one machine, or on two with folders of their own, as threads that meet where processes would."""
    names, place, meeting = [f"row {i}" for i in range(40)], threading.local(), threading.Barrier(4)
    told, seen, found = [[0] * 4], [[] for _ in range(4)], [None] * 4

    def of_all(value: int) -> list[int]:
        told[0][place.rank] = value
        meeting.wait()
        values = list(told[0])
        meeting.wait()
        return values

    monkeypatch.setattr(kept, "_of_all", of_all)
    of_machine = 4 // machines
    monkeypatch.setattr(kept, "_shares", lambda: [(place.rank, 4), (place.rank % of_machine, of_machine), (0, 1)])

    def process(rank: int) -> None:
        place.rank = rank
        mine = replace(config, latent_cache_dir=f"{config.latent_cache_dir}-{rank // of_machine}")
        Path(mine.latent_cache_dir).mkdir(exist_ok=True)
        found[rank] = keep([wanted(names, seen[rank])], mine, "rows", 5)[0]

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [rows_of(one, 40) for one in found] == [expected(names)] * 4
    assert [len(rows) for rows in seen] == [10 * machines] * 4
    for machine in range(machines):
        together = chain.from_iterable(seen[machine * of_machine : (machine + 1) * of_machine])
        assert sorted(together) == sorted(names)


def test_two_processes_share_one_folder(tmp_path):
    """Five shards of four rows: the first process encodes three of them, and both read all."""
    run_worker("kept_worker.py", tmp_path)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    shares = [[*range(4), *range(8, 12), *range(16, 20)], [*range(4, 8), *range(12, 16)]]
    assert [rank["seen"] for rank in ranks] == shares
    expected = [[row, ranks[row // 4 % 2]["pid"]] for row in range(20)]
    assert [rank["found"] for rank in ranks] == [expected] * 2


def test_a_disk_without_room_is_found_before_a_shard_is_encoded(config, monkeypatch, caplog):
    seen, names = [], [f"row {i}" for i in range(1000)]
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda _: SimpleNamespace(free=30_000))
    with pytest.raises(
        ValueError, match=r"has 0\.0 MiB free, but 1,000 rows that are not there yet take 0\.0 KiB each"
    ):
        keep([wanted(names, seen)], config, "rows")
    assert seen == names[:1]  # 16 bytes of two numbers and 32 of a key: 48,000 bytes
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000))
    with caplog.at_level("INFO", "cm_diffusers.data.kept"):
        keep([wanted(names, seen)], config, "rows")
    assert len(caplog.messages) == 1


# ---- captions, keys and digests without Python objects


@pytest.mark.parametrize("bits", [1, 8, 64])
def test_keys_are_numbered_and_found_also_where_they_begin_or_end_alike(bits):
    """Words of so many bits: of one bit most keys share their last word with others, which are not them."""
    draw = np.random.default_rng(0)
    words = draw.integers(0, 2**bits, (300, 4), np.uint64, endpoint=False)
    table = words.view(np.uint8)
    keys, known = Keys(table), {}
    for row, key in enumerate(map(bytes, table)):
        known.setdefault(key, row)
    assert sorted(keys.first.tolist()) == sorted(known.values())
    assert [keys.first[number] for number in keys.number] == [known[bytes(key)] for key in table]
    asked = np.concatenate([table[::3], draw.integers(0, 2**bits, (300, 4), np.uint64).view(np.uint8)])
    found = [keys.first[number] if number >= 0 else None for number in keys.find(asked)]
    assert found == [known.get(bytes(key)) for key in asked]
    assert (bits == 1) == (len(known) == 16)
    assert len(Keys(table[:0])) == 0
    assert Keys(table[:0]).find(asked[:2]).tolist() == [-1, -1]


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_captions_stay_where_the_data_set_has_them(tmp_path, kind):
    """A million of them per process would be memory; repeated or blank ones need a copy of the others."""
    rows = [f"a caption of {i}" for i in range(20_000)]
    features = Features({"text": Value(kind)})
    Dataset.from_dict({"text": rows}, features).save_to_disk(tmp_path / "set")
    before = pa.total_allocated_bytes()
    captions = Captions.read(load_from_disk(tmp_path / "set"), "text")
    texts, numbers = captions.numbered(np.arange(len(rows)))
    assert pa.total_allocated_bytes() - before < 100_000
    assert list(texts) == ["", *rows]
    assert [found.tolist() for found in numbers] == [[i + 1] for i in range(len(rows))]
    assert texts[5] == rows[4]
    rows[7], rows[19_000] = " ", rows[3]
    captions = Captions.read(Dataset.from_dict({"text": rows}, features), "text")
    usable = np.flatnonzero(captions.lengths)
    texts, numbers = captions.numbered(usable)
    assert list(texts) == ["", *rows[:7], *rows[8:19_000], *rows[19_001:]]
    assert [texts[number] for (number,) in numbers] == [rows[i] for i in usable]


def test_captions_are_numbered_as_a_loop_would():
    rows = [["b", "a"], [], ["a", "", " "], ["c"], None, ["b", "c"]]
    captions = Captions.read(Dataset.from_dict({"text": rows}), "text")
    kept_of = [["b", "a"], [], ["a"], ["c"], [], ["b", "c"]]
    assert list(captions) == kept_of
    assert captions.lengths.tolist() == [2, 0, 1, 1, 0, 2]
    usable = np.array([0, 3, 5])
    texts, numbers = captions.numbered(usable)
    table = {"": 0}
    by_row = [[table.setdefault(text, len(table)) for text in kept_of[row]] for row in usable]
    assert list(texts) == list(table)
    assert [found.tolist() for found in numbers] == by_row
    assert texts[2] == "a"


def test_a_key_of_iterators_is_that_of_lists():
    values = [f"é {i}" for i in range(10_000)]
    parts = ["vae", values, [["a"], []], []]
    assert (
        shard_key("vae", iter(values), iter([["a"], []]), iter([])) == sha256(json.dumps(parts).encode()).hexdigest()
    )


def test_digests_read_as_the_texts_they_are():
    texts = [sha256(b"a").hexdigest(), "missing", "00" + sha256(b"b").hexdigest()[2:]]
    assert list(Digests.of(texts)) == texts
    assert Digests.of(texts).there.tolist() == [True, False, True]


# ---- what is in the files


@pytest.fixture
def images(config, tmp_path) -> DataConfig:
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"caption {i}")
    return replace(config, train_data_dir=str(folder), resolution=8, train_batch_size=5)


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    names = []
    read = contents.content_hash
    monkeypatch.setattr(
        contents, "content_hash", lambda record: names.append(Path(record["path"]).name) or read(record)
    )
    return names


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2, scaling_factor=0.5).eval()
    return Encoders(Vae.from_model(vae), lambda texts: {"encoder_hidden_states": torch.ones(len(texts), 2, 3)}, "fake")


def first(config: DataConfig, encoders: Encoders) -> torch.Tensor:
    return next(islice(text_image_batches(config, encoders, 0)(0), 1)).x0


def test_files_are_read_once_and_again_when_they_change(images, encoders, hashed, tmp_path):
    before = first(images, encoders)
    assert sorted(hashed) == [f"{i}.png" for i in range(5)]
    hashed.clear()
    assert torch.equal(first(images, encoders), before)
    assert hashed == []
    path = tmp_path / "set" / "2.png"
    size = path.stat().st_size
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(path)
    assert path.stat().st_size == size  # only the time of change tells
    assert not torch.equal(first(images, encoders), before)
    assert hashed == ["2.png"]


def test_a_file_that_could_not_be_read_is_tried_again(images, encoders, monkeypatch):
    read = contents.content_hash
    monkeypatch.setattr(
        contents, "content_hash", lambda record: "missing" if record["path"].endswith("3.png") else read(record)
    )
    assert text_image_batches(images, encoders, 0).found.images == 4
    monkeypatch.setattr(contents, "content_hash", read)
    assert text_image_batches(images, encoders, 0).found.images == 5


def test_pixel_sets_are_read_and_decoded_once(images, hashed, tmp_path, monkeypatch):
    """Nothing is opened at a later start but what could not be read; the images themselves only where they fit into memory."""
    damaged = tmp_path / "set" / "4.png"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    decode, decoded = contents.decode_image, []
    monkeypatch.setattr(contents, "decode_image", lambda record: decoded.append(record["path"]) or decode(record))
    monkeypatch.setattr(pixels, "MEMORY_LIMIT", 0)
    before = image_batches(images, 0)
    assert before.found.images == 4
    assert len(hashed) == 5
    assert len(decoded) == 6
    hashed.clear()
    decoded.clear()
    again = image_batches(images, 0)
    assert (hashed, decoded) == ([], [str(damaged)])
    monkeypatch.undo()
    assert again.fingerprint == before.fingerprint == image_batches(images, 0).fingerprint
    kept_nowhere = image_batches(replace(images, cache_latents=False), 0)
    assert kept_nowhere.fingerprint == before.fingerprint
    assert before.fingerprint == shard_key(list(digests_of(tmp_path / "set")), None)
    for one, two in zip(islice(before(0), 3), islice(kept_nowhere(0), 3), strict=True):
        assert torch.equal(one.x0, two.x0)


def digests_of(folder: Path) -> list[str]:
    """As runs before this one have named the content of a folder."""
    return [sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.png"))]


def test_images_in_tables_have_their_table_and_row(config):
    rows = [{"bytes": bytes([i] * 9), "path": None} for i in range(3)] + [None, {"bytes": None, "path": "/nowhere"}]
    table = pa.table({"image": pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))})
    dataset = Dataset(table)
    keys = contents._file_keys(dataset, "image")
    assert [bool(key.any()) for key in keys] == [True] * 3 + [False] * 2
    again = contents._file_keys(Dataset(table), "image")
    assert np.array_equal(keys, again)
    other = contents._file_keys(Dataset(table.slice(1)), "image")
    assert not (keys[:3, None] == other[None, :2]).all(-1).any()
    found = contents.read_contents(dataset, replace(config, cache_latents=False), False)
    assert list(found.digests) == [sha256(bytes([i] * 9)).hexdigest() for i in range(3)] + ["missing"] * 2


# ---- cache_stats.py and cache_prune.py


def cache_files(config: DataConfig) -> set[Path]:
    return {path for path in Path(config.latent_cache_dir).rglob("*") if path.is_file()}


def test_prune_removes_the_caches_own_and_only_with_yes(config, capsys):
    keep([wanted(["a", "b"], [])], config, "rows")
    keep([wanted(["c"], [], shard_key("old"))], config, "rows")
    top = Path(config.latent_cache_dir)
    (used,), (old,) = ((top / setting).iterdir() for setting in (SETTING, shard_key("old")))
    month_ago = time.time() - 31 * 86400
    os.utime(old, (month_ago, month_ago))
    early = top / f"{'a' * 64}.safetensors"
    save_file({"mean": torch.zeros(1)}, early, {"key": early.stem})
    damaged = top / SETTING / f"{'b' * 64}.safetensors"
    damaged.write_bytes(b"half")
    left = top / SETTING / f"{'c' * 64}.{'d' * 32}.tmp"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    foreign = [
        top / "notes.txt",
        top / "model.safetensors",
        top / SETTING / "readme.md",
        top / f"{'e' * 64}.safetensors",
    ]
    for path in foreign[:3]:
        path.write_text("mine")
    save_file({"x": torch.zeros(1)}, foreign[3])  # such a name by chance
    link = top / SETTING / f"{'f' * 64}.safetensors"
    link.symlink_to(foreign[0])
    before = cache_files(config)
    run_script("cache_prune", latent_cache_dir=top)
    told = capsys.readouterr().out
    assert cache_files(config) == before
    assert all(str(path) in told for path in (old, early, damaged, left))
    assert not any(str(path) in told for path in (used, link, *foreign))
    run_script("cache_prune", latent_cache_dir=top, yes=True)
    assert cache_files(config) == before - {old, early, damaged, left}
    assert not old.parent.exists()
    assert used.parent.exists()


def test_what_a_run_reads_is_in_use(config):
    keep([wanted(["a", "b"], [])], config, "rows")
    (path,) = cache_files(config)
    os.utime(path, (0, 0))
    assert housekeeping.removable(housekeeping.files_of(config.latent_cache_dir), 30)
    keep([wanted(["b"], [])], config, "rows")
    assert not housekeeping.removable(housekeeping.files_of(config.latent_cache_dir), 30)


def test_stats_count_rows_of_each_kind(config, capsys):
    keep([wanted(["a", "b"], [])], config, "rows")
    keep([wanted(["c"], [], shard_key("more"))], config, "more")
    run_script("cache_stats", latent_cache_dir=config.latent_cache_dir)
    lines = [[cell.strip() for cell in line.split("|")[1:4]] for line in capsys.readouterr().out.splitlines()]
    assert lines[2:] == [["more", "1", "1"], ["rows", "1", "2"], ["all", "2", "3"]]
    with pytest.raises(SystemExit, match=r"nowhere is no folder: nothing is kept there"):
        run_script("cache_stats", latent_cache_dir=f"{config.latent_cache_dir}/nowhere")
