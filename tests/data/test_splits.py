"""What is trained on is of the split that was asked for; what is of another is counted and named."""

from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from cm_diffusers.data.folders import folder_of_test_data
from cm_diffusers.data.splits import other_than_training
from data.test_found import config_of, counted, opened, write_images


def write_tables(folder: Path, *names: str) -> Path:
    """Tables of one row, whose caption is the table's name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rows = [{"image": {"bytes": None, "path": f"{name}.png"}, "text": name}]
        parquet.write_table(pa.Table.from_pylist(rows), folder / name)
    return folder


def texts(folder: Path, split: str = "train") -> set[str]:
    return set(opened(folder, dataset_split=split)[0].values())


@pytest.mark.parametrize(
    "names",
    [
        {"train": "data/train-00000-of-00001.parquet", "test": "data/test-00000-of-00001.parquet"},
        {"train": "train.parquet", "validation": "val.parquet", "test": "eval.parquet"},
        {"train": "my_train_rows.parquet", "test": "rows-test_0.parquet"},
        {"train": "default/train/0000.parquet", "test": "default/test/0000.parquet"},
        {"train": "train2017/rows.parquet", "val": "val2017/rows.parquet"},
        {"train": "rows.parquet", "test": "test/rows.parquet"},  # what tells no split is for training
        {"train_sft": "data/train_sft-00000-of-00001.parquet", "test_gen": "data/test_gen-00000-of-00001.parquet"},
    ],
)
def test_tables_of_one_split_are_read(tmp_path, names):
    folder = write_tables(tmp_path / "set", *names.values())
    for split, name in names.items():
        assert texts(folder, split) == {name}
    with pytest.raises(ValueError, match=r"--train_data_dir .*set has no split nonsense \(the splits in it: "):
        texts(folder, "nonsense")


def test_others_are_counted_and_named(tmp_path):
    folder = write_tables(tmp_path / "set", "train.parquet", "test.parquet", "validation.parquet", "more.parquet")
    assert counted(opened(folder)[1]) == {
        "files of the split test": (1, ["test.parquet"]),
        "files of the split validation": (1, ["validation.parquet"]),
        "files outside the split train": (1, ["more.parquet"]),
    }


def test_images_of_one_split_are_read(tmp_path):
    folder = write_images(tmp_path / "set", "images", "all/test", "all/train")
    for name in ("images", "all/test", "all/train"):
        (folder / name).unlink()
    for name in ("images/train/a.png", "images/test/b.png", "images/val/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(name)
    assert opened(folder)[0] == {"a.png": "images/train/a.png"}
    assert opened(folder, dataset_split="validation")[0] == {"c.png": "images/val/c.png"}


def test_rows_of_metadata_that_name_files_of_another_split_are_left_out(tmp_path):
    folder = write_images(tmp_path / "set", "train/a.png", "test/b.png", "c.png")
    (folder / "metadata.csv").write_text("file_name,text\ntrain/a.png,a\n./test/b.png,b\nc.png,c")
    read, found = opened(folder)
    assert read == {"a.png": "a", "c.png": "c"}
    assert counted(found) == {"files of the split test": (1, ["test/b.png"])}
    assert opened(folder, dataset_split="test")[0] == {"b.png": "b"}


def test_a_folder_of_the_name_of_a_split_holds_that_split(tmp_path):
    folder = write_tables(tmp_path / "set", "train/train.parquet", "test/test.parquet")
    assert texts(folder / "test") == {"test/test.parquet"}
    assert folder_of_test_data(str(folder / "test"))["dataset_split"] == "train"  # all that tells no other
    assert folder_of_test_data(str(folder))["dataset_split"] == "test"


def test_a_split_that_is_not_there_is_refused(tmp_path):
    only = write_tables(tmp_path / "only", "test.parquet")
    with pytest.raises(ValueError, match=r"only has no split train \(the splits in it: test\)"):
        opened(only)
    plain = write_images(tmp_path / "plain", "a.png")
    with pytest.raises(ValueError, match=r"plain has no split test \(no name in it tells a split\)"):
        opened(plain, [], dataset_split="test")


def test_readme_tells_splits_and_data_sets(tmp_path):
    folder = write_tables(tmp_path / "set", "one.parquet", "two.parquet")
    told = "- config_name: default\n  data_files:\n  - {split: train, path: one.parquet}\n  - {split: test, path: t*.parquet}"
    (folder / "README.md").write_text(f"---\nconfigs:\n{told}\n---\n# Mine\n")
    assert (texts(folder), texts(folder, "test")) == ({"one.parquet"}, {"two.parquet"})
    told = "- {config_name: big, data_files: one.parquet}\n- {config_name: small, data_files: [two.parquet]}"
    (folder / "README.md").write_text(f"---\nconfigs:\n{told}\n---\n# Mine\n")
    with pytest.raises(ValueError, match=r"tells of 2 data sets \(big, small\): choose one by --dataset_name"):
        opened(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert texts(folder) == {"one.parquet", "two.parquet"}


def test_tar_files_of_other_splits_are_told():
    names = ["x/train-0.tar", "x/test-0.tar", "https://host/validation/val_1.tar", "x/attestation.tar"]
    assert other_than_training(names) == names[1:3]


def test_a_class_of_the_name_of_no_split_stays(tmp_path):
    folder = write_images(tmp_path / "set", "evaluating/a.png", "a train station/b.png", "contest/c.png")
    assert set(opened(folder, [])[0]) == {"a.png", "b.png", "c.png"}
    assert config_of(folder).dataset_split == "train"
