"""Tune a few-step student, or a diffusion model, by the gradient of a differentiable reward (RG-LCD, DRaFT)."""

import cm_diffusers.engine.early

from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.prompt_batches import Remembered, prompt_batches
from cm_diffusers.data.sampler import Position
from cm_diffusers.data.sources import DataConfig, source_name
from cm_diffusers.data.streaming import streaming_batches
from cm_diffusers.data.text_image import text_image_batches
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.objectives.direct_reward import DirectRewardConfig, DirectRewardObjective
from cm_diffusers.publishing.hub import HubConfig, check_hub
from cm_diffusers.rewards import load_rewards, require_differentiable
from cm_diffusers.tasks.callbacks import ValidationConfig
from cm_diffusers.tasks.publish_rewards import publish_run, result_name
from cm_diffusers.tasks.reward_reports import Guard, GuardConfig, reports, watched_task
from cm_diffusers.tasks.reward_runs import (
    ImageScore,
    RewardConfig,
    RewardModelConfig,
    distillation_of,
    load_tuned,
    tuned_networks,
)
from cm_diffusers.tasks.summary import announce
from cm_diffusers.tasks.text_to_image_checks import check_direct_reward


CONFIGS = (
    RewardModelConfig, RewardConfig, DirectRewardConfig, DataConfig, GuardConfig, OptimConfig, TrainConfig, ValidationConfig, HubConfig,
)  # fmt: skip


def main() -> None:
    source, wanted, method, data, watched, optim, train, validation, hub = configs = parse_configs(CONFIGS, __doc__)
    seed_everything(train.seed)
    check_direct_reward(source, wanted, method, data, watched, train, validation)
    repo_id = check_hub(hub, train.output_dir, train.report_to)
    reward, prompts = load_rewards(wanted.rewards, wanted.reward_weights), wanted.load_prompts()
    require_differentiable(reward, "finetune_direct_reward.py")
    tuned, joined = load_tuned(source, 0.0), method.through == "single_step"
    score, shape = ImageScore(tuned.pipe, prompts, reward), tuned.shape(data.resolution)
    nets = tuned_networks(tuned.network, source, keeps_start=bool(method.kl_coef))
    distillation = distillation_of(tuned, nets, source, method.pretrained_teacher_model) if joined else None
    objective = DirectRewardObjective(method, tuned.policy, score.of_texts, shape, distillation)
    if train.gradient_checkpointing and tuned.pipe.vae._supports_gradient_checkpointing:
        tuned.pipe.vae.enable_gradient_checkpointing()
    trainer = Trainer(train, nets, objective, optim, settings=[source, wanted, data, watched.looks_alone()])
    rank, ranks, device = trainer.place
    task, rewards = watched_task(tuned, score, watched, data.resolution, device)
    if joined:
        load = streaming_batches if data.streaming else text_image_batches
        batches = load(data, Encoders.from_pipeline(tuned.pipe), train.seed, rank, ranks, device)
    else:
        batches = prompt_batches(prompts, task.conditions, data.train_batch_size, Position(train.seed, rank, ranks))
    remembered = Remembered(batches, objective.passes)
    guard = Guard(watched, trainer, task, rewards, remembered.history)
    images = data.train_batch_size * train.gradient_accumulation_steps * ranks
    trainer.steering += [remembered.remember(images), guard]
    trainer.callbacks += reports(guard, tuned, validation, data.resolution)
    announce(trainer, batches, configs, result_name(source))
    trainer.fit(remembered)
    trained_on = source_name(data) if joined else "its own samples"
    publish_run("direct_reward", trainer, tuned, configs, data.resolution, trained_on, repo_id)


if __name__ == "__main__":
    run(main)
