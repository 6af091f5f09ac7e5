"""Reward fine-tuning of a few numbers, alone or in each of two processes: `rollout_worker.py FOLDER`."""

import os
import sys
from pathlib import Path

import torch
from diffusers import LCMScheduler
from processes import together
from safetensors.torch import save_file
from torch import nn
from toys import WIDTH, toy_trainer

from cm_diffusers.data.rollouts import RolloutConfig, Rollouts, Task
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.objectives.rlcm import RLCMConfig, RLCMObjective
from cm_diffusers.policy.policy import Policy
from cm_diffusers.types import Networks


PROMPTS, STEPS = 3, 3
GOALS = torch.eye(PROMPTS, WIDTH)
SMALL = {"samples_per_rollout": 8, "train_batch_size": 4, "sample_batch_size": 4, "buffer_size": 6, "min_count": 3}


class Network(nn.Module):
    """Predicts x0 from a sample and its prompt's number."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(WIDTH + PROMPTS, 16), nn.Tanh(), nn.Linear(16, WIDTH))

    def forward(self, x, t, prompt, return_dict=False):
        return (self.layers(torch.cat([x, prompt], dim=1)),)


def conditions(numbers):
    return {"prompt": torch.eye(PROMPTS, device=numbers.device)[numbers]}, {}


def score(latents, numbers):
    return -(latents - GOALS[numbers]).square().sum(1)


def task(score=score) -> Task:
    return Task((WIDTH,), PROMPTS, conditions, score)


def run(folder: Path, rollouts: dict | None = None, method: dict | None = None, task: Task | None = None, **config):
    """A trainer that has trained, and its source."""
    method = RLCMConfig(**{"clip_range": 0.2} | (method or {}))
    final_std = method.final_std if method.final_step == "stochastic" else 0.0
    policy = Policy(LCMScheduler(prediction_type="sample"), STEPS, final_std=final_std)
    objective = RLCMObjective(method, policy, score)
    nets = Networks(Network(), teacher=Network().requires_grad_(False))
    settings = {
        "gradient_accumulation_steps": objective.num_transitions,
        "checkpointing_steps": 3,
        "max_train_steps": 6,
    }
    trainer = toy_trainer(folder, nets, objective, OptimConfig(learning_rate=3e-3), **settings | config)
    source = Rollouts(RolloutConfig(**SMALL | (rollouts or {})), trainer, task or globals()["task"]())
    trainer.fit(source)
    return trainer, source


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    first, source = run(folder / "first", {"inner_epochs": 2}, max_train_steps=2)
    found = {f"first/{name}": part for name, part in source.rollout._asdict().items()}
    found |= {f"statistics/{name}": part for name, part in source.statistics["reward"].state().items()}
    whole, source = run(folder / "whole", {"inner_epochs": 2})
    resumed, again = run(
        folder / "again", {"inner_epochs": 2}, resume_from_checkpoint=str(folder / "whole" / "checkpoint-3")
    )
    for name, trainer, data in (("whole", whole, source), ("again", resumed, again)):
        found |= {f"{name}/{key}": value.detach() for key, value in trainer.student.state_dict().items()}
        found[f"{name}/rewards"] = data.rollout.rewards
    save_file({key: value.clone() for key, value in found.items()}, folder / f"rank-{rank}.safetensors")


if __name__ == "__main__":
    together(2, main)
