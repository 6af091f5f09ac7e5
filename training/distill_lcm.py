"""Distil a Stable Diffusion teacher into a 1-4 step student: LCM (full network) or LCM-LoRA (--lora)."""

from pathlib import Path

from cm_diffusers.data.generated import GenerationConfig, training_batches
from cm_diffusers.data.sources import DataConfig, source_name
from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.trainer import TrainConfig, Trainer
from cm_diffusers.models.students import StudentConfig, make_networks
from cm_diffusers.models.teachers import TeacherConfig, load_teacher
from cm_diffusers.objectives.lcm import LCMConfig, LCMObjective
from cm_diffusers.publishing.hub import HubConfig, check_hub, push_folder
from cm_diffusers.publishing.pipelines import lcm_pipeline, lcm_record, lcm_scheduler, save_lora, save_pipeline
from cm_diffusers.publishing.provenance import describe_run
from cm_diffusers.tasks.callbacks import ValidationConfig, sample_grid
from cm_diffusers.tasks.text_to_image_checks import check_student


CONFIGS = (
    TeacherConfig, StudentConfig, DataConfig, GenerationConfig, LCMConfig, OptimConfig, TrainConfig, ValidationConfig, HubConfig,
)  # fmt: skip


def main() -> None:
    source, student, data, generation, method, optim, train, validation, hub = configs = parse_configs(
        CONFIGS, __doc__
    )
    seed_everything(train.seed)
    check_student(student, train.mixed_precision)
    repo_id = check_hub(hub, train.output_dir, train.report_to)
    teacher = load_teacher(source)
    embedding_dim = None if student.lora else student.unet_time_cond_proj_dim
    process, prediction_type = DiscreteVP.from_scheduler(teacher.scheduler), teacher.scheduler.config.prediction_type
    objective = LCMObjective(method, process, prediction_type, embedding_dim)
    scheduler = lcm_scheduler(teacher, method.num_ddim_timesteps, method.timestep_scaling_factor)

    def make_pipeline(unet):
        return lcm_pipeline(teacher, unet, scheduler)

    guidance_scale = 1.0 if student.lora else validation.validation_guidance_scale
    grid = sample_grid(validation, make_pipeline, teacher, guidance_scale, data.resolution)
    nets = make_networks(teacher.unet, student)
    settings = [source, student, data, generation]
    trainer = Trainer(train, nets, objective, optim, settings, callbacks=[grid])
    rank, ranks, device = trainer.accelerator.process_index, trainer.accelerator.num_processes, trainer.device
    trainer.fit(training_batches(data, generation, teacher, train.seed, rank, ranks, device))
    if trainer.accelerator.is_main_process:
        bounds = method.w_min, method.w_max
        record = lcm_record(
            source.pretrained_teacher_model,
            "distilled" if student.lora else "embedded",
            *bounds,
            guidance_scale,
            scheduler,
        )
        folder = Path(train.output_dir) / ("lora" if student.lora else "pipeline")
        name, data_name = repo_id or str(folder), source_name(data) or generation.prompts_file
        provenance = describe_run(configs, teacher, source.pretrained_teacher_model, data_name, name)
        with trainer.export_weights() as unet:
            if student.lora:
                save_lora(unet, folder, record, provenance)
            else:
                save_pipeline(make_pipeline(unet), folder, student.save_fp16, record, provenance)
        if repo_id:
            print(push_folder(folder, repo_id, hub))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run(main)
