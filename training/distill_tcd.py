"""Distil a text-to-image teacher into a student whose jumps end anywhere on its trajectories: TCD (--lora)."""

import cm_diffusers.engine.early

from cm_diffusers.data.clip_config import ClipConfig
from cm_diffusers.data.generated import GenerationConfig
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.optimizers import CooledOptimConfig
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.models.families.base import network_of
from cm_diffusers.models.students import StudentConfig
from cm_diffusers.models.target_input import TARGET_DIM
from cm_diffusers.models.teachers import TeacherConfig, load_teacher
from cm_diffusers.objectives.tcd import TCDConfig, TCDObjective
from cm_diffusers.publishing.hub import HubConfig, check_hub
from cm_diffusers.tasks.callbacks import ValidationConfig
from cm_diffusers.tasks.teachings import teaching_of
from cm_diffusers.tasks.text_to_image import distill, text_dtype
from cm_diffusers.tasks.text_to_image_checks import check_distilled, check_tcd, warn_of_guidance
from cm_diffusers.tasks.watching import WatchConfig


CONFIGS = (
    TeacherConfig, StudentConfig, DataConfig, GenerationConfig, ClipConfig, TCDConfig, CooledOptimConfig, TrainConfig, ValidationConfig,
    WatchConfig, HubConfig,
)  # fmt: skip


def main() -> None:
    source, student, _, _, _, method, optim, train, _, _, hub = configs = parse_configs(CONFIGS, __doc__)
    check_tcd(method)
    seed_everything(train.seed)
    check_distilled(student, train.mixed_precision)
    warn_of_guidance(source.pretrained_teacher_model, method.w_max)
    repo_id = check_hub(hub, train.output_dir, train.report_to)
    teacher = load_teacher(source, student.loaded_dtype, late=True, text_dtype=text_dtype(configs))
    dim = student.guidance_embedding_dim(network_of(teacher))
    target_dim = TARGET_DIM if method.target_time == "embedded" else None
    objective = TCDObjective(method, teaching_of(teacher, dim, method, target_dim))
    if address := distill("tcd", teacher, objective, optim, configs, repo_id):
        print(address)


if __name__ == "__main__":
    run(main)
