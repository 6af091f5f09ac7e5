"""Write frames of the built-in moving articles as captioned images in parquet files, and some of the clips as GIFs."""

import cm_diffusers.engine.early
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet
from transformers.hf_argparser import HfArg

from cm_diffusers.data.moving_articles import MovingArticles
from cm_diffusers.data.sources import DataConfig, load_image_text
from cm_diffusers.engine.cli import parse_configs, refuse_changed, run


@dataclass
class PrepareConfig:
    output_dir: str = HfArg(help="Folder that gets train/train.parquet and test/test.parquet.")
    moving_articles: str = HfArg(
        default="assets/fashion_captioned",
        help="Folder with train and test images on black, their captions (text) and classes (label).",
    )
    train_samples: int = HfArg(default=9600, help="Number of training images, each of a clip of its own.")
    test_samples: int = HfArg(default=2400, help="The same for test images.")
    num_frames: int = HfArg(default=8, help="Frames of a clip, of which an image is a random one.")
    clips_dir: str | None = HfArg(default=None, help="Folder that gets clips of the test images and metadata.jsonl.")
    num_gifs: int = HfArg(default=60, help="With --clips_dir: number of clips.")
    seed: int = HfArg(default=0, help="Seed of articles, motions and chosen frames.")


CONFIGS = (PrepareConfig,)


def write_frames(path: Path, clips: MovingArticles, images: datasets.Dataset, seed: int) -> None:
    rows, label = [], images.features["label"]
    for number in range(clips.num_clips):
        clip, frame = clips.clip(number), np.random.default_rng([seed, number, 1]).integers(clips.num_frames)
        Image.fromarray(clip.frames[frame]).save(buffer := io.BytesIO(), format="PNG", optimize=True)
        image = {"bytes": buffer.getvalue(), "path": f"{number:05d}.png"}
        rows.append({"image": image, "text": [clip.caption], "label": images[clip.row]["label"]})
    texts = datasets.List(datasets.Value("string"))
    schema = datasets.Features(image=datasets.Image(), text=texts, label=label).arrow_schema
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows, schema), path.with_suffix(".tmp"), compression="zstd")
    os.replace(path.with_suffix(".tmp"), path)


def write_gifs(folder: Path, clips: MovingArticles) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(clips.num_clips):
        first, *others = clips.frames(number, np.arange(clips.num_frames))
        first.save(folder / f"{number:05d}.gif", save_all=True, append_images=others, duration=125, loop=0)
        lines.append(json.dumps({"file_name": f"{number:05d}.gif", "text": clips.captions[number][0]}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), "utf-8")


def main() -> None:
    (config,) = parse_configs(CONFIGS, __doc__)
    if not config.clips_dir:
        refuse_changed(config, "num_gifs", "without --clips_dir")
    for split, count in (("train", config.train_samples), ("test", config.test_samples)):
        source = DataConfig(train_data_dir=config.moving_articles, dataset_split=split)
        images = load_image_text(source, ["text", "label"])
        clips = MovingArticles(images, config.num_frames, count, config.seed)
        write_frames(Path(config.output_dir) / split / f"{split}.parquet", clips, images, config.seed)
    if config.clips_dir:
        write_gifs(Path(config.clips_dir), MovingArticles(images, config.num_frames, config.num_gifs, config.seed))


if __name__ == "__main__":
    run(main)
