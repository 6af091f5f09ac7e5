"""Files as cameras, Windows and other programs leave them: read for what they are, or counted and named."""

import json

import numpy as np
import pytest
from PIL import Image

from cm_diffusers.data.images import image_batches
from cm_diffusers.data.prompts import load_prompts
from cm_diffusers.data.sources import captions_of, load_image_text
from cm_diffusers.data.tars import FAULT, tar_rows
from data.test_found import MARK, DataConfig, config_of, encoded, opened, write_images
from data.test_streaming import write_tar


@pytest.mark.parametrize("suffix", ["jpe", "jp2", "TGA", "ppm", "ico", "pcx", "dib", "qoi"])
def test_what_pillow_reads_is_an_image(tmp_path, suffix):
    folder = write_images(tmp_path / "set", "a.png")
    kind = Image.registered_extensions()[f".{suffix.lower()}"]
    (folder / f"b.{suffix}").write_bytes(encoded(kind, np.zeros((16, 16, 3), np.uint8)))
    read, found = opened(folder, [])
    assert set(read) == {"a.png", f"b.{suffix}"}
    assert found.lines() == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("bag 2.0.png, bag 2.0.txt, bag 2.1.png, bag 2.1.txt", ["bag 2.0.png+", "bag 2.1.png+"]),
        ("bag 2.0.png, bag 2.1.png, bag 2.0.txt, bag 2.1.txt", ["bag 2.0.png+", "bag 2.1.png+"]),
        ("bag 2.png, bag 2.txt, bag 2.1.png, bag 2.1.txt", ["bag 2.png+", "bag 2.1.png+"]),
        ("bag 2.0.png, bag 2.0.txt, bag 2.1.png", ["bag 2.0.png+", "bag 2.1.png"]),
        ("mr.a.png, mr.a.json, mr.b.png, mr.b.txt", ["mr.a.png+", "mr.b.png+"]),
        ("a. coat.JPG, a. coat.txt, a. bag.JPG, a. bag.txt", ["a. coat.JPG+", "a. bag.JPG+"]),
        ("v1.0.2.png, v1.0.2.txt, v1.0.3.png, v1.0.3.txt", ["v1.0.2.png+", "v1.0.3.png+"]),
        ("0.png, 0.txt, 0.png, 0.txt", ["0.png+", "0.png+"]),
        ("a.image.png, a.caption.txt", ["a.image.png+"]),  # the others are single samples, as WebDataset has them
        ("a.png, a.depth.png, a.json, a.depth.json", ["a.png+"]),
        ("a.0.png, a.1.png, a.txt", ["a.0.png+"]),
    ],
)
def test_dots_in_names_of_tar_members(tmp_path, names, expected):
    members = [(name, b'{"text": "x"}' if name.endswith("json") else b"x") for name in names.split(", ")]
    rows = tar_rows([str(write_tar(tmp_path / "x.tar", members))], "image", "text")
    assert [row["image"]["path"] + "+" * any(row["text"]) for row in rows] == expected


def test_what_of_a_tar_file_is_not_read_is_told(tmp_path):
    png = encoded("PNG", np.zeros((2, 2, 3), np.uint8))
    members = {
        "a.png": png, "a.back.jpg": png, "a.txt": b"a", "b.png": png, "b.json": b'{"text": 7}', "c.png": png,
        "c.txt": "a bag".encode("utf-16-le"), "d.png": png, "d.txt": b"d", "e": png, "f.JFIF": png, "f.txt": MARK + b"f",
    }  # fmt: skip
    rows = list(tar_rows([str(write_tar(tmp_path / "x.tar", members))], "image", "text"))
    assert [(row["image"] and row["image"]["path"], row["text"], row[FAULT]) for row in rows] == [
        ("a.png", ["a"], "further images of a sample, whose first is read"),
        ("b.png", [], "captions that are no texts"),
        ("c.png", [], "captions that are not UTF-8"),
        ("d.png", ["d"], None),
        (None, [""], None),  # counted by who reads the rows
        ("f.JFIF", ["f"], None),
    ]


def test_a_tar_file_of_no_use_says_why(tmp_path):
    shard = write_tar(tmp_path / "x.tar", {"a.png": b"x", "a.txt": "café".encode("latin-1")})
    config = DataConfig(train_shards_path_or_url=str(shard), cache_dir=str(tmp_path / "hf"))
    with pytest.raises(
        ValueError, match=r"they hold \[png, txt\]; left out, captions that are not UTF-8: 1 \(a\.png\);"
    ):
        load_image_text(config)


def test_marks_within_texts_do_not_reach_the_text_tower(tmp_path):
    folder = write_images(tmp_path / "set", "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["\\ufeffa bag", "\\ufeff"]}')
    assert captions_of(opened(folder)[0]["a.png"], "text") == ["a bag"]
    (tmp_path / "p.txt").write_bytes(MARK + b"a bag\r\n" + MARK + b"a coat\r\n")  # two files, one after the other
    assert [prompt.text for prompt in load_prompts(tmp_path / "p.txt")] == ["a bag", "a coat"]
    (tmp_path / "p.txt").write_bytes("a bag".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"p\.txt cannot be read: it is no text in UTF-8 \(byte 0x00 at place 1\)"):
        load_prompts(tmp_path / "p.txt")


def test_paths_as_windows_and_programs_write_them(tmp_path):
    folder = write_images(tmp_path / "set", "sub/a.png", "7", "b.png")
    names = ["sub\\a.png", 7, "b.png"]
    for name in names:
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
        assert opened(folder)[0] == {str(name).rpartition("\\")[2]: "x"}
    (folder / "metadata.jsonl").write_text('{"file_name": ["a.png", "b.png"], "text": "x"}')
    with pytest.raises(
        ValueError, match=r"must hold paths in its column file_name, but a row holds \['a\.png', 'b\.png'"
    ):
        opened(folder)


def test_links_are_followed_and_counted(tmp_path):
    folder = write_images(tmp_path / "set", "a.png")
    write_images(tmp_path / "elsewhere", "b.png", "sub/c.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "sub" / "back").symlink_to(folder)  # which would lead round for ever
    (folder / "lost.png").symlink_to(tmp_path / "nowhere.png")
    found = image_batches(config_of(folder, train_batch_size=1), 0).found
    assert (found.images, found.lines()) == (3, ["left out, images that are not there: 1 (lost.png)"])


def test_two_columns_of_one_name_are_told(tmp_path):
    folder = write_images(tmp_path / "set", "a.png")
    (folder / "metadata.csv").write_text("file_name,text,text\na.png,x,y\n")
    with pytest.raises(
        ValueError, match=r"metadata\.csv cannot be read: it has several columns named text, give each"
    ):
        opened(folder)
