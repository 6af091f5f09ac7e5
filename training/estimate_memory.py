"""Estimate what a distillation by distill_lcm.py or distill_scott.py would take: bytes of each part, without any weights."""

import cm_diffusers.engine.early
import json
from dataclasses import dataclass
from typing import ClassVar

from transformers.hf_argparser import HfArg

from cm_diffusers.data.clip_config import ClipConfig
from cm_diffusers.data.generated import GenerationConfig
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.engine.cli import parse_words, run
from cm_diffusers.engine.optimizers import CooledOptimConfig
from cm_diffusers.engine.recipes import shipped
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.errors import read_text
from cm_diffusers.models.students import StudentConfig
from cm_diffusers.models.teachers import TeacherConfig
from cm_diffusers.objectives.lcm import LCMConfig
from cm_diffusers.tasks.callbacks import ValidationConfig
from cm_diffusers.tasks.memory import Shape, as_table, estimate
from cm_diffusers.tasks.text_to_image import text_dtype
from cm_diffusers.tasks.watching import WatchConfig


@dataclass
class ShapeConfig:
    """The teacher's sizes."""

    is_run: ClassVar[bool] = False

    shape: str = HfArg(
        help="JSON of a teacher's sizes, by its path or its name in the folder recipes: shape_flux_dev ..."
    )


CONFIGS = (
    ShapeConfig, TeacherConfig, StudentConfig, DataConfig, GenerationConfig, ClipConfig, LCMConfig, CooledOptimConfig, TrainConfig,
    ValidationConfig, WatchConfig,
)  # fmt: skip


def main() -> None:
    given, _, student, data, _, clips, _, optim, train, *_ = configs = parse_words(CONFIGS, __doc__)
    shape = Shape.from_config(json.loads(read_text(shipped("--shape", given.shape, ".json"))))
    print(as_table(estimate(shape, student, optim, train, data, clips, text_dtype(configs))))


if __name__ == "__main__":
    run(main)
