"""What reward fine-tuning leaves to look at, and what stops it: reward curves, rewards that are not trained for, diversity."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from cm_diffusers.data.reward_history import COLUMNS, RewardHistory
from cm_diffusers.data.rollouts import Task
from cm_diffusers.diffusion.process import home_of_float64
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation.report import replace_file, write_plot
from cm_diffusers.ranges import check_ranges
from cm_diffusers.rewards import Reward, load_reward
from cm_diffusers.tasks.callbacks import ValidationConfig, has_ended, sample_grid
from cm_diffusers.tasks.reward_runs import ImageScore, PromptConditions, Tuned
from cm_diffusers.types import Loss


if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        default=None,
        help="Stop when samples diverge by more from the model before training; with --kl_in_advantage or --kl_coef.",
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.stop_held_out is not None and not (self.held_out_rewards and self.guard_prompts):
            raise UserError(
                "--stop_held_out watches --held_out_rewards on --guard_prompts: give them, or leave it out."
            )

    def looks_alone(self) -> "GuardConfig":
        """What a resumed run must share: a stopped one may go on with other thresholds."""
        return replace(self, stop_held_out=None, stop_diversity=None, stop_kl=None)


class Guard:
    """A callback that looks at always the same prompts and noise, and stops the training when it should.

    Args:
        config: See `GuardConfig`.
        trainer: Whose student it is; its objective has a policy.
        task: What is drawn, and its images; the score is an `ImageScore`.
        rewards: What is watched, the trained one first.
        history: Gets a row of each look, the first before training: step, diversity, then of each reward mean and deviation.
            Diversity is the mean distance between two images of one prompt.
    """

    def __init__(
        self, config: GuardConfig, trainer: Trainer, task: Task, rewards: dict[str, Reward], history: RewardHistory
    ) -> None:
        self.config, self.trainer, self.task, self.rewards, self.history = config, trainer, task, rewards, history
        if config.guard_prompts and trainer.step == 0:
            self._look()

    @property
    def looks(self) -> list[dict[str, float]]:
        """To show: step, diversity as a share of that before training, mean rewards by name."""
        rows = self.history.looks
        return [
            {"step": step, "diversity": diversity / rows[0][1]} | dict(zip(self.rewards, numbers[::2], strict=True))
            for step, diversity, *numbers in rows
        ]

    def __call__(self, trainer: Trainer, loss: Loss) -> None:
        kl = self.history.rows[-1][COLUMNS.index("kl")] if self.history.rows else 0.0
        if self.config.stop_kl is not None and kl > self.config.stop_kl:
            trainer.stopping = f"samples diverge by {kl:.2e} from the model before training."
        if self.config.guard_prompts and trainer.step % self.config.guard_steps == 0:
            self._look()
            seen = self.looks[-1]
            trainer.accelerator.log({f"guard/{name}": value for name, value in seen.items()}, step=trainer.step)
            trainer.stopping = trainer.stopping or self._reason()

    def _reason(self) -> str:
        """To stop; "" if there is none."""
        config, first, last = self.config, self.history.looks[0], self.history.looks[-1]
        if config.stop_diversity is not None and last[1] < config.stop_diversity * first[1]:
            return f"images of one prompt differ by {last[1] / first[1]:.2f} of what they did before."
        for place, name in enumerate(self.rewards):
            mean, deviation = first[2 + 2 * place], first[3 + 2 * place]
            fell = mean - last[2 + 2 * place]
            if place and config.stop_held_out is not None and fell > config.stop_held_out * deviation:
                return f"{name}, which is not trained for, fell from {mean:.4g} to {mean - fell:.4g}."
        return ""

    def _look(self) -> None:
        quiet = not self.trainer.accelerator.is_local_main_process
        numbers = tqdm(range(self._count), "Guarded prompts", leave=False, disable=quiet)
        with self.trainer.export_weights() as student, torch.no_grad():
            apart, found = zip(*(self._prompt(student, n) for n in numbers), strict=True)
        row = [float(self.trainer.step), sum(apart) / len(apart)]
        for values in torch.cat(found, dim=1):
            row += [values.mean().item(), values.std().item()]
        home = home_of_float64(self.trainer.device)
        same = torch.tensor(row, dtype=torch.float64, device=home)  # or processes might disagree on stopping
        self.history.looks.append(tuple(self.trainer.accelerator.reduce(same, reduction="mean").tolist()))

    @property
    def _count(self) -> int:
        return min(self.config.guard_prompts, self.task.num_prompts)

    def _prompt(self, student: torch.nn.Module, number: int) -> tuple[float, Tensor]:
        """Distance between images of one prompt, and rewards `(R, guard_samples)`, float64."""
        trainer, policy, count = self.trainer, self.trainer.objective.policy, self.config.guard_samples
        generator = torch.Generator().manual_seed(trainer.config.seed + number)
        noise = torch.randn(policy.num_steps + 1, count, *self.task.shape, generator=generator).to(trainer.device)
        asked = torch.full((count,), number, device=trainer.device)
        with trainer.accelerator.autocast():
            *_, (_, _, _, end) = policy.walk(student, noise, *self.task.conditions(asked))
        images, worth = self.task.score.images(end), self.task.score.worth
        rewards = [worth(images, asked, reward).cpu().double() for reward in self.rewards.values()]
        return torch.pdist(images.flatten(1).float()).mean().item(), torch.stack(rewards)


def watched_task(
    tuned: Tuned, score: ImageScore, config: GuardConfig, resolution: int | None, device: torch.device
) -> tuple[Task, dict[str, Reward]]:
    """What is drawn for the score's prompts, its VAE moved to the device; and the rewards to watch, the trained one first.

    Raises:
        ValueError: A held-out reward is unknown or out of reach, or a reward cannot judge a prompt.
    """
    tuned.pipe.vae.to(device)
    held_out = {name: load_reward(name).to(device) for name in config.held_out_rewards}
    rewards, texts = {"reward": score.reward} | held_out, [text for text, _ in score.prompts]
    for reward in rewards.values():
        reward.check(texts)
    conditions = PromptConditions.of(tuned, texts, resolution, device)
    return Task(tuned.shape(resolution), len(score.prompts), conditions, score), rewards


def reports(
    guard: Guard, tuned: Tuned, validation: ValidationConfig, resolution: int | None
) -> list[Callable[[Trainer, Loss], None]]:
    """The callbacks that show a run: curves of what its guard saw, and sample grids."""
    side = tuned.side(resolution)
    grids = sample_grid(validation, tuned.pipeline, guidance_scale=tuned.guidance_scale, resolution=side)
    return [reward_curves(guard.history, guard), grids]


def reward_curves(history: RewardHistory, guard: Guard) -> Callable[[Trainer, Loss], None]:
    """A callback that keeps `rewards.json` and `rewards.png` in the run's folder as new as its checkpoints and looks."""

    def callback(trainer: Trainer, loss: Loss) -> None:
        config, looks = trainer.config, guard.looks
        looked = bool(looks) and looks[-1]["step"] == trainer.step
        is_due = looked or has_ended(trainer) or trainer.step % config.checkpointing_steps == 0
        if not (trainer.accelerator.is_main_process and is_due):
            return
        rollouts = [dict(zip(COLUMNS, row, strict=True)) for row in history.rows]
        content = json.dumps({"rollouts": rollouts, "looks": looks}, indent=1) + "\n"
        replace_file(trainer.output_dir / f"{CURVES}.json", lambda path: path.write_text(content, "utf-8"))
        write_plot(trainer.output_dir / f"{CURVES}.png", plot(rollouts, looks), 120)

    return callback


def plot(rollouts: list[dict[str, float]], looks: list[dict[str, float]]) -> "Figure":
    """Reward over passes of the network and over hours, and what the guard saw over steps."""
    from matplotlib.figure import Figure

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
