"""Nothing of the user's is left out without a word, and captions are the texts that were written."""

import codecs
import io
import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from tiny import tiny_tokenizer
from tiny_flow_a import tiny_gemma_tokenizer, tiny_t5_tokenizer

from cm_diffusers.data.clip_sources import FileClips
from cm_diffusers.data.encoders import too_long
from cm_diffusers.data.found import Found
from cm_diffusers.data.generated import read_prompts
from cm_diffusers.data.images import image_batches
from cm_diffusers.data.preprocessing import decode_image, fault_of
from cm_diffusers.data.prompts import load_prompts
from cm_diffusers.data.sources import DataConfig, load_image_text
from cm_diffusers.data.tables import read_table
from cm_diffusers.data.tars import tar_rows, tar_shards
from cm_diffusers.evaluation.reference import ReferenceConfig, load_reference
from data.test_streaming import write_tar


CAPTIONS = ["007", "2021-01-01", 'a "red"\nbicycle, leaning', "Ünïcode", " 1.50 "]
MARK = codecs.BOM_UTF8


def write_images(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(encoded("PNG", np.full((4, 4, 3), 10 * i, np.uint8)))
    return folder


def encoded(kind: str, pixels: np.ndarray, **options) -> bytes:
    Image.fromarray(pixels).save(buffer := io.BytesIO(), format=kind, **options)
    return buffer.getvalue()


def config_of(folder: Path, **changes) -> DataConfig:
    return DataConfig(train_data_dir=str(folder), resolution=4, cache_dir=str(folder.parent / "hf"), **changes)


def opened(folder: Path, columns: list[str] | None = None, **changes) -> tuple[dict[str, str], Found]:
    """Captions by the names of the files, and what was found."""
    found = Found(str(folder))
    rows = load_image_text(config_of(folder, **changes), columns, found)
    texts = rows["text"][:] if "text" in rows.column_names else [None] * len(rows)
    return {Path(row["path"]).name: text for row, text in zip(rows["image"][:], texts, strict=True)}, found


def counted(found: Found) -> dict[str, tuple[int, list[str]]]:
    return {reason: (some.number, some.names) for reason, some in found.skipped.items()}


# ---- captions


def write_captions(folder: Path, kind: str) -> None:
    names = [f"{i}.png" for i in range(len(CAPTIONS))]
    rows = [{"file_name": name, "text": text} for name, text in zip(names, CAPTIONS, strict=True)]
    quoted = (f'{row["file_name"]},"{row["text"].replace(chr(34), chr(34) * 2)}"' for row in rows)
    if kind in (".txt", ".caption"):
        for name, text in zip(names, CAPTIONS, strict=True):
            (folder / name).with_suffix(kind).write_bytes(MARK + f"{text}\n".encode())
    elif kind == "jsonl":
        (folder / "metadata.jsonl").write_bytes(MARK + "\n".join(map(json.dumps, rows)).encode())
    elif kind == "csv":
        (folder / "metadata.csv").write_bytes(MARK + "\n".join(["file_name,text", *quoted]).encode())
    else:
        parquet.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", ".txt", ".caption"])
def test_every_way_gives_the_same_captions(tmp_path, kind):
    folder = write_images(tmp_path / "set", *(f"{i}.png" for i in range(len(CAPTIONS))))
    write_captions(folder, kind)
    read, found = opened(folder)
    assert [read[f"{i}.png"].strip() for i in range(len(CAPTIONS))] == [text.strip() for text in CAPTIONS]
    assert found.lines() == []


@pytest.mark.parametrize(
    "texts", [["007", "08", "1e5"], ["2021-01-01", "2022-02-02T10:00:00"], ["true", "null", "NA"]]
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_captions_that_look_like_something_else_stay_texts(tmp_path, kind, texts):
    folder = write_images(tmp_path / "set", *(f"{i:03}.png" for i in range(len(texts))))
    lines = [json.dumps({"file_name": f"{i:03}.png", "text": text}) for i, text in enumerate(texts)]
    if kind == "csv":
        lines = ["file_name,text", *(f"{i:03}.png,{text}" for i, text in enumerate(texts))]
    (folder / f"metadata.{kind}").write_text("\n".join(lines))
    assert list(opened(folder)[0].values()) == texts


def test_long_csv_files_keep_texts_with_line_breaks_whole(tmp_path):
    text = "a line\n" * 40
    (tmp_path / "long.csv").write_text("file_name,text\n" + "".join(f'{i}.png,"{text}"\n' for i in range(8000)))
    assert (tmp_path / "long.csv").stat().st_size > 2 * 2**20
    table = read_table(tmp_path / "long.csv", ["file_name", "text"])
    assert (len(table), set(table["text"].to_pylist())) == (8000, {text})


def test_a_row_may_hold_one_caption_where_others_hold_several(tmp_path):
    folder = write_images(tmp_path / "set", "a.png", "b.png")
    rows = [
        {"file_name": "a.png", "text": "one", "size": 3},
        {"file_name": "b.png", "text": ["x", "y"], "size": "big"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert opened(folder)[0] == {"a.png": ["one"], "b.png": ["x", "y"]}
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": 7}\n{"file_name": "b.png", "text": "x"}')
    with pytest.raises(ValueError, match=r"metadata\.jsonl cannot be read: its column text must hold texts, but"):
        opened(folder)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "a.caption"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encodings_are_named(tmp_path, name, encoding):
    folder = write_images(tmp_path / "set", "a.png")
    content = {"metadata.csv": "file_name,text\na.png,café", "metadata.jsonl": '{"file_name": "a.png", "text": "é"}'}
    (folder / name).write_bytes(content.get(name, "café").encode(encoding))
    with pytest.raises(ValueError, match=rf"the file .*{name} cannot be read: it is no text in UTF-8 \(byte"):
        opened(folder)


def test_prompts_are_read_alike(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(MARK + "a bag\r\n\r\na\u2028coat\n007".encode())
    rows = [{"text": "a bag", "prompt": "a bag"}, {"text": "a\u2028coat", "prompt": "a\u2028coat"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "prompts.jsonl").write_bytes(MARK + lines.encode())
    (tmp_path / "prompts.csv").write_bytes(MARK + b"text\n007\n08")
    assert read_prompts(str(tmp_path / "prompts.txt"), "text") == ["a bag", "a\u2028coat", "007"]
    assert read_prompts(str(tmp_path / "prompts.jsonl"), "text") == ["a bag", "a\u2028coat"]
    assert read_prompts(str(tmp_path / "prompts.csv"), "text") == ["007", "08"]
    assert [prompt.text for prompt in load_prompts(tmp_path / "prompts.txt")] == ["a bag", "a\u2028coat", "007"]
    assert [prompt.text for prompt in load_prompts(tmp_path / "prompts.jsonl")] == ["a bag", "a\u2028coat"]


def test_captions_that_are_cut_are_counted():
    class Words:
        model_max_length = 4

        def __call__(self, texts, truncation):
            return type("Encoding", (), {"input_ids": [text.split() for text in texts]})

    found = Found("set")
    too_long(["a b c d", "a b c d e", "", "a b c d e f"], (Words(),), found)
    (line,) = found.lines()
    assert line == (
        "captions that go on after 4 tokens, where the text tower stops reading: 2 (a b c d e, a b c d e f)"
    )


@pytest.mark.parametrize("make", [tiny_tokenizer, tiny_t5_tokenizer, tiny_gemma_tokenizer])
def test_captions_that_are_surely_short_are_not_tokenized(make):
    """Of random ASCII, the worst that a tokenizer meets, none is called short that it cuts."""
    tokenizer, seen, random = make(), [], np.random.default_rng(0)
    tokenizer.model_max_length = 16

    class Counting:
        model_max_length = 16

        def __call__(self, texts, truncation):
            seen.extend(texts)
            return tokenizer(texts, truncation=truncation)

    texts = ["".join(map(chr, random.integers(32, 127, length))) for length in range(1, 25) for _ in range(40)]
    found = Found("set")
    too_long([*texts, "é" * 5], (Counting(),), found)
    cut = [text for text in texts if len(tokenizer(text).input_ids) > 16]
    assert sum(counted.number for counted in found.remarks.values()) == len(cut) > 0
    short = [text for text in texts if len(text) <= 12]
    assert not set(short) & set(seen)
    assert {"", "é" * 5} <= set(seen)  # the tokenizer's marks are counted once


# ---- what is left out


def test_what_a_folder_of_loose_files_holds(tmp_path, caplog):
    folder = write_images(
        tmp_path / "set", "A.PNG", "b.png", "b.PNG", "c.JPG", "sub/d.png", ".ipynb_checkpoints/a.png"
    )
    write_images(folder, "._A.png", "__MACOSX/e.png")
    (folder / "f.heic").write_bytes(b"?")
    for name in ("Thumbs.db", "README.md", ".DS_Store"):
        (folder / name).write_bytes(b"?")
    for name in ("A.txt", "A.caption", "b.caption", "c.TXT", "lost.txt", "sub/d.txt"):
        (folder / name).write_text(f"from {name}")
    read, found = opened(folder)
    assert read == {
        "A.PNG": "from A.txt", "b.png": "from b.caption", "b.PNG": "from b.caption", "c.JPG": "from c.TXT",
        "d.png": "from sub/d.txt",
    }  # fmt: skip
    assert counted(found) == {
        "hidden files": (3, ["._A.png", ".ipynb_checkpoints/a.png", "__MACOSX/e.png"]),
        "files of another kind": (1, ["f.heic"]),
        "captions without images": (1, ["lost.txt"]),
        "second captions of images": (1, ["A.caption"]),
    }
    assert found.lines()[-1] == "several images with one caption file: 1 (b)"
    with caplog.at_level(logging.WARNING):
        load_image_text(config_of(folder))
    (message,) = caplog.messages
    assert message.startswith(f"{folder}: images to train on; left out, hidden files: 3 (._A.png, ")


def test_what_metadata_does_not_name(tmp_path):
    folder = write_images(tmp_path / "set", "a.png", "b.png", "sub/c.png", "D.JPG", ".ipynb_checkpoints/a.png")
    (folder / "a.txt").write_text("not read")
    (folder / "e.heic").write_bytes(b"?")
    (folder / "metadata.csv").write_text("file_name,text\na.png,a\n./a.png,again\nmissing.png,m\nsub/c.png,c")
    _, found = opened(folder)
    assert counted(found) == {
        "hidden files": (1, [".ipynb_checkpoints/a.png"]),
        "files that metadata.csv does not name": (3, ["D.JPG", "b.png", "e.heic"]),
        "files beside metadata.csv, which is read": (1, ["a.txt"]),
    }
    assert found.lines()[-1] == "files in several rows: 1 (a.png)"
    told = image_batches(config_of(folder, train_batch_size=1), 0).found
    assert (told.images, counted(told)["images that are not there"]) == (3, (1, ["missing.png"]))


def test_upper_case_metadata_and_files_beside_a_split_and_parquet(tmp_path):
    folder = write_images(tmp_path / "set", "train/a.png", "b.png", "test/c.png")
    (folder / "train" / "METADATA.CSV").write_text("file_name,text\na.png,a")
    read, found = opened(folder)
    assert read == {"a.png": "a"}
    assert counted(found) == {
        "files of the split test": (1, ["test/c.png"]), "files outside the split train": (1, ["b.png"]),
    }  # fmt: skip
    tables = write_images(tmp_path / "tables", "loose.png", ".ipynb_checkpoints/x.png")
    rows = pa.Table.from_pylist([{"image": {"bytes": b"", "path": "x.png"}, "text": "x"}])
    for name in ("rows.parquet", ".ipynb_checkpoints/rows.parquet"):
        parquet.write_table(rows, tables / name)
    read, found = opened(tables)
    assert read == {"x.png": "x"}
    assert counted(found)["files beside the parquet files, which are read"] == (1, ["loose.png"])
    assert counted(found)["hidden files"][0] == 2


def test_a_subset_says_what_it_leaves(tmp_path):
    folder = write_images(tmp_path / "set", *(f"{i}.png" for i in range(9)))
    _, found = opened(folder, [], max_train_samples=4)
    number, names = counted(found)["rows beyond --max_train_samples 4"]
    assert (number, len(names)) == (5, 3)


def test_what_a_folder_of_clips_holds(tmp_path):
    folder = write_images(tmp_path / "set", "take/1.png", "take/2.png", "take/notes.png", ".hidden/1.png")
    stills = [Image.new("L", (4, 4), level) for level in (0, 90)]
    for name in ("A.GIF", "b.gif"):
        stills[0].save(folder / name, format="GIF", save_all=True, append_images=stills[1:])
    for name in ("take.caption", "A.txt", "b.txt", "b.caption", "lost.caption"):
        (folder / name).write_bytes(MARK + f"from {name}".encode())
    found = Found(str(folder), kind="clips")
    clips = FileClips.of(config_of(folder, image_column="video"), 2, found)
    assert clips.captions == [["from A.txt"], ["from b.txt"], ["from take.caption"]]
    assert counted(found) == {
        "hidden files": (1, [".hidden/1.png"]), "files of another kind": (1, ["take/notes.png"]),
        "captions without clips": (1, ["lost.caption"]), "second captions of clips": (1, ["b.caption"]),
    }  # fmt: skip


@pytest.mark.parametrize("texts", [["a", None, "b"], [["a"], [], ["b", "c"]], ["a", " ", "b"]])
def test_a_reference_leaves_out_rows_without_a_caption_as_training_does(tmp_path, texts, caplog):
    folder = write_images(tmp_path / "set", "0.png", "1.png", "2.png")
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = ReferenceConfig(train_data_dir=str(folder), resolution=4)
    reference = load_reference(config)
    assert (len(reference.images), reference.prompts) == (2, ["a", "b"])
    assert "left out, images without a caption: 1 (" in caplog.text
    assert len(load_reference(config, captioned=False).images) == 3
    all_of_them = load_reference(config, 3)  # for pipelines that read no prompts
    assert len(all_of_them.images) == 3
    with pytest.raises(ValueError, match="Only 2 of 3 rows of the reference set have a caption"):
        _ = all_of_them.prompts


def test_what_tar_shards_leave_out(tmp_path):
    png = encoded("PNG", np.zeros((2, 2, 3), np.uint8))
    members = {
        "a.PNG": png, "a.TXT": MARK + b"a bag\n", "b.png": png, "b.caption": b"a coat", "c.png": png,
        "c.txt": "café".encode("latin-1"), "d.png": png, "d.json": b"{broken", ".ipynb_checkpoints/e.png": png,
        "__MACOSX/f.png": png, "._g.png": png,
    }  # fmt: skip
    shard = str(write_tar(tmp_path / "x.tar", members))
    rows = list(tar_rows([shard], "image", "text"))
    assert [row["text"] for row in rows] == [["a bag"], ["a coat"], [], [""]]
    found = Found(shard)
    load_image_text(DataConfig(train_shards_path_or_url=shard, cache_dir=str(tmp_path / "hf")), None, found)
    assert counted(found) == {
        "captions that are not UTF-8": (1, ["c.png"]), "damaged .json files": (1, ["d.png"]),
    }  # fmt: skip


def test_addresses_need_a_package_that_is_named_first(monkeypatch):
    def missing(protocol: str) -> None:
        raise ImportError("HTTPFileSystem requires aiohttp")

    monkeypatch.setattr("cm_diffusers.data.tars.get_filesystem_class", missing)
    with pytest.raises(
        ValueError, match=r"https addresses, which is missing: pip install 'cm_diffusers\[streaming\]'\.$"
    ):
        DataConfig(train_shards_path_or_url="https://host/{0..9}.tar").check()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"needs a package that reads nonsense addresses"):
        tar_shards("nonsense://host/x.tar")


# ---- images that are not eight bits of red, green and blue


@pytest.mark.parametrize(
    ("kind", "pixels", "expected"),
    [
        ("TIFF", np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        ("PNG", np.array([[0, 32768, 65535]], np.uint16), [0, 128, 255]),
        ("TIFF", np.array([[0, 32768, 65535]], np.uint16), [0, 128, 255]),
        ("TIFF", np.array([[0.0, 128.0, 255.0]], np.float32), None),
        ("TIFF", np.array([[0.0, np.nan, 1.0]], np.float32), None),
        ("TIFF", np.array([[0, 100, 200]], np.int32), None),
    ],
)
def test_numbers_become_the_colours_they_are_or_are_left_out_by_name(kind, pixels, expected):
    record = {"bytes": encoded(kind, pixels), "path": None}
    image = decode_image(record)
    if expected is None:
        assert image is None
        assert fault_of(record).startswith("with numbers in place of colours")
    else:
        assert np.asarray(image)[0, :, 0].tolist() == expected


def test_palettes_and_inks_keep_their_colours():
    red = Image.new("RGB", (2, 1), (200, 30, 30))
    for image, options in (
        (red.convert("P"), {"format": "PNG"}),
        (red.convert("CMYK"), {"format": "JPEG", "quality": 100}),
    ):
        image.save(buffer := io.BytesIO(), **options)
        decoded = np.asarray(decode_image({"bytes": buffer.getvalue(), "path": None})).astype(int)
        assert np.abs(decoded - [200, 30, 30]).max() < 40


def test_faults_are_told_apart(tmp_path):
    png = encoded("PNG", np.zeros((40, 40, 3), np.uint8))
    folder = write_images(tmp_path / "set", "good.png")
    for name, content in {"empty.png": b"", "cut.png": png[:-30], "junk.png": b"junk"}.items():
        (folder / name).write_bytes(content)
    found = image_batches(config_of(folder, train_batch_size=1), 0).found
    assert (found.images, counted(found)) == (
        1, {"images that cannot be read": (2, ["cut.png", "junk.png"]), "images in empty files": (1, ["empty.png"])},
    )  # fmt: skip
