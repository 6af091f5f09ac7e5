"""Distil a text-to-image teacher into a student of one step with prompts alone: BOOT, a full network or a LoRA (--lora)."""

import cm_diffusers.engine.early

from cm_diffusers.data.prompts_alone import PromptDataConfig
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.optimizers import CooledOptimConfig
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.models.families.base import network_of
from cm_diffusers.models.students import StudentConfig
from cm_diffusers.models.teachers import TeacherConfig, load_teacher
from cm_diffusers.objectives.boot import BOOTConfig, BOOTObjective
from cm_diffusers.publishing.hub import HubConfig, check_hub
from cm_diffusers.tasks.boot import distill, latent_shape
from cm_diffusers.tasks.callbacks import ValidationConfig
from cm_diffusers.tasks.teachings import teaching_of
from cm_diffusers.tasks.text_to_image_checks import check_distilled, warn_of_guidance
from cm_diffusers.tasks.watching import WatchConfig


CONFIGS = (
    TeacherConfig, StudentConfig, PromptDataConfig, BOOTConfig, CooledOptimConfig, TrainConfig, ValidationConfig, WatchConfig,
    HubConfig,
)  # fmt: skip


def main() -> None:
    source, student, data, method, optim, train, _, _, hub = configs = parse_configs(CONFIGS, __doc__)
    seed_everything(train.seed)
    check_distilled(student, train.mixed_precision)
    warn_of_guidance(source.pretrained_teacher_model, method.w_max)
    repo_id = check_hub(hub, train.output_dir, train.report_to)
    teacher = load_teacher(source, student.loaded_dtype, late=True)
    teaching = teaching_of(teacher, student.guidance_embedding_dim(network_of(teacher)), method)
    objective = BOOTObjective(method, teaching, latent_shape(teacher, data.resolution))
    if address := distill(teacher, objective, optim, configs, repo_id):
        print(address)


if __name__ == "__main__":
    run(main)
