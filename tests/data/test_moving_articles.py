import io
from collections import Counter
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pytest
from PIL import Image
from scripts import run_script
from transformers import CLIPTokenizer

from cm_diffusers.data import moving_articles
from cm_diffusers.data.clip_sources import FileClips
from cm_diffusers.data.found import Found
from cm_diffusers.data.moving_articles import DIRECTIONS, MovingArticles
from cm_diffusers.data.preprocessing import decode_image
from cm_diffusers.data.sources import DataConfig, load_image_text


ROOT = Path(__file__).parents[2]
FRAMES = 8
TRAVELS = tuple(DIRECTIONS)


@pytest.fixture(scope="module")
def articles(tmp_path_factory) -> datasets.Dataset:
    folder = str(ROOT / "assets" / "fashion_captioned")
    cache = str(tmp_path_factory.mktemp("hf"))
    return load_image_text(DataConfig(train_data_dir=folder, dataset_split="test", cache_dir=cache), ["text", "label"])


@pytest.fixture(scope="module")
def clips(articles) -> list:
    """Without afterimages."""
    made = MovingArticles(articles, FRAMES, 120)
    with mock.patch.object(moving_articles, "ECHOES", 0):
        return [made.clip(number) for number in range(120)]


@pytest.fixture
def sharp(monkeypatch):
    monkeypatch.setattr(moving_articles, "ECHOES", 0)


def centroids(frames: np.ndarray) -> np.ndarray:
    """x and y (F, 2) of the brightness of (F, H, W, 3)."""
    grey = frames.mean(-1)
    rows, columns = np.mgrid[: grey.shape[1], : grey.shape[2]]
    return np.stack([(grey * axis).sum((1, 2)) for axis in (columns, rows)], -1) / grey.sum((1, 2))[:, None]


def named(clips: list, *names: str) -> list:
    found = [clip for clip in clips if clip.motion.name in names]
    assert found
    return found


def pictures(*images: Image.Image, captions=None) -> datasets.Dataset:
    files = []
    for image in images:
        image.save(buffer := io.BytesIO(), format="PNG")
        files.append({"bytes": buffer.getvalue(), "path": None})
    captions = captions or ["a bag"] * len(images)
    return datasets.Dataset.from_dict({"image": files, "text": captions}).cast_column(
        "image", datasets.Image(decode=False)
    )


def test_the_truth_is_where_the_article_is_seen(clips):
    for clip in clips:
        np.testing.assert_allclose(centroids(clip.frames), clip.motion.centre, atol=0.3)


def test_travelling_is_straight_even_and_over_the_middle(clips):
    for clip in named(clips, *TRAVELS):
        steps = np.diff(clip.motion.centre, axis=0)
        np.testing.assert_allclose(steps, steps[:1].repeat(FRAMES - 1, 0), atol=1e-9)
        along = steps[0] @ DIRECTIONS[clip.motion.name]
        assert 1.0 <= along <= 1.7
        assert np.abs(steps[0]).sum() == pytest.approx(along)
        assert clip.caption.endswith(f" moving {clip.motion.name}")
        assert not clip.motion.angle.any()
        seen = np.argwhere(clip.frames.mean(-1)[3:5].mean(0) > 30)  # halfway through the clip
        middle = (seen.min(0) + seen.max(0))[::-1] / 2
        assert np.abs(middle - 15.5).max() < 2 + 1.5  # ACROSS, and where the faint ends of an article are not counted


def test_bouncing_is_reflected_on_both_axes_and_stays_inside(clips):
    for clip in named(clips, "bouncing"):
        steps = np.diff(clip.motion.centre, axis=0)
        assert (steps.min(0) < 0).all()
        assert (steps.max(0) > 0).all()
        speed = np.abs(steps).max(0)
        assert ((speed >= 1.0 - 1e-9) & (speed <= 1.7 + 1e-9)).all()
        assert ((np.abs(steps) < speed - 1e-9).sum(0) <= 2).all()  # only the steps that meet a border are shorter
        light = clip.frames.sum((1, 2, 3), dtype=float)
        assert light.min() > 0.9 * light.max()
    starts = {tuple(np.sign(clip.motion.centre[1] - clip.motion.centre[0])) for clip in named(clips, "bouncing")}
    assert starts == {(-1, -1), (-1, 1), (1, -1), (1, 1)}


def test_rotating_is_clockwise_about_the_centroid(clips):
    for clip in named(clips, "rotating"):
        np.testing.assert_array_equal(clip.motion.centre, 15.5)
        turns = np.diff(clip.motion.angle)
        assert clip.motion.angle[0] == 0
        assert 8 <= turns[0] <= 20
        np.testing.assert_allclose(turns, turns[0])
        first = Image.fromarray(clip.frames[0])
        differences = []
        for sign in (-1, 1):  # Pillow counts counterclockwise
            turned = first.rotate(sign * clip.motion.angle[3], Image.Resampling.BICUBIC, center=(16, 16))
            differences.append(np.abs(np.asarray(turned, float) - clip.frames[3]).mean())
        assert differences[0] < 4
        assert differences[1] > 2 * differences[0]


@pytest.mark.parametrize("size", [(30, 9), (9, 30), (10, 3)])
@pytest.mark.usefixtures("sharp")
def test_articles_are_twenty_pixels_long(size):
    image = Image.new("L", (size[0] + 6, size[1] + 4))
    image.paste(255, (1, 3, 1 + size[0], 3 + size[1]))
    made = MovingArticles(pictures(image), FRAMES, 6)
    for number in range(6):
        frames = made.clip(number).frames
        np.testing.assert_allclose(frames[..., 0].sum((1, 2)) / 255, 20 * 6, rtol=0.02)
        if made.clip(number).motion.name != "rotating":
            seen = np.argwhere(frames[0, ..., 0] > 127)
            assert sorted(seen.max(0) - seen.min(0) + 1) in ([6, 20], [7, 20], [6, 21], [7, 21], [6, 19], [5, 20])


@pytest.mark.usefixtures("sharp")
def test_motion_is_not_rounded_to_pixels():
    wide = Image.new("L", (40, 10))
    wide.paste(Image.linear_gradient("L").resize((36, 6)), (2, 2))
    made = MovingArticles(pictures(wide), FRAMES, 6)
    clip = made.clip(0)
    assert clip.motion.name == "left"
    steps = np.diff(centroids(clip.frames)[:, 0])
    np.testing.assert_allclose(steps, np.diff(clip.motion.centre[:, 0]), atol=0.1)
    assert steps.std() < 0.1


def test_afterimages_fade_and_leave_the_truth_alone(articles, clips):
    """From the seventh frame on, all that has left a trace was in the clip."""
    made = MovingArticles(articles, FRAMES, 120)
    for number in range(12):
        found, plain = made.clip(number), clips[number]
        np.testing.assert_array_equal(found.motion.centre, plain.motion.centre)
        for f in (6, 7):
            traces = [plain.frames[f - 2 * k] * 0.5**k for k in range(4)]
            np.testing.assert_array_equal(found.frames[f], np.max(traces, 0).round())
        assert (found.frames[0] >= plain.frames[0]).all()
        assert (found.frames[0] > plain.frames[0]).any()  # it moved before the clip begins, too


def test_a_clip_is_a_pure_function_of_seed_and_number(articles):
    one, more = MovingArticles(articles, FRAMES, 10, seed=3), MovingArticles(articles, FRAMES, 500, seed=3)
    other = MovingArticles(articles, FRAMES, 10, seed=4)
    for number in (9, 2):
        clips = one.clip(number), more.clip(number), other.clip(number)
        assert np.array_equal(clips[0].frames, clips[1].frames)
        assert not np.array_equal(clips[0].frames, clips[2].frames)
        assert clips[0].caption == clips[1].caption == one.captions[number][0]
        assert one.digests[number] == more.digests[number] != other.digests[number]
    single = MovingArticles(pictures(Image.new("L", (8, 8), 9)), FRAMES, 18)
    assert len(set(single.digests)) == 18


def test_every_article_does_every_motion_equally_often(articles):
    made = MovingArticles(articles, FRAMES, 180)
    counts = Counter(text for (text,) in made.captions)
    assert len(counts) == 60
    assert set(counts.values()) == {3}
    label = articles.features["label"]
    for number in (0, 7, 100, 179):
        clip = made.clip(number)
        assert clip.caption == made.captions[number][0]
        assert label.int2str(articles[clip.row]["label"]) in clip.caption


def test_every_caption_fits_into_the_bundled_tokenizer(articles):
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "assets" / "fashion_teacher" / "tokenizer")
    captions = [text for (text,) in MovingArticles(articles, FRAMES, 60).captions]
    assert len(set(captions)) == 60
    lengths = [len(tokenizer(text).input_ids) for text in captions]  # with the two marks
    assert max(lengths) == tokenizer.model_max_length == 16


def test_colours_are_kept():
    red = Image.new("RGB", (12, 12))
    red.paste((200, 0, 0), (2, 2, 10, 10))
    frames = MovingArticles(pictures(red), FRAMES, 6).clip(0).frames
    assert frames[..., 1:].max() == 0
    assert frames[..., 0].max() >= 199


@pytest.mark.parametrize("frames", [1, 20, 61])
def test_clips_in_which_the_article_would_leave_are_refused(frames):
    with pytest.raises(ValueError, match=f"stay in view for 2 to 19 frames, but a clip is to span {frames}: "):
        MovingArticles(pictures(Image.new("L", (8, 8), 9)), frames, 6)


def test_images_that_cannot_move():
    dataset = pictures(Image.new("L", (8, 8), 9), captions=[""])
    with pytest.raises(ValueError, match="image 0 has no caption to name it by"):
        MovingArticles(dataset, FRAMES, 6)
    with pytest.raises(ValueError, match="image 0 is black; leave it out"):
        MovingArticles(pictures(Image.new("L", (8, 8))), FRAMES, 6).clip(0)
    damaged = datasets.Dataset.from_dict({"image": [{"bytes": b"x", "path": None}], "text": ["a"]})
    with pytest.raises(ValueError, match="image 0 is unreadable; leave it out"):
        MovingArticles(damaged, FRAMES, 6).clip(0)


def test_prepare_moving_articles_writes_what_the_clips_show(tmp_path, articles):
    source = ROOT / "assets" / "fashion_captioned"
    run_script(
        "prepare_moving_articles", output_dir=tmp_path / "frames", moving_articles=source, train_samples=6,
        test_samples=12, clips_dir=tmp_path / "clips", num_gifs=3,
    )  # fmt: skip
    made = MovingArticles(articles, FRAMES, 12)
    config = DataConfig(train_data_dir=str(tmp_path / "frames"), dataset_split="test", cache_dir=str(tmp_path / "hf"))
    rows = load_image_text(config, ["text", "label"])
    assert rows.features["label"] == articles.features["label"]
    assert len(rows) == 12
    which = []
    for number, row in enumerate(rows):
        clip, image = made.clip(number), np.asarray(decode_image(row["image"]))
        which += [index for index, frame in enumerate(clip.frames) if np.array_equal(frame, image)]
        assert row["text"] == [clip.caption]
        assert row["label"] == articles[clip.row]["label"]
    assert len(which) == 12
    assert len(set(which)) > 3
    gifs = FileClips.of(
        DataConfig(train_data_dir=str(tmp_path / "clips"), image_column="video"), FRAMES, Found("clips")
    )
    assert gifs.captions == made.captions[:3]
    assert gifs.lengths == [FRAMES] * 3
    for number in range(3):
        found = np.stack([np.asarray(frame) for frame in gifs.frames(number, range(FRAMES))])
        assert np.array_equal(found, made.clip(number).frames)
