import io
import json
import logging
import struct
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from pyarrow import parquet
from transformers import HfArgumentParser

from cm_diffusers.data.cache import Vae
from cm_diffusers.data.clips import CLIP_SUFFIXES, measure, read_frames
from cm_diffusers.data.edges import edges
from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.moving_articles import MovingArticles
from cm_diffusers.data.sources import DataConfig, load_image_text
from cm_diffusers.data.video import VideoDataConfig, video_batches
from cm_diffusers.models.families.base import Latents
from cm_diffusers.models.families.latents import posterior


CLIPS, FRAMES = 6, 10
HEIGHT, WIDTH = 8, 12
SCALE, SHIFT = 0.5, 0.25
MIDDLES = {number: [2, 4, 6] for number in range(CLIPS)}  # what the settings of `config` sample


class Echo(torch.nn.Module):
    """A VAE whose latents are the pixels."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, std: float = 0.0) -> None:
        super().__init__()
        self.std, self.calls = std, []

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        self.calls.append(len(pixels))
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=pixels, std=torch.full_like(pixels, self.std)))


def echo(model: Echo | None = None, **changes) -> Vae:
    model = model or Echo()
    return replace(Vae(lambda: model, f"echo {model.std}", Latents(posterior, None, SHIFT, SCALE, 2, 3)), **changes)


def encode_prompts(texts: list[str]) -> dict[str, torch.Tensor]:
    """(N, 4, 8), told apart by the text: its character codes, 0 for none."""
    codes = torch.tensor([[ord(c) for c in text[:32].ljust(32, "\0")] for text in texts])
    return {"encoder_hidden_states": codes.reshape(-1, 4, 8).float() / 8}


def texts_of(embedding: torch.Tensor) -> list[str]:
    return ["".join(map(chr, (row.flatten() * 8).int().tolist())).rstrip("\0") for row in embedding]


def refuse(*_) -> None:
    raise AssertionError("must not be called")


def level(clip: int, frame: int) -> int:
    """The grey of a frame: tells which one it is."""
    return 20 * frame + 3 * clip


def film(clip: int, frames: int = FRAMES, size=(WIDTH, HEIGHT)) -> list[Image.Image]:
    return [Image.new("L", size, level(clip, frame)) for frame in range(frames)]


def noise(clip: int, frames: int = FRAMES, size=(HEIGHT, WIDTH, 3)) -> list[Image.Image]:
    pixels = np.random.default_rng(clip).integers(0, 256, (frames, *size), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


def animation(frames: list[Image.Image], kind: str = "GIF") -> bytes:
    settings = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(buffer := io.BytesIO(), kind, save_all=True, append_images=frames[1:], duration=50, **settings)
    return buffer.getvalue()


def png(frame: Image.Image) -> bytes:
    frame.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def video(frames: list[Image.Image], codec: str, container: str) -> bytes:
    av = pytest.importorskip("av")
    with av.open(buffer := io.BytesIO(), "w", format=container) as file:
        stream = file.add_stream(codec, rate=8, width=frames[0].width, height=frames[0].height, pix_fmt="yuv420p")
        stream.bit_rate = 4_000_000
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_image(frame.convert("RGB"))))
        file.mux(stream.encode())
    return buffer.getvalue()


def write_frames(folder: Path, frames: list[Image.Image]) -> None:
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames, 5):
        frame.save(folder / f"frame {number}.png")  # 10 comes after 9 only by its number
    (folder / "thumbs.db").write_bytes(b"x")


def write_clips(folder: Path, contents: list[bytes], suffix: str = ".gif") -> Path:
    """Clips with a .txt beside each."""
    folder.mkdir(parents=True)
    for number, content in enumerate(contents):
        (folder / f"{number}{suffix}").write_bytes(content)
        (folder / f"{number}.txt").write_text(f"clip {number}\n")
    return folder


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips") / "films", [animation(film(i)) for i in range(CLIPS)])


@pytest.fixture
def config(films, tmp_path) -> VideoDataConfig:
    return VideoDataConfig(
        train_data_dir=str(films),
        sample_n_frames=3,
        sample_stride=2,
        resolution=HEIGHT,
        center_crop=True,
        train_batch_size=CLIPS,
        encode_batch_size=4,
        cache_dir=str(tmp_path / "hf"),
        latent_cache_dir=str(tmp_path / "latents"),
    )


def batches_of(config, vae=None, seed=0, encode=encode_prompts, **wanted):
    return video_batches(config, Encoders(vae or echo(), encode, "fake"), seed, **wanted)


def first(batches, count=1, start=0):
    return list(islice(batches(start), count))


def captions(batch) -> list[str]:
    return texts_of(batch.cond["encoder_hidden_states"])


def pixels_of(batch) -> torch.Tensor:
    """(B, F, 3, H, W) in levels 0 to 255."""
    return (batch.x0.transpose(1, 2) / SCALE + SHIFT + 1) * 127.5


def seen(batch) -> dict[int, list[int]]:
    """Clip -> the frames of it in the batch, where clips are films."""
    found = {}
    for text, clip in zip(captions(batch), pixels_of(batch), strict=True):
        number = int(text.removeprefix("clip "))
        levels = clip.flatten(1).mean(1)
        assert (clip.flatten(1) - levels[:, None]).abs().max() < 4
        found[number] = [round((value - 3 * number) / 20) for value in levels.tolist()]
        assert (levels - torch.tensor([level(number, frame) for frame in found[number]])).abs().max() < 4
    return found


def assert_same(one, two) -> None:
    assert torch.equal(one.x0, two.x0)
    for a, b in ((one.cond, two.cond), (one.uncond, two.uncond)):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


# ---- frames


@pytest.mark.parametrize(
    ("frames", "stride", "expected"),
    [(3, 2, [2, 4, 6]), (2, 1, [4, 5]), (4, 3, [0, 3, 6, 9]), (10, 1, list(range(10))), (2, 8, [0, 8])],
)
def test_the_middle_of_a_clip_is_sampled_at_the_stride(config, frames, stride, expected):
    batch = first(batches_of(replace(config, sample_n_frames=frames, sample_stride=stride)))[0]
    assert batch.x0.shape == (CLIPS, 3, frames, HEIGHT, HEIGHT)
    assert batch.x0.is_contiguous()
    assert seen(batch) == dict.fromkeys(range(CLIPS), expected)


def test_starts_spread_evenly_and_are_drawn_for_every_batch(config):
    batches = first(batches_of(replace(config, num_starts=3)), 8)
    found = Counter(tuple(frames) for batch in batches for frames in seen(batch).values())
    assert set(found) == {(0, 2, 4), (2, 4, 6), (4, 6, 8)}
    assert min(found.values()) > 5
    assert len({tuple(sorted(seen(batch).items(), key=str)[0][1]) for batch in batches}) > 1


def as_folders(folder: Path) -> None:
    for i in range(CLIPS):
        write_frames(folder / f"take.{i}", film(i))
        (folder / f"take.{i}.txt").write_text(f"clip {i}")


def as_metadata(folder: Path) -> None:
    """A GIF, a WebP and folders of frames."""
    names = [*(f"{i}.gif" for i in range(2)), "2.webp", *(f"deep/{i}" for i in range(3, CLIPS))]
    for i, name in enumerate(names):
        if "." in name:
            (folder / name).write_bytes(animation(film(i), name[2:].upper()))
        else:
            write_frames(folder / name, film(i))
    rows = [{"file_name": name, "text": f"clip {i}"} for i, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_parquet(folder: Path, columns: dict, typed=None) -> None:
    table = pa.table({"text": [f"clip {i}" for i in range(CLIPS)], **columns})
    if typed is not None:
        table = datasets.Dataset(table).cast_column("video", typed).with_format("arrow")[:]
    parquet.write_table(table, folder / "data.parquet")


def records(files: list[bytes]) -> list[dict]:
    return [{"bytes": content, "path": None} for content in files]


WRITERS = {
    "webp": lambda folder: write_clips(folder / "train", [animation(film(i), "WEBP") for i in range(CLIPS)], ".webp"),
    "folders": as_folders,
    "metadata": as_metadata,
    "videos in parquet": lambda folder: as_parquet(
        folder, {"video": records([animation(film(i)) for i in range(CLIPS)])}, datasets.Video(decode=False)
    ),
    "untyped parquet": lambda folder: as_parquet(
        folder, {"video": records([animation(film(i)) for i in range(CLIPS)])}
    ),
    "images in parquet": lambda folder: as_parquet(
        folder, {"video": [records(map(png, film(i))) for i in range(CLIPS)]}, datasets.List(datasets.Image())
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
def test_every_source_gives_the_frames_and_their_caption(config, tmp_path, kind):
    folder = tmp_path / "data"
    folder.mkdir()
    WRITERS[kind](folder)
    batch = first(batches_of(replace(config, train_data_dir=str(folder))))[0]
    assert seen(batch) == MIDDLES


@pytest.mark.parametrize(("kind", "column"), [("videos in parquet", "video"), ("images in parquet", "video")])
def test_dataset_name_loads_with_datasets(config, tmp_path, kind, column):
    folder = tmp_path / "data"
    folder.mkdir()
    WRITERS[kind](folder)
    config = replace(config, dataset_name=str(folder), train_data_dir=None)
    assert seen(first(batches_of(config))[0]) == MIDDLES
    with pytest.raises(ValueError, match=r"no column named clip: .* text, video"):
        batches_of(replace(config, video_column="clip"))


@pytest.mark.parametrize(
    ("suffix", "codec", "container"),
    [(".mp4", "mpeg4", "mp4"), (".mkv", "mpeg4", "matroska"), (".webm", "libvpx", "webm"), (".avi", "mpeg4", "avi"),
     (".mov", "mpeg4", "mov")],
)  # fmt: skip
def test_video_files(config, tmp_path, suffix, codec, container):
    assert suffix in CLIP_SUFFIXES
    contents = [video(film(i, size=(48, 32)), codec, container) for i in range(CLIPS)]
    folder = write_clips(tmp_path / "videos", contents, suffix)
    assert measure({"bytes": None, "path": str(folder / f"0{suffix}")})[1] == FRAMES
    batch = first(batches_of(replace(config, train_data_dir=str(folder))))[0]
    assert seen(batch) == MIDDLES


def test_turned_videos_are_upright():
    frames = [Image.new("RGB", (48, 32)) for _ in range(4)]
    for frame in frames:
        frame.paste((255, 255, 255), (0, 0, 16, 16))
    content = video(frames, "mpeg4", "mp4")
    matrix = content.index(b"tkhd") + 44
    assert struct.unpack(">9i", content[matrix : matrix + 36]) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)  # (x, y) goes to (32 - y, x)
    turned = content[:matrix] + quarter + content[matrix + 36 :]
    upright = np.asarray(read_frames({"bytes": turned, "path": None}, [2])[0])
    assert upright.shape == (48, 32, 3)
    assert upright[:14, 18:].min() > 200
    assert upright[:, :14].max() < 60


def places(clip: torch.Tensor, number: int) -> list[tuple[int, int]]:
    """Which frame of a clip of noise each of (F, 3, 8, 8) is, and where the left of its crop is."""
    whole = np.stack([np.asarray(frame) for frame in noise(number)]).transpose(0, 3, 1, 2)
    found = [
        [(n, left) for n in range(FRAMES) for left in range(5)
         if np.abs(frame - whole[n, :, :, left : left + HEIGHT]).max() < 0.5]
        for frame in clip.numpy()
    ]  # fmt: skip
    assert all(len(place) == 1 for place in found)
    return [place[0] for place in found]


def test_one_crop_for_all_frames_and_another_for_every_clip(config, tmp_path):
    for i in range(CLIPS):
        write_frames(tmp_path / "noise" / str(i), noise(i))
        (tmp_path / "noise" / f"{i}.txt").write_text(f"clip {i}")
    batch = first(batches_of(replace(config, train_data_dir=str(tmp_path / "noise"), center_crop=False)))[0]
    lefts = set()
    for text, clip in zip(captions(batch), pixels_of(batch), strict=True):
        found = places(clip, int(text[5:]))
        lefts.add(found[0][1])
        assert found == [(number, found[0][1]) for number in (2, 4, 6)]
    assert len(lefts) > 1


def test_another_crop_for_every_start(config, tmp_path):
    write_frames(tmp_path / "noise" / "0", noise(0))
    (tmp_path / "noise" / "0.txt").write_text("clip 0")
    config = replace(config, train_data_dir=str(tmp_path / "noise"), center_crop=False, num_starts=5)
    found = {tuple(places(clip, 0)) for clip in pixels_of(first(batches_of(replace(config, train_batch_size=60)))[0])}
    assert sorted(place[0][0] for place in found) == [0, 1, 2, 3, 4]
    assert len({place[0][1] for place in found}) > 1


def test_flips_mirror_whole_clips_about_half_of_the_time(config, tmp_path):
    write_frames(tmp_path / "noise" / "0", noise(0))
    (tmp_path / "noise" / "0.txt").write_text("clip 0, bright and leftover")
    config = replace(config, train_data_dir=str(tmp_path / "noise"), random_flip=True, train_batch_size=200)
    whole = np.stack([np.asarray(frame) for frame in noise(0)])[[2, 4, 6], :, 2:10].transpose(0, 3, 1, 2)
    same = [np.abs(clip.numpy() - whole).max() < 0.5 for clip in pixels_of(first(batches_of(config))[0])]
    mirrored = [
        np.abs(clip.numpy() - whole[..., ::-1]).max() < 0.5 for clip in pixels_of(first(batches_of(config))[0])
    ]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 70 < sum(mirrored) < 130


@pytest.mark.parametrize(
    "text", ["a car turns Left", "moving rightwards", "a wheel, counterclockwise", "on the right"]
)
def test_flips_are_refused_where_a_caption_names_a_side(config, tmp_path, text):
    folder = write_clips(tmp_path / "sides", [animation(film(0))])
    (folder / "0.txt").write_text(text)
    with pytest.raises(ValueError, match=f"--random_flip would make 1 captions false .* such as '{text}': leave it"):
        batches_of(replace(config, train_data_dir=str(folder), random_flip=True))


# ---- batches


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_is_a_pure_function_of_its_number(config, workers):
    config = replace(config, num_starts=3, random_flip=True, proportion_empty_prompts=0.3, train_batch_size=2)
    wanted = {"vae": echo(Echo(0.3)), "first_frame": True, "control": "edges"}
    straight = first(batches_of(config, rank=1, world_size=2, **wanted), 5)
    state = torch.get_rng_state()
    again = replace(config, dataloader_num_workers=workers)
    resumed = first(batches_of(again, rank=1, world_size=2, **wanted), 2, start=3)
    assert torch.equal(state, torch.get_rng_state())
    for one, two in zip(straight[3:], resumed, strict=True):
        assert_same(one, two)
    other = first(batches_of(config, seed=1, **wanted))[0], first(batches_of(config, world_size=2, **wanted))[0]
    assert not any(torch.equal(straight[0].x0, batch.x0) for batch in (*other, straight[1]))


def test_two_ranks_share_an_epoch(config):
    config = replace(config, train_batch_size=CLIPS // 2)
    ranks = [batches_of(config, rank=rank, world_size=2) for rank in range(2)]
    for k in range(3):
        shown = [text for rank in ranks for text in captions(first(rank, start=k)[0])]
        assert sorted(shown) == [f"clip {i}" for i in range(CLIPS)]


def test_the_cache_is_read_without_any_encoder(config):
    model = Echo()
    filled = first(batches_of(config, echo(model)), 3)
    assert model.calls == [3] * CLIPS  # one clip of 3 frames fits into 4
    read = first(batches_of(config, echo(load=refuse), encode=refuse), 3)
    for one, two in zip(filled, read, strict=True):
        assert_same(one, two)
    in_memory = replace(config, cache_latents=False)
    assert_same(first(batches_of(in_memory, echo(model)))[0], filled[0])
    assert len(model.calls) == 2 * CLIPS


@pytest.mark.parametrize(("size", "calls"), [(2, [2, 1] * CLIPS), (7, [6, 6, 6]), (100, [18])])
def test_frames_are_encoded_in_batches(config, size, calls):
    model = Echo()
    batches = batches_of(replace(config, encode_batch_size=size), echo(model))
    assert model.calls == calls
    assert seen(first(batches)[0]) == MIDDLES


@pytest.mark.parametrize(
    "changes",
    [{"sample_stride": 1}, {"sample_n_frames": 2}, {"resolution": 4}, {"center_crop": False}, {"num_starts": 2}],
)
def test_what_changes_the_latents_is_encoded_anew(config, changes):
    batches_of(config)
    with pytest.raises(AssertionError, match="must not be called"):
        batches_of(replace(config, **changes), echo(load=refuse))


def test_a_changed_file_is_encoded_anew(config, tmp_path):
    folder = write_clips(tmp_path / "one", [animation(film(0))])
    config = replace(config, train_data_dir=str(folder), train_batch_size=1)
    batches_of(config)
    (folder / "0.gif").write_bytes(animation(film(0)[::-1]))
    found = pixels_of(first(batches_of(config))[0])[0].flatten(1).mean(1)
    torch.testing.assert_close(found, torch.tensor([140.0, 100.0, 60.0]), atol=0.1, rtol=0)


def test_latents_are_draws_of_every_frame_by_itself(config):
    model = Echo(0.8)
    plain = replace(config, sample_n_frames=4, train_batch_size=2, max_train_samples=2)
    draws = torch.stack([batch.x0 for batch in first(batches_of(plain, echo(model)), 40)])
    means = torch.stack([batch.x0 for batch in first(batches_of(plain), 40)])
    noise = ((draws - means) / (0.8 * SCALE)).transpose(1, 3).flatten(2)  # (40, F, values of a frame)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert noise.mean().abs() < 0.02
    frames = noise.transpose(0, 1).flatten(1)
    correlation = torch.corrcoef(frames) - torch.eye(4)
    assert correlation.abs().max() < 0.05


def test_a_real_vae_encodes_each_frame(config):
    torch.manual_seed(0)
    model = AutoencoderKL(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
                          up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, latent_channels=2,
                          scaling_factor=SCALE).eval()  # fmt: skip
    batch = first(batches_of(config, Vae.from_model(model), first_frame=True))[0]
    assert batch.x0.shape == (CLIPS, 2, 3, 4, 4)
    for text, latents in zip(captions(batch), batch.cond["image_latents"], strict=True):
        grey = torch.full((1, 3, HEIGHT, HEIGHT), level(int(text[5:]), 2) / 127.5 - 1)
        with torch.no_grad():
            expected = model.encode(grey).latent_dist.mean[0] * SCALE
        torch.testing.assert_close(latents, expected, atol=2e-3, rtol=2e-3)


def test_the_first_frame_is_given_without_noise_to_both_branches(config):
    batch = first(batches_of(config, echo(Echo(0.8)), first_frame=True))[0]
    for text, latents in zip(captions(batch), batch.cond["image_latents"], strict=True):
        expected = (level(int(text[5:]), 2) / 127.5 - 1 - SHIFT) * SCALE
        torch.testing.assert_close(latents, torch.full((3, HEIGHT, HEIGHT), expected), atol=1e-3, rtol=0)
    assert torch.equal(batch.cond["image_latents"], batch.uncond["image_latents"])
    assert "image_latents" not in first(batches_of(config))[0].cond


def test_captions_are_dropped_and_chosen(config, tmp_path):
    rows = [{"file_name": "0.gif", "text": ["one", " ", "two"]}]
    folder = write_clips(tmp_path / "list", [animation(film(0))])
    (folder / "metadata.jsonl").write_text(json.dumps(rows[0]))
    config = replace(config, train_data_dir=str(folder), train_batch_size=60, proportion_empty_prompts=0.5)
    batch = first(batches_of(config))[0]
    assert set(texts_of(batch.uncond["encoder_hidden_states"])) == {""}
    counts = Counter(captions(batch))
    assert set(counts) == {"one", "two", ""}
    assert 15 < counts[""] < 45


def test_max_train_samples_is_a_fixed_subset(config):
    found = [
        {t for b in first(batches_of(replace(config, max_train_samples=3)), 3) for t in captions(b)} for _ in "ab"
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 3


# ---- edges


def step(low, high) -> torch.Tensor:
    """Frames (3, 6, 8) that change between columns 3 and 4."""
    frame = torch.tensor(low).view(3, 1, 1).repeat(1, 6, 8)
    frame[:, :, 4:] = torch.tensor(high).view(3, 1, 1)
    return frame


def test_edges_are_sobel_magnitudes_over_the_clip_s_largest():
    green, red = step([0.0, 0.0, 0.0], [0.0, 1.0, 0.0]), step([0.0, 0.0, 0.0], [1.0, 0.0, 0.0])
    faint, flat = step([0.5, 0.5, 0.5], [0.6, 0.6, 0.6]), torch.full((3, 6, 8), 0.3)
    found = edges(torch.stack([torch.stack([green, red, flat]), torch.stack([flat, flat, faint])]))
    assert found.shape == (2, 3, 3, 6, 8)
    columns = torch.zeros(3, 6, 8)
    columns[:, :, 3:5] = 1
    torch.testing.assert_close(found[0, 0], columns)
    torch.testing.assert_close(found[0, 1], columns * 0.299 / 0.587)
    torch.testing.assert_close(found[1, 2], columns)
    assert not torch.cat([found[0, 2:], found[1, :2]]).any()
    assert not edges(torch.full((1, 2, 3, 4, 4), 0.3)).any()


def test_edges_have_no_direction():
    frame = torch.zeros(1, 1, 3, 9, 9)
    frame[..., 4, 4] = 1
    found = edges(frame)[0, 0, 0]
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found[4, 3], torch.tensor(1.0))
    torch.testing.assert_close(found[3, 3], torch.tensor(2**0.5 / 2))  # (1, 1) beside (2, 0)
    assert found[4, 4] == 0


def test_control_shows_the_edges_of_the_same_frames(config, tmp_path):
    for i in range(CLIPS):
        write_frames(tmp_path / "noise" / str(i), noise(i))
        (tmp_path / "noise" / f"{i}.txt").write_text(f"clip {i}")
    config = replace(config, train_data_dir=str(tmp_path / "noise"), center_crop=False, random_flip=True, num_starts=2)
    for batch in first(batches_of(config, control="edges"), 3):
        control = batch.cond["control"]
        assert control.shape == (CLIPS, 3, 3, HEIGHT, HEIGHT)
        expected = edges(pixels_of(batch) / 255).transpose(1, 2)
        torch.testing.assert_close(control, expected, atol=5e-3, rtol=0)
        assert torch.equal(control, batch.uncond["control"])
        assert control.amax((1, 2, 3, 4)).tolist() == [1] * CLIPS
    with pytest.raises(ValueError, match="Unknown control 'depth'"):
        batches_of(config, control="depth")


# ---- the built-in source


@pytest.fixture
def moving(tmp_path) -> VideoDataConfig:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, article in enumerate(("a bag", "an ankle boot")):
        image = Image.new("L", (20, 20))
        image.paste(200 + i, (2, 2, 16 - i, 12))
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(article)
    return VideoDataConfig(
        moving_articles=str(folder),
        num_clips=12,
        sample_n_frames=4,
        sample_stride=2,
        resolution=32,
        train_batch_size=12,
        latent_cache_dir=str(tmp_path / "latents"),
        cache_dir=str(tmp_path / "hf"),
    )


def test_moving_articles_are_what_their_clips_show(moving):
    batch = first(batches_of(moving))[0]
    made = MovingArticles(load_image_text(DataConfig(train_data_dir=moving.moving_articles)), 7, 12)
    clips = {clip.caption: clip.frames[::2].transpose(0, 3, 1, 2) for clip in map(made.clip, range(12))}
    assert sorted(captions(batch)) == sorted(clips)
    for text, pixels in zip(captions(batch), pixels_of(batch), strict=True):
        np.testing.assert_allclose(pixels, clips[text], atol=0.5)
    read = batches_of(moving, echo(load=refuse))
    assert_same(first(read)[0], batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"random_flip": True}, "--random_flip would make 4 captions false that name a side, such as 'a bag moving left'"),
        ({"num_starts": 2}, "--num_starts has no effect with --moving_articles"),
        ({"center_crop": True}, "--center_crop has no effect with --moving_articles"),
        ({"max_train_samples": 3}, "--max_train_samples has no effect with --moving_articles"),
        ({"video_column": "clip"}, "--video_column has no effect with --moving_articles"),
        ({"num_clips": 0}, "--num_clips must be at least 1, but it is 0"),
        ({"sample_n_frames": 16, "sample_stride": 4}, "stay in view for 2 to 19 frames, but a clip is to span 61"),
    ],
)  # fmt: skip
def test_flags_that_moving_articles_refuse(moving, changes, message):
    with pytest.raises(ValueError, match=message):
        batches_of(replace(moving, **changes))


# ---- wrong input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_data_dir": None},
            "Give one of --train_data_dir, --dataset_name, --moving_articles: .* none was given",
        ),
        ({"dataset_name": "x/y"}, "--train_data_dir and --dataset_name were given"),
        ({"dataset_config_name": "x"}, "--dataset_config_name has no effect without --dataset_name"),
        ({"num_clips": 7}, "--num_clips has no effect without --moving_articles"),
        ({"sample_n_frames": 1}, "--sample_n_frames must be at least 2, but it is 1"),
        ({"sample_stride": 0}, "--sample_stride must be at least 1, but it is 0"),
        ({"num_starts": 0}, "--num_starts must be at least 1, but it is 0"),
        ({"train_batch_size": 0}, "--train_batch_size must be at least 1, but it is 0"),
        ({"proportion_empty_prompts": 2.0}, "--proportion_empty_prompts must lie between 0 and 1"),
        ({"resolution": 7}, "--resolution 7 is not a multiple of 2, as the VAE needs: take 6 or 8"),
        ({"train_data_dir": "absent"}, "--train_data_dir absent is not a folder: give a folder with images, clips or"),
    ],
)
def test_flags_without_effect_or_out_of_range(config, changes, message):
    with pytest.raises(ValueError, match=message):
        batches_of(replace(config, **changes))


def test_short_clips_are_named(config, tmp_path):
    folder = write_clips(tmp_path / "short", [animation(film(i, 10 - i)) for i in range(3)])
    config = replace(config, train_data_dir=str(folder), sample_n_frames=5)  # needs 9
    message = r"^1 of 3 clips are too short, such as .*2\.gif with 8 frames: .* needs 9; lower them, or leave these"
    with pytest.raises(ValueError, match=message):
        batches_of(config)


def test_frames_of_one_folder_have_one_size(config, tmp_path):
    frames = film(0)
    frames[4] = Image.new("L", (30, 20))
    write_frames(tmp_path / "sizes" / "take", frames)
    (tmp_path / "sizes" / "take.txt").write_text("clip 0")
    config = replace(config, train_data_dir=str(tmp_path / "sizes"))
    with pytest.raises(
        ValueError, match=r"The frames of .*take differ in size \(12x8 and 30x20\): give them one size"
    ):
        batches_of(config)


def test_unreadable_clips_are_counted_and_skipped(config, tmp_path, caplog):
    pytest.importorskip("av")
    contents = [
        animation(film(0)),
        b"not a clip",
        animation(noise(2, size=(40, 40, 3)))[:9000],
        animation(film(3)),
        b"",
    ]
    folder = write_clips(tmp_path / "damaged", contents)
    (folder / "3.txt").write_text(" ")
    config = replace(config, train_data_dir=str(folder), num_starts=3)
    with caplog.at_level(logging.WARNING):
        batches = batches_of(config)
    (message,) = caplog.messages
    for left_out in ("cannot be read: 2 (", "in empty files: 1 (", "without a caption: 1 ("):
        assert f"; left out, clips {'that ' * left_out.startswith('cannot')}{left_out}" in message
    assert "damaged: 1 clips and 1 captions to train on; " in message
    assert {number for batch in first(batches, 3) for number in seen(batch)} == {0}


def test_a_clip_that_breaks_off_is_not_used_from_any_start(config, tmp_path, monkeypatch):
    folder = write_clips(tmp_path / "broken", [animation(film(i)) for i in range(2)])
    whole = read_frames

    def broken(clip, numbers):
        return None if clip["path"].endswith("1.gif") and numbers[-1] > 6 else whole(clip, numbers)

    monkeypatch.setattr("cm_diffusers.data.clip_sources.read_frames", broken)
    config = replace(config, train_data_dir=str(folder), num_starts=3)
    assert {number for batch in first(batches_of(config), 3) for number in seen(batch)} == {0}


def test_no_clip_is_left(config, tmp_path):
    pytest.importorskip("av")
    folder = write_clips(tmp_path / "damaged", [b"not a clip", b""])
    with pytest.raises(
        ValueError, match=r"None of the 2 clips .* cannot be read: 1 \(.*0\.\w+\); .* in empty files: 1"
    ):
        batches_of(replace(config, train_data_dir=str(folder)))


def test_no_captions_and_no_clips(config, tmp_path):
    folder = write_clips(tmp_path / "mute", [animation(film(i)) for i in range(2)])
    for path in folder.glob("*.txt"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"holds 2 clips but no captions: add metadata\.jsonl, .* or a \.txt or \.caption file beside"
    ):
        batches_of(replace(config, train_data_dir=str(folder)))
    (folder / "metadata.jsonl").write_text('{"file_name": "0.gif", "title": "a"}')
    with pytest.raises(ValueError, match=r"no column named text: .* found: title, video"):
        batches_of(replace(config, train_data_dir=str(folder)))
    (folder / "metadata.jsonl").unlink()
    for path in folder.glob("*.gif"):
        path.unlink()
    with pytest.raises(ValueError, match=r"mute holds no clip: give files in .* \.gif, .* numbered frames"):
        batches_of(replace(config, train_data_dir=str(folder)))


def test_a_column_of_something_else(config, tmp_path):
    (tmp_path / "data").mkdir()
    as_parquet(tmp_path / "data", {"video": list(range(CLIPS))})
    with pytest.raises(ValueError, match="The column video of clips cannot be read: "):
        batches_of(replace(config, train_data_dir=str(tmp_path / "data")))


def test_video_files_need_pyav(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    folder = write_clips(tmp_path / "videos", [b"\0\0\0\x18ftypmp42"], ".mp4")
    with pytest.raises(
        ValueError, match=r"A video file needs av, which is not installed: pip install .cm_diffusers\[video\]"
    ):
        batches_of(replace(config, train_data_dir=str(folder)))
    assert seen(first(batches_of(config))[0]) == MIDDLES  # GIFs do without


def test_teachers_that_are_told_sizes_are_refused(config):
    with pytest.raises(ValueError, match="encoded for Stable Diffusion, but the teacher is told sizes as XL is"):
        video_batches(config, Encoders(echo(), encode_prompts, "fake", micro_conditioning=True), 0)


def test_config_is_a_command_line():
    args = ["--moving_articles", "x", "--sample_n_frames", "8", "--sample_stride", "1", "--no_cache_latents"]
    config = HfArgumentParser(VideoDataConfig).parse_args_into_dataclasses(args)[0]
    assert (config.span, config.cache_latents, config.moving_articles) == (8, False, "x")
    assert VideoDataConfig().span == 61
