"""Tune a few-step student, or a diffusion model, for a reward of its images, by policy gradients (RLCM, DDPO)."""

import cm_diffusers.engine.early

from cm_diffusers.data.rollouts import RolloutConfig, Rollouts
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.objectives.rlcm import RLCMConfig, RLCMObjective
from cm_diffusers.publishing.hub import HubConfig, check_hub
from cm_diffusers.rewards import load_rewards, require_differentiable
from cm_diffusers.tasks.callbacks import ValidationConfig
from cm_diffusers.tasks.publish_rewards import publish_run, result_name
from cm_diffusers.tasks.reward_reports import Guard, GuardConfig, reports, watched_task
from cm_diffusers.tasks.reward_runs import (
    ImageScore,
    RewardConfig,
    RewardModelConfig,
    load_tuned,
    tuned_networks,
)
from cm_diffusers.tasks.summary import announce
from cm_diffusers.tasks.text_to_image_checks import check_rlcm


CONFIGS = (
    RewardModelConfig, RewardConfig, RLCMConfig, RolloutConfig, GuardConfig, OptimConfig, TrainConfig, ValidationConfig, HubConfig,
)  # fmt: skip


def main() -> None:
    source, wanted, method, drawn, watched, optim, train, validation, hub = configs = parse_configs(CONFIGS, __doc__)
    seed_everything(train.seed)
    check_rlcm(source, method, drawn, watched, train, validation)
    repo_id = check_hub(hub, train.output_dir, train.report_to)
    reward, prompts = load_rewards(wanted.rewards, wanted.reward_weights), wanted.load_prompts()
    if method.final_step == "pathwise":
        require_differentiable(reward, "--final_step pathwise")
    tuned = load_tuned(source, method.final_std if method.final_step == "stochastic" else 0.0)
    score = ImageScore(tuned.pipe, prompts, reward)
    objective = RLCMObjective(method, tuned.policy, score)
    nets = tuned_networks(tuned.network, source, keeps_start=bool(method.kl_coef or drawn.kl_in_advantage))
    trainer = Trainer(train, nets, objective, optim, settings=[source, wanted, drawn, watched.looks_alone()])
    task, rewards = watched_task(tuned, score, watched, drawn.resolution, trainer.device)
    data = Rollouts(drawn, trainer, task)
    guard = Guard(watched, trainer, task, rewards, data.history)
    trainer.steering.append(guard)
    trainer.callbacks += reports(guard, tuned, validation, drawn.resolution)
    trainer.fit(announce(trainer, data, configs, result_name(source)))
    publish_run("rlcm", trainer, tuned, configs, drawn.resolution, "its own samples", repo_id)


if __name__ == "__main__":
    run(main)
