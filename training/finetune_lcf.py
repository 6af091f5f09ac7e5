"""Fine-tune a latent consistency model on own captioned images, without a teacher (LCF)."""

import cm_diffusers.engine.early
from dataclasses import replace
from functools import partial

from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.sources import DataConfig, source_name
from cm_diffusers.data.streaming import streaming_batches
from cm_diffusers.data.text_image import text_image_batches
from cm_diffusers.engine.cli import parse_configs, refuse_changed, run
from cm_diffusers.engine.optimizers import CooledOptimConfig
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.sharding import comes_from_the_first
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.models.adapters import target_names
from cm_diffusers.models.families.base import network_of
from cm_diffusers.models.teachers import load_network, release_encoders
from cm_diffusers.objectives.lcf import LCFConfig, LCFObjective
from cm_diffusers.publishing.hub import HubConfig, check_hub
from cm_diffusers.publishing.pipelines import lcm_pipeline
from cm_diffusers.publishing.provenance import describe_run
from cm_diffusers.tasks.callbacks import ValidationConfig, sample_grid
from cm_diffusers.tasks.finished_students import FinetuneConfig, finetune_networks, load_student, with_guidance_of
from cm_diffusers.tasks.publish import publish, save_student
from cm_diffusers.tasks.summary import announce
from cm_diffusers.tasks.teachings import teaching_of_student
from cm_diffusers.tasks.text_to_image import needs_encoders
from cm_diffusers.tasks.text_to_image_checks import check_adapters


CONFIGS = (FinetuneConfig, DataConfig, LCFConfig, CooledOptimConfig, TrainConfig, ValidationConfig, HubConfig)
OF_TEACHERS = "validation_guidance_scale validation_teacher_steps"


def main() -> None:
    source, data, method, optim, train, validation, hub = parse_configs(CONFIGS, __doc__)
    seed_everything(train.seed)
    check_adapters(source)
    refuse_changed(validation, OF_TEACHERS, "without a teacher")
    repo_id = check_hub(hub, train.output_dir, train.report_to)
    before, record = load_student(source, late=True)
    method, record = with_guidance_of(replace(record, resolution=data.resolution), method, source)
    scheduler, batches = before.scheduler, None
    if source.lora:
        target_names(network_of(before), source.lora_target_modules)
    objective = LCFObjective(method, teaching_of_student(before))

    def make_pipeline(network):
        return lcm_pipeline(before, network, scheduler)

    def after_the_data(*place):
        nonlocal batches
        load = streaming_batches if data.streaming else text_image_batches
        batches = load(data, Encoders.from_pipeline(before), train.seed, *place)
        if not needs_encoders(source, data, validation):
            release_encoders(before)
        if not comes_from_the_first():
            load_network(before, source.place)
        seed_everything(train.seed)  # adapters start alike, whatever the cache held
        return finetune_networks(network_of(before), source)

    scale = record.recommended_guidance_scale
    samples = sample_grid(validation, make_pipeline, guidance_scale=scale, resolution=data.resolution)
    trainer = Trainer(train, after_the_data, objective, optim, settings=[source, data], callbacks=[samples])
    configs, result = (source, data, method, optim, train, validation, hub), "lora" if source.lora else "pipeline"
    trainer.fit(announce(trainer, batches, configs, result))  # with the guidance range it trains on
    base, unused = source.pretrained_student_model, OF_TEACHERS.split()
    describe = partial(describe_run, configs, before, base, source_name(data), left_out=unused)
    save = partial(save_student, source, make_pipeline, record)
    if address := publish(trainer, result, configs, describe, save, repo_id):
        print(address)


if __name__ == "__main__":
    run(main)
