"""Tar shards by their index: any batch at once, each sample once an epoch over any number of ranks, from disk, web and Hub."""

import io
import json
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfFileSystem, constants

from cm_diffusers.data import tar_index
from cm_diffusers.data.streaming import streaming_batches
from cm_diffusers.data.tar_index import TarSet
from cm_diffusers.data.windows import Windows
from data.test_streaming import (
    BROKEN,
    FILES,
    ROWS,
    assert_same,
    captions,
    config,  # noqa: F401
    encoded,
    encoders,  # noqa: F401
    plain,
    take,
    tars,
    write_tar,
)


# ---- the order


@pytest.mark.parametrize("least", [1, 7, 1000])
def test_an_epoch_has_every_sample_once(least):
    counts = np.array([5, 0, 3, 1, 8, 0])
    order = Windows(counts, least, 3)
    every = Counter((file, sample) for file, count in enumerate(counts) for sample in range(count))
    epochs = [[order[n] for n in range(epoch * 17, (epoch + 1) * 17)] for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        assert {place.epoch for place in epoch} == {number}
        assert Counter(place[1:] for place in epoch) == every
    assert len({tuple(place[1:] for place in epoch) for epoch in epochs}) == 3


def test_windows_are_whole_files_of_about_so_many_samples():
    order = Windows(np.full(20, 10), 30, 0)
    files = [{order[n].file for n in range(start, start + 30)} for start in range(0, 180, 30)]
    assert all(len(window) == 3 for window in files)
    assert len(set().union(*files)) == 18
    inside = [order[n][1:] for n in range(30)]
    assert inside != sorted(inside)


def test_a_place_is_found_without_those_before_it():
    """A million files of a thousand samples: a window's permutation is all that is drawn."""
    counts = np.full(10**6, 1000)
    far, near = Windows(counts, 5000, 1), Windows(counts, 5000, 1)
    near[10**9 + 5]
    assert far[10**9 + 7] == near[10**9 + 7]
    assert far[0] != far[1]


# ---- the stream


def seen(config, encoders, ranks: int, number: int) -> list[str]:  # noqa: F811
    """Captions in the order of the samples: batch 0 of all ranks, batch 1 of all ..."""
    by_rank = [take(config, encoders, number, rank=rank, world_size=ranks) for rank in range(ranks)]
    return [text for batches in zip(*by_rank, strict=True) for batch in batches for text in captions(batch)]


def test_the_order_does_not_depend_on_the_number_of_processes(config, encoders):  # noqa: F811
    alone = seen(plain(config), encoders, 1, 12)
    for ranks in (2, 3):
        assert seen(plain(config), encoders, ranks, 12 // ranks) == alone
    for epoch in range(3):
        assert Counter(alone[epoch * 20 : (epoch + 1) * 20]) == Counter(f"c{i}" for i in range(20))


def test_a_resumed_run_reads_one_batch_and_one_ahead(config, encoders, monkeypatch):  # noqa: F811
    stream, asked = streaming_batches(config, encoders, 0), []
    read = tar_index.read_ranges
    monkeypatch.setattr(tar_index, "read_ranges", lambda ranges: asked.extend(ranges) or read(ranges))
    batches = stream(10**9)
    next(batches)
    batches.close()
    assert len(asked) == 2 * config.train_batch_size


def test_an_unreadable_image_has_its_successor_and_moves_nothing(tmp_path, config, encoders):  # noqa: F811
    changes = {3: {"png": BROKEN}, 9: {"txt": b" "}}
    damaged = plain(config, train_shards_path_or_url=tars(tmp_path / "damaged", changes))
    found, expected = (seen(one, encoders, 2, 6) for one in (damaged, plain(config)))
    assert len(found) == 60
    for text, wanted, following in zip(found, expected, expected[1:], strict=False):
        assert text == (following if wanted in ("c3", "c9") else wanted)
    whole = take(damaged, encoders, 9)
    for start in (2, 5, 8):
        assert_same(take(damaged, encoders, 1, start)[0], whole[start])


def test_workers_decode_the_same_batches(tmp_path, config, encoders):  # noqa: F811
    changes = {3: {"png": BROKEN}}
    config = replace(config, train_shards_path_or_url=tars(tmp_path / "damaged", changes))
    state = torch.get_rng_state()
    alone = streaming_batches(config, encoders, 0)
    helped = streaming_batches(replace(config, dataloader_num_workers=2), encoders, 0)
    for one, two in zip(islice(alone(3), 14), islice(helped(3), 14), strict=True):
        assert_same(one, two)
        assert one.texts == two.texts
    assert torch.equal(torch.get_rng_state(), state)
    assert alone.found.skipped == helped.found.skipped != {}


# ---- the index


def listings(monkeypatch) -> list[str]:
    listed, of = [], tar_index._runs
    monkeypatch.setattr(tar_index, "_runs", lambda shard, column: listed.append(shard) or of(shard, column))
    return listed


def test_tars_are_listed_once_and_again_when_they_change(tmp_path, config, encoders, monkeypatch):  # noqa: F811
    listed = listings(monkeypatch)
    first = streaming_batches(config, encoders, 0).fingerprint
    assert len(listed) == FILES
    assert streaming_batches(config, encoders, 0).fingerprint == first
    assert len(listed) == FILES
    write_tar(tmp_path / "tars" / "02.tar", {"x.png": encoded(0), "x.txt": b"new"})
    changed = streaming_batches(config, encoders, 0)
    assert len(listed) == FILES + 1
    assert changed.fingerprint != first
    kept_nowhere = streaming_batches(replace(config, cache_latents=False), encoders, 0)
    assert kept_nowhere.fingerprint == changed.fingerprint
    assert len(listed) == 2 * FILES + 1


def test_the_index_is_of_the_content_wherever_it_lies(tmp_path, config, encoders):  # noqa: F811
    moved = replace(config, train_shards_path_or_url=tars(tmp_path / "elsewhere"))
    assert streaming_batches(config, encoders, 0).fingerprint == streaming_batches(moved, encoders, 0).fingerprint


def test_long_names_and_odd_samples_are_found_at_their_places(tmp_path, config):  # noqa: F811
    long = "folder/" + "n" * 200
    members = {
        f"{long}.png": encoded(0), f"{long}.txt": b"long",
        "bag 2.0.png": encoded(1), "bag 2.0.txt": b"zero", "bag 2.1.png": encoded(2), "bag 2.1.txt": b"one",
        "alone.png": encoded(3), "last.png": encoded(4), "last.txt": b"last",
    }  # fmt: skip
    path = write_tar(tmp_path / "odd.tar", members)
    tarset = TarSet.of([str(path)], config)
    assert tarset.counts.tolist() == [4]
    assert tarset.lacks.reasons == {"samples without a caption": (1, ["alone"])}
    rows = tarset.rows([(0, 3), (0, 2), (0, 0), (0, 1)], "image", "text")
    assert [row["text"] for row in rows] == [["last"], ["one"], ["long"], ["zero"]]
    assert [row["image"]["bytes"] for row in rows] == [encoded(i) for i in (4, 2, 0, 1)]


def test_a_shard_that_changes_under_a_run_is_refused(tmp_path, config, encoders):  # noqa: F811
    stream = streaming_batches(config, encoders, 0)
    for path in (tmp_path / "tars").iterdir():
        path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"tar is not what it was when its samples were listed, or its server"):
        next(stream(0))


def test_compressed_tars_are_refused(tmp_path, config, encoders):  # noqa: F811
    with tarfile.open(tmp_path / "x.tar", "w:gz") as archive:
        archive.addfile(info := tarfile.TarInfo("a.txt"), io.BytesIO(b""))
    assert info.size == 0
    with pytest.raises(ValueError, match=r"it is compressed, and its samples have no places: unpack it"):
        streaming_batches(replace(config, train_shards_path_or_url=str(tmp_path / "x.tar")), encoders, 0)


# ---- from the web


class Ranges(SimpleHTTPRequestHandler):
    """A server of files that answers requests for ranges, or as if it did not know them."""

    knows_ranges = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        """The folder's files, also as those of a data set on the Hub."""
        if self.path.startswith("/api/datasets/ada/tars"):
            return self.answer(200, json.dumps(self.told()).encode(), {"Content-Type": "application/json"})
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        content = Path(self.directory, Path(self.path).name).read_bytes()
        self.server.sent.append(len(content))
        if not (asked and self.knows_ranges):
            return self.answer(200, content, {})
        start, end = int(asked[1]), min(int(asked[2]) + 1, len(content))
        self.server.sent[-1] = end - start
        return self.answer(206, content[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})

    def told(self) -> object:
        files = sorted(Path(self.directory).iterdir())
        if "/tree/" not in self.path:
            return {"id": "ada/tars", "sha": "0" * 40, "siblings": [{"rfilename": path.name} for path in files]}
        return [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40} for p in files]

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content)), "Accept-Ranges": "bytes"}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[ThreadingHTTPServer]:
    (tmp_path / "tars").mkdir(exist_ok=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tmp_path / "tars")))
    server.sent = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_shards_on_the_web_are_those_on_disk(config, encoders, server):  # noqa: F811
    pytest.importorskip("aiohttp")
    url = f"http://127.0.0.1:{server.server_port}/{{00..{FILES - 1:02}}}.tar"
    web = replace(config, train_shards_path_or_url=url)
    stream = streaming_batches(web, encoders, 0)
    assert stream.fingerprint == streaming_batches(config, encoders, 0).fingerprint
    server.sent.clear()
    batches = stream(5)
    found = next(batches)
    batches.close()
    assert_same(found, take(config, encoders, 1, 5)[0])
    size = (tar_index.TarSet.of([config.train_shards_path_or_url.replace("{00..03}", "00")], config)).indexes[0]
    assert len(server.sent) == 2 * config.train_batch_size  # one batch ahead
    assert max(server.sent) <= max(end - start for start, end, _ in map(size.range, range(ROWS))) + 512
    server.sent.clear()
    streaming_batches(web, encoders, 0)
    assert server.sent == []  # the index is kept


def test_shards_on_the_hub_are_those_on_disk(config, encoders, server, monkeypatch):  # noqa: F811
    home = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", home + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "ENDPOINT", home)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    HfFileSystem.clear_instance_cache()
    hub = replace(config, train_shards_path_or_url=f"hf://datasets/ada/tars/{{00..{FILES - 1:02}}}.tar")
    stream = streaming_batches(hub, encoders, 0)
    server.sent.clear()
    batches = stream(5)
    found = next(batches)
    batches.close()
    HfFileSystem.clear_instance_cache()
    assert_same(found, take(config, encoders, 1, 5)[0])
    assert len(server.sent) == 2 * config.train_batch_size  # one batch ahead
    assert max(server.sent) < 3000  # of a tar of 10,240 bytes


def test_a_server_without_ranges_is_refused(config, encoders, server, monkeypatch):  # noqa: F811
    pytest.importorskip("aiohttp")
    url = f"http://127.0.0.1:{server.server_port}/00.tar"
    stream = streaming_batches(replace(config, train_shards_path_or_url=url), encoders, 0)
    monkeypatch.setattr(Ranges, "knows_ranges", False)
    with pytest.raises(
        ValueError, match=r"00\.tar is not what it was .* or its server does not answer requests for ranges"
    ):
        next(stream(0))
