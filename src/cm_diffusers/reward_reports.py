"""What reward fine-tuning leaves to look at, and what stops it: reward curves, rewards that are not trained for, diversity."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers.hf_argparser import HfArg

from cm_diffusers.data.rollouts import HISTORY, Rollouts
from cm_diffusers.evaluation.report import replace_file
from cm_diffusers.rewards import Reward
from cm_diffusers.trainer import Trainer
from cm_diffusers.types import Loss


logger = logging.getLogger(__name__)
CURVES = "rewards"


@dataclass
class GuardConfig:
    """What is watched beside the reward: over-optimised, it rises while the images get worse."""

    guard_steps: int = HfArg(default=50, help="Optimizer steps between looks; the first is before training.")
    guard_prompts: int = HfArg(default=8, help="So many prompts are looked at, the first ones; 0, none.")
    guard_samples: int = HfArg(default=8, help="Images of each, always from the same noise.")
    held_out_rewards: list[str] = HfArg(
        default_factory=list,
        help="Rewards that are not trained for, as for --rewards; a good sign if they do not fall.",
    )
    stop_held_out: float | None = HfArg(
        default=None, help="Stop when a held-out reward is so many deviations, of before training, below its start."
    )
    stop_diversity: float | None = HfArg(
        default=None, help="Stop when the images of a prompt differ by less than this share of what they did before."
    )
    stop_kl: float | None = HfArg(
        default=None, help="Stop when samples diverge by more from the model before training; with --kl_in_advantage."
    )

    def __post_init__(self) -> None:
        if self.guard_steps < 1 or self.guard_prompts < 0 or self.guard_samples < 2:
            raise ValueError("--guard_steps must be at least 1, --guard_prompts 0 and --guard_samples 2.")
        if self.stop_held_out is not None and not (self.held_out_rewards and self.guard_prompts):
            raise ValueError(
                "--stop_held_out watches --held_out_rewards on --guard_prompts: give them, or leave it out."
            )


@dataclass(frozen=True)
class Look:
    """What the guard saw.

    Attributes:
        rewards: Name -> rewards of all images, float64.
        diversity: Mean distance between two images of one prompt.
        images: Of the first sample of each prompt `(P, 3, H, W)`.
    """

    rewards: dict[str, Tensor]
    diversity: float
    images: Tensor


class Guard:
    """A callback that looks at always the same prompts and noise, and stops the training when it should.

    Args:
        config: See `GuardConfig`.
        data: What is trained on; its task's score has the images.
        rewards: What is watched, the trained one first.

    Attributes:
        looks: A row of numbers for each look.
    """

    def __init__(self, config: GuardConfig, data: Rollouts, rewards: dict[str, Reward]) -> None:
        self.config, self.data, self.rewards, self.looks = config, data, rewards, []
        self.start = self._look(data.trainer.nets.teacher) if config.guard_prompts else None

    def __call__(self, trainer: Trainer, loss: Loss) -> None:
        newest = self.data.history[-1] if self.data.history else None
        if self.config.stop_kl is not None and newest and newest[HISTORY.index("kl")] > self.config.stop_kl:
            trainer.stopping = f"samples diverge by {newest[HISTORY.index('kl')]:.2e} from the model before training."
        if self.start is None or trainer.step % self.config.guard_steps:
            return
        with trainer.export_weights() as student:
            look = self._look(student)
        row = {"step": trainer.step, "diversity": look.diversity / self.start.diversity}
        row |= {name: values.mean().item() for name, values in look.rewards.items()}
        self.looks.append(row)
        trainer.accelerator.log({f"guard/{name}": value for name, value in row.items()}, step=trainer.step)
        trainer.stopping = trainer.stopping or self._reason(look, row["diversity"])

    def _reason(self, look: Look, diversity: float) -> str:
        """To stop; "" if there is none."""
        config, (_, *held_out) = self.config, look.rewards
        if config.stop_diversity is not None and diversity < config.stop_diversity:
            return f"images of one prompt differ by {diversity:.2f} of what they did before."
        for name in held_out if config.stop_held_out is not None else ():
            before, after = self.start.rewards[name], look.rewards[name]
            if before.mean() - after.mean() > config.stop_held_out * before.std():
                return f"{name}, which is not trained for, fell from {before.mean():.4g} to {after.mean():.4g}."
        return ""

    @torch.no_grad()
    def _look(self, network: torch.nn.Module) -> Look:
        config, task, trainer = self.config, self.data.task, self.data.trainer
        count = min(config.guard_prompts, task.num_prompts)
        numbers = torch.arange(count).repeat_interleave(config.guard_samples)
        generator, policy = torch.Generator().manual_seed(trainer.config.seed), self.data.policy
        noise = torch.randn(policy.num_steps + 1, len(numbers), *task.shape, generator=generator)
        images, found = [], {name: [] for name in self.rewards}
        for rows in torch.arange(len(numbers)).split(self.data.config.sample_batch_size):
            asked = numbers[rows].to(trainer.device)
            with trainer.accelerator.autocast():
                *_, (_, _, _, end) = policy.walk(network, noise[:, rows].to(trainer.device), *task.conditions(asked))
            images.append(task.score.images(end))
            for name, reward in self.rewards.items():
                found[name].append(task.score.worth(images[-1], asked, reward).double().cpu())
        images = torch.cat(images).cpu().unflatten(0, (count, config.guard_samples))
        apart = torch.stack([torch.pdist(own.flatten(1).float()).mean() for own in images]).mean().item()
        return Look({name: torch.cat(parts) for name, parts in found.items()}, apart, images[:, 0])


def reward_curves(data: Rollouts, guard: Guard) -> Callable[[Trainer, Loss], None]:
    """A callback that keeps `rewards.json` and `rewards.png` in the run's folder up to date, and its grid of samples."""

    def callback(trainer: Trainer, loss: Loss) -> None:
        looked = bool(guard.looks) and guard.looks[-1]["step"] == trainer.step
        if not trainer.accelerator.is_main_process or not (looked or trainer.step == trainer.config.max_train_steps):
            return
        rollouts = [dict(zip(HISTORY, row, strict=True)) for row in data.history]
        content = json.dumps({"rollouts": rollouts, "looks": guard.looks}, indent=1) + "\n"
        replace_file(trainer.output_dir / f"{CURVES}.json", lambda path: path.write_text(content, "utf-8"))
        figure = plot(rollouts, guard.looks)
        replace_file(trainer.output_dir / f"{CURVES}.png", lambda path: figure.savefig(path, dpi=120, format="png"))

    return callback


def plot(rollouts: list[dict[str, float]], looks: list[dict[str, float]]) -> Figure:
    """Reward over passes of the network and over hours, and what the guard saw over steps."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    over_passes, over_time, watched = figure.subplots(1, 3)
    for axes, key, unit, label in (
        (over_passes, "passes", 1.0, "network evaluations"),
        (over_time, "seconds", 60.0, "minutes"),
    ):
        places, rewards = [row[key] / unit for row in rollouts], [row["reward"] for row in rollouts]
        axes.plot(places, rewards)
        axes.set(xlabel=label, ylabel="reward")
        axes.grid(alpha=0.3)
    for name in [name for name in (looks[0] if looks else {}) if name != "step"]:
        values = torch.tensor([look[name] for look in looks], dtype=torch.float64)
        span = (values - values[0]).abs().max().clamp(min=1e-12)
        watched.plot([look["step"] for look in looks], ((values - values[0]) / span).tolist(), marker=".", label=name)
    watched.set(xlabel="step", ylabel="change, of the largest seen")
    watched.grid(alpha=0.3)
    if looks:
        watched.legend(fontsize="small")
    return figure
