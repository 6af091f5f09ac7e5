"""Tune a few-step student, or a diffusion model, for a reward of its images, by policy gradients (RLCM, DDPO)."""

from cm_diffusers.callbacks import ValidationConfig, sample_grid
from cm_diffusers.checks import check_rlcm
from cm_diffusers.cli import parse_configs, run
from cm_diffusers.data.rollouts import RolloutConfig, Rollouts, Task
from cm_diffusers.hub import HubConfig, check_hub, push_folder
from cm_diffusers.objectives.rlcm import RLCMConfig, RLCMObjective
from cm_diffusers.optimizers import OptimConfig
from cm_diffusers.provenance import describe_run
from cm_diffusers.reward_reports import Guard, GuardConfig, reward_curves
from cm_diffusers.reward_runs import (
    ImageScore,
    PromptConditions,
    RewardConfig,
    RewardModelConfig,
    load_tuned,
    publish_tuned,
    tuned_networks,
)
from cm_diffusers.rewards import load_reward, load_rewards, require_differentiable
from cm_diffusers.rng import seed_everything
from cm_diffusers.trainer import TrainConfig, Trainer


CONFIGS = (
    RewardModelConfig, RewardConfig, RLCMConfig, RolloutConfig, GuardConfig, OptimConfig, TrainConfig, ValidationConfig, HubConfig,
)  # fmt: skip


def main() -> None:
    source, wanted, method, drawn, watched, optim, train, validation, hub = configs = parse_configs(CONFIGS, __doc__)
    seed_everything(train.seed)
    check_rlcm(source, method, drawn, watched, validation)
    repo_id = check_hub(hub, train.output_dir, train.report_to)
    reward, prompts = load_rewards(wanted.rewards, wanted.reward_weights), wanted.load_prompts()
    if method.final_step == "pathwise":
        require_differentiable(reward, "--final_step pathwise")
    tuned = load_tuned(source, method.final_std if method.final_step == "stochastic" else 0.0)
    score = ImageScore(tuned.pipe, prompts, reward)
    objective = RLCMObjective(method, tuned.policy, score)
    nets = tuned_networks(tuned.unet, source, bool(method.kl_coef or drawn.kl_in_advantage or watched.guard_prompts))
    trainer = Trainer(train, nets, objective, optim, settings=[source, wanted, drawn])
    device = trainer.device
    tuned.pipe.vae.to(device)
    watching = {name: load_reward(name).to(device) for name in watched.held_out_rewards}
    conditions = PromptConditions.of(tuned, [text for text, _ in prompts], source.resolution, device)
    data = Rollouts(drawn, trainer, Task(tuned.shape(source.resolution), len(prompts), conditions, score))
    guard = Guard(watched, data, {"reward": reward} | watching)
    grids = sample_grid(validation, tuned.pipeline, guidance_scale=tuned.guidance_scale, resolution=source.resolution)
    trainer.callbacks += [guard, reward_curves(data, guard), grids]
    trainer.fit(data)
    if trainer.accelerator.is_main_process:
        folder = trainer.output_dir / ("lora" if source.lora else "pipeline")
        made = "its own samples", repo_id or str(folder)
        provenance = describe_run(configs, tuned.pipe, source.pretrained_student_model, *made)
        with trainer.export_weights() as network:
            publish_tuned(tuned, network, source, folder, provenance)
        if repo_id:
            print(push_folder(folder, repo_id, hub))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run(main)
