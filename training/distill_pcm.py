"""Distil a text-to-image teacher into a student that jumps from phase to phase, with a critic: PCM (--lora)."""

import cm_diffusers.engine.early

from cm_diffusers.data.clip_config import ClipConfig
from cm_diffusers.data.generated import GenerationConfig
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.optimizers import CooledOptimConfig
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.models.critics import CriticConfig
from cm_diffusers.models.families.base import network_of
from cm_diffusers.models.students import StudentConfig
from cm_diffusers.models.teachers import TeacherConfig, load_teacher
from cm_diffusers.objectives.pcm import PCMConfig, PCMObjective
from cm_diffusers.publishing.hub import HubConfig, check_hub
from cm_diffusers.tasks.callbacks import ValidationConfig
from cm_diffusers.tasks.teachings import teaching_of
from cm_diffusers.tasks.text_to_image import critic_optim, distill, text_dtype
from cm_diffusers.tasks.text_to_image_checks import check_distilled, check_pcm, warn_of_guidance
from cm_diffusers.tasks.watching import WatchConfig


CONFIGS = (
    TeacherConfig, StudentConfig, DataConfig, GenerationConfig, ClipConfig, PCMConfig, CriticConfig, CooledOptimConfig, TrainConfig,
    ValidationConfig, WatchConfig, HubConfig,
)  # fmt: skip


def main() -> None:
    source, student, _, _, _, method, judge, optim, train, _, _, hub = configs = parse_configs(CONFIGS, __doc__)
    check_pcm(method, judge, train.max_train_steps)
    seed_everything(train.seed)
    check_distilled(student, train.mixed_precision)
    warn_of_guidance(source.pretrained_teacher_model, method.w_max)
    repo_id = check_hub(hub, train.output_dir, train.report_to)
    teacher = load_teacher(source, student.loaded_dtype, late=True, text_dtype=text_dtype(configs))
    teaching = teaching_of(teacher, student.guidance_embedding_dim(network_of(teacher)), method)
    objective = PCMObjective(method, teaching, judge.critic != "none")
    optims = {"student": optim, "critic": critic_optim(judge, optim)}
    if address := distill("pcm", teacher, objective, optims, configs, repo_id):
        print(address)


if __name__ == "__main__":
    run(main)
