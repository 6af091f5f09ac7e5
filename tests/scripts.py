"""Runs the training scripts inside the test's process, on a folder of small captioned images."""

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
from PIL import Image
from tiny import tiny_pipeline
from toys import forget_accelerate

from cm_diffusers.engine import cli
from cm_diffusers.publishing.pipelines import lcm_pipeline, lcm_record, lcm_scheduler, save_pipeline


FOLDER = Path(__file__).parents[1] / "training"
CAPTIONS = ("a photo of a bag", "a coat", "an ankle boot", "a photo of trousers")


@cache
def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def flags(**values: object) -> list[str]:
    """`{"a": [1, 2], "b": True, "c": False}` as --a 1 2 --b."""
    found = []
    for name, value in values.items():
        if value is not False:
            found.append(f"--{name}")
        if not isinstance(value, bool):
            found += [str(item) for item in (value if isinstance(value, list) else [value])]
    return found


def run_script(name: str, **values: object) -> None:
    """As from the command line, error handling included."""
    forget_accelerate()
    with mock.patch.object(sys, "argv", [str(FOLDER / f"{name}.py"), *flags(**values)]):
        cli.run(script(name).main)
    forget_accelerate()


def image_folder(folder: Path, number: int = 6, **columns: list) -> Path:
    """PNGs of noise, 36 x 40 pixels, with `metadata.jsonl`; `columns` beside file_name and text."""
    folder.mkdir(parents=True)
    rows = []
    for i in range(number):
        pixels = np.random.default_rng(i).integers(0, 256, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(
            {"file_name": f"{i}.png", "text": CAPTIONS[i % len(CAPTIONS)]} | {k: v[i] for k, v in columns.items()}
        )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def models_folder(folder: Path, guidance_scale: float = 1.0) -> Path:
    """A tiny diffusion model in `teacher/`, and in `student/` an LCM of it with guidance in its weights."""
    teacher = tiny_pipeline()
    teacher.save_pretrained(folder / "teacher")
    scheduler = lcm_scheduler(teacher, 50, 10.0)
    record = lcm_record(str(folder / "teacher"), "distilled", 2.0, 2.0, guidance_scale, scheduler)
    save_pipeline(lcm_pipeline(teacher, teacher.unet, scheduler), folder / "student", False, record)
    return folder


def captioned_folder(folder: Path, files: list[bytes]) -> Path:
    """The encoded images in a folder, with `metadata.jsonl`: image i has the caption "caption i"."""
    folder.mkdir(parents=True)
    rows = [{"file_name": str(i), "text": f"caption {i}"} for i in range(len(files))]
    for row, content in zip(rows, files, strict=True):
        (folder / row["file_name"]).write_bytes(content)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def data_flags(data: Path, cache: Path) -> dict[str, object]:
    return {
        "train_data_dir": data,
        "latent_cache_dir": cache,
        "resolution": 32,
        "center_crop": True,
        "random_flip": True,
        "train_batch_size": 2,
        "report_to": "none",
    }
