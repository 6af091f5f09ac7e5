"""Write Fashion-MNIST as captioned 32x32 images in parquet files that `datasets` and `--train_data_dir` read."""

import cm_diffusers.engine.early
import gzip
import io
import os
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet
from transformers.hf_argparser import HfArg

from cm_diffusers.engine.cli import parse_configs, run


NAMES = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
PHRASES = [n if n == "trousers" else f"an {n}" if n[0] in "aeiou" else f"a {n}" for n in NAMES]
LABEL, TEXTS = datasets.ClassLabel(names=NAMES), datasets.List(datasets.Value("string"))
SCHEMA = datasets.Features(image=datasets.Image(), text=TEXTS, label=LABEL).arrow_schema


@dataclass
class PrepareConfig:
    output_dir: str = HfArg(help="Folder that gets train/train.parquet and test/test.parquet.")
    idx_dir: str = HfArg(default="/usr/share/datasets/fashion-mnist", help="Folder with the four IDX .gz files.")
    dataset_name: str | None = HfArg(default=None, help="Hub dataset to read instead: zalando-datasets/fashion_mnist.")
    train_samples: int = HfArg(default=0, help="Class-balanced number of training images to keep; 0 keeps all.")
    test_samples: int = HfArg(default=0, help="The same for test images.")
    seed: int = HfArg(default=0, help="Seed of the class-balanced choice.")


CONFIGS = (PrepareConfig,)


def read_idx(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    paths = [folder / f"{prefix}-images-idx3-ubyte.gz", folder / f"{prefix}-labels-idx1-ubyte.gz"]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise ValueError(f"Missing {', '.join(missing)}: install dataset-fashion-mnist, or pass --dataset_name.")
    images, labels = (gzip.decompress(path.read_bytes()) for path in paths)
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def read_hub(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    rows = datasets.load_dataset(name, split=split).with_format("numpy")[:]
    return rows["image"], rows["label"]


def balanced(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Row numbers, in order, of `count` images (all for 0) spread evenly over the ten classes of equal size."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    turns = np.stack([shuffled[labels[shuffled] == label] for label in range(len(NAMES))], axis=1).reshape(-1)
    return np.sort(turns[: count or None])


def write(path: Path, images: np.ndarray, labels: np.ndarray, count: int, seed: int) -> None:
    rows = balanced(labels, count, seed)
    captions, files = [[f"a photo of {PHRASES[label]}", PHRASES[label]] for label in labels[rows]], []
    for row in rows:
        Image.fromarray(np.pad(images[row], 2)).save(buffer := io.BytesIO(), format="PNG", optimize=True)
        files.append({"bytes": buffer.getvalue(), "path": f"{row:05d}.png"})
    table = pa.table({"image": files, "text": captions, "label": labels[rows]}, schema=SCHEMA)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path.with_suffix(".tmp"), compression="zstd")
    os.replace(path.with_suffix(".tmp"), path)


def main() -> None:
    (config,) = parse_configs(CONFIGS, __doc__)
    for split, prefix, count in (("train", "train", config.train_samples), ("test", "t10k", config.test_samples)):
        hub, output = config.dataset_name, Path(config.output_dir, split, f"{split}.parquet")
        write(output, *(read_hub(hub, split) if hub else read_idx(Path(config.idx_dir), prefix)), count, config.seed)


if __name__ == "__main__":
    run(main)
