"""Print which GPU is enough for which teacher, by the estimate of `training/estimate_memory.py` and its recipes.

A row for each recipe, with the frozen base as the recipe has it, and in 4 bits.
"""

import json
from functools import cache
from pathlib import Path

from cm_diffusers.data.clip_config import ClipConfig
from cm_diffusers.data.generated import GenerationConfig
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.engine.cli import parse_words
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.models.students import StudentConfig
from cm_diffusers.models.teachers import TeacherConfig
from cm_diffusers.objectives.lcm import LCMConfig
from cm_diffusers.tasks.callbacks import ValidationConfig
from cm_diffusers.tasks.memory import GIB, SPARE, TRAINING, Shape, estimate, peak
from cm_diffusers.tasks.text_to_image import text_dtype
from cm_diffusers.tasks.watching import WatchConfig


RECIPES = Path(__file__).parents[1] / "training" / "recipes"
TEACHERS = {  # recipe -> teacher, sizes
    "lcm_sana_600m": ("Sana 0.6B, everything", "shape_sana_600m"),
    "lcm_lora_z_image": ("Z-Image", "shape_z_image"),
    "lcm_lora_sd35_medium": ("Stable Diffusion 3.5 medium", "shape_sd35_medium"),
    "lcm_lora_wan_1_3b": ("Wan 2.1 1.3B", "shape_wan_1_3b"),
    "lcm_lora_flux_dev": ("Flux.1-dev", "shape_flux_dev"),
    "lcm_lora_qwen_image": ("Qwen-Image", "shape_qwen_image"),
}
CONFIGS = (
    TeacherConfig, StudentConfig, DataConfig, GenerationConfig, ClipConfig, LCMConfig, OptimConfig, TrainConfig, ValidationConfig,
    WatchConfig,
)  # fmt: skip
SIZES = (8, 12, 16, 24, 32, 48, 80, 96, 141)  # GB of GPUs


@cache
def shape_of(recipe: str) -> Shape:
    return Shape.from_config(json.loads((RECIPES / f"{TEACHERS[recipe][1]}.json").read_text("utf-8")))


def estimated(recipe: str, *words: str) -> dict[str, dict[str, float]]:
    given = ["--recipe", str(RECIPES / f"{recipe}.args"), *words]
    _, student, data, _, clips, _, optim, train, *_ = configs = parse_words(CONFIGS, __doc__, given)
    return estimate(shape_of(recipe), student, optim, train, data, clips, text_dtype(configs))


def enough(size: float) -> str:
    """The smallest GPU for so many bytes."""
    return f"{next(gpu for gpu in SIZES if gpu >= size / GIB + SPARE)} GB"


def row(recipe: str) -> str:
    found = estimated(recipe)
    cells = [*(f"{sum(sizes.values()) / GIB:.1f}" for sizes in found.values()), enough(peak(found))]
    if "adapters" in found[TRAINING]:
        found = estimated(recipe, "--quantize_teacher", "bnb_4bit")
        cells += [f"{sum(found[TRAINING].values()) / GIB:.1f}", enough(peak(found))]
    else:
        cells += ["–", "–"]
    return "| " + " | ".join([TEACHERS[recipe][0], *cells]) + " |"


def table() -> str:
    head = ["teacher", "images, GiB", "text, GiB", "training, GiB", "GPU", "training in 4 bits, GiB", "GPU in 4 bits"]
    return "\n".join(["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * 6, *map(row, TEACHERS)])


if __name__ == "__main__":
    print(table())
