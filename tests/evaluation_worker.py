"""One evaluation by one process and by two: `evaluation_worker.py FOLDER`; writes `one`, `two` and `shares.json`."""

import json
import os
import sys
from pathlib import Path

from evaluation.test_evaluation import save_tiny_lora, write_reference
from processes import together
from scripts import run_script
from tiny import FASHION_LABELS, tiny_clip, tiny_pipeline

from cm_diffusers.evaluation import seen
from cm_diffusers.models.classifier import ImageClassifier


FLAGS = {"num_images": 10, "eval_batch_size": 4, "num_inference_steps": [1, 2], "reference_steps": 2, "resolution": 32}


def evaluate(folder: Path, name: str) -> int:
    """Number of the images that this process has looked at."""
    extract, counts = seen.extract_features, []
    seen.extract_features = lambda extractor, images: counts.append(len(images)) or extract(extractor, images)
    run_script(
        "evaluate", **FLAGS, guidance_scales=2.0, label_column="label", output_dir=folder / name,
        pipelines=folder / "lora", teacher=folder / "teacher", train_data_dir=folder / "data",
        feature_extractor=folder / "net", clip_model=folder / "clip",
    )  # fmt: skip
    seen.extract_features = extract
    return sum(counts)


def main() -> None:
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    (folder / f"share-{rank}.json").write_text(json.dumps(evaluate(folder, "two")))


if __name__ == "__main__":
    home = Path(sys.argv[1])
    tiny_pipeline().save_pretrained(home / "teacher")
    save_tiny_lora(home / "lora", home / "teacher")
    for part in tiny_clip():
        part.save_pretrained(home / "clip")
    ImageClassifier(labels=list(FASHION_LABELS), channels=(4, 8), num_features=6).save_pretrained(home / "net")
    (home / "data").mkdir()
    write_reference(home / "data", list(range(10)))
    together(2, main)
    evaluate(home, "one")
    shares = {rank: json.loads((home / f"share-{rank}.json").read_text()) for rank in "01"}
    (home / "shares.json").write_text(json.dumps(shares))
