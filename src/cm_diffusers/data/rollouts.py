"""Samples of the model that trains, with their rewards: the data source of reward fine-tuning."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from cm_diffusers.data.reward_history import RewardHistory
from cm_diffusers.diffusion.process import doubled, home_of_float64, moved_to
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.errors import UserError
from cm_diffusers.policy.advantages import PromptStatistics, compared
from cm_diffusers.policy.policy import Conditions, Moves
from cm_diffusers.policy.transitions import kl_divergence, log_prob
from cm_diffusers.ranges import check_ranges


DRAWN, ORDER = 0, 1  # two families of independent random streams of one seed


@dataclass
class RolloutConfig:
    """How many samples are drawn, and how they are compared."""

    resolution: int | None = HfArg(default=None, help="Side of the images; the model's own if not given.")
    samples_per_rollout: int = HfArg(default=32, help="Samples that each process draws before it learns from them.")
    samples_per_prompt: int = HfArg(default=1, help="Samples of the same prompt in a roll-out.")
    sample_batch_size: int = HfArg(default=8, help="Samples drawn, decoded and scored at once.")
    train_batch_size: int = HfArg(default=4, help="Samples in a micro-batch, which has one transition of each.")
    inner_epochs: int = HfArg(default=1, help="How often a roll-out is learnt from.")
    baseline: Literal["per_prompt", "group", "batch"] = HfArg(
        default="per_prompt",
        help="Rewards are compared with the last ones of their prompt, those of their prompt in this roll-out, or all in it.",
    )
    buffer_size: int = HfArg(default=32, help="per_prompt: rewards remembered of each prompt.")
    min_count: int = HfArg(default=16, help="per_prompt: with fewer, a prompt is compared with the whole roll-out.")
    kl_in_advantage: float = HfArg(
        default=0.0, help="Weight of each sample's divergence from the model before training, compared as rewards are."
    )

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Task:
    """What is drawn, and what it is worth.

    Attributes:
        shape: Of a sample's latents.
        num_prompts: P.
        conditions: Numbers of prompts `(B,)` -> the network's arguments with them, and without any.
        score: (latents `(B, ...)`, numbers of prompts `(B,)`) -> rewards `(B,)`.
    """

    shape: tuple[int, ...]
    num_prompts: int
    conditions: Callable[[Tensor], tuple[Conditions, Conditions]]
    score: Callable[[Tensor, Tensor], Tensor]


class Rollout(NamedTuple):
    """Samples that were drawn together; every field has them first.

    Attributes:
        states: `(N, H + 1, ...)`: the noise, then what each step made of it.
        prompts, rewards, advantages, scales: `(N,)`; see `Moves`.
        log_probs: Of the transitions `(N, T)`; NaN where they are not needed.
    """

    states: Tensor
    prompts: Tensor
    rewards: Tensor
    advantages: Tensor
    scales: Tensor
    log_probs: Tensor


class Rollouts:
    """Draws with the student as it is, then gives what was drawn, one transition of some samples after the other.

    Roll-out e is a function of (seed, rank, e) and of the student's weights; rewards are compared across all processes.
    What a resumed run needs beside the weights is in `state`.

    Args:
        config: See `RolloutConfig`.
        trainer: Whose student it is; its objective is an `RLCMObjective`.
        task: See `Task`.

    Raises:
        ValueError: Numbers do not divide each other as they must.
    """

    def __init__(self, config: RolloutConfig, trainer: Trainer, task: Task) -> None:
        self.config, self.trainer, self.task, self.policy = config, trainer, task, trainer.objective.policy
        self.num_transitions = trainer.objective.num_transitions
        self.measures_kl = bool(config.kl_in_advantage or trainer.objective.config.kl_coef)
        self.chunks = config.samples_per_rollout // config.train_batch_size
        self.per_rollout = config.inner_epochs * self.chunks * self.num_transitions
        self.accumulation = trainer.config.gradient_accumulation_steps
        self._check()
        sizes = task.num_prompts, config.buffer_size, config.min_count
        self.statistics = {name: PromptStatistics(*sizes) for name in ("reward", "kl")}
        self.history = RewardHistory()
        self.rollout, self.number, self.place = None, -1, 0

    @property
    def is_on_policy(self) -> bool:
        """Whether one optimizer step is made of each roll-out."""
        return self.per_rollout == self.accumulation

    def __call__(self, start: int) -> Iterator[Moves]:
        for k in count(start):
            number, self.place = divmod(k, self.per_rollout)
            if number != self.number:
                self.rollout, self.number = self._draw(number), number
            yield self._moves()

    def _moves(self) -> Moves:
        """The transitions of the present place: all those of some samples follow each other."""
        chunk, index = divmod(self.place, self.num_transitions)
        epoch, chunk = divmod(chunk, self.chunks)
        order = self._generator(ORDER, self.number, epoch)
        size = self.config.train_batch_size
        rows = torch.randperm(self.config.samples_per_rollout, generator=order)[chunk * size :][:size]
        states, prompts, rewards, advantages, scales, log_probs = (part[moved_to(rows, part)] for part in self.rollout)
        cond, uncond = self.task.conditions(prompts)
        return Moves(
            None, cond, uncond, index=index, sample=states[:, index], action=states[:, index + 1], advantage=advantages,
            scale=scales, reward=rewards, prompt=prompts, log_prob=None if self.is_on_policy else log_probs[:, index],
            is_fresh=self.place < self.accumulation,
        )  # fmt: skip

    @torch.no_grad()
    def _draw(self, number: int) -> Rollout:
        config, trainer = self.config, self.trainer
        generator = self._generator(DRAWN, number)
        groups = config.samples_per_rollout // config.samples_per_prompt
        prompts = torch.randint(self.task.num_prompts, (groups,), generator=generator)
        prompts = prompts.repeat_interleave(config.samples_per_prompt).to(trainer.device)
        was_training = trainer.student.training
        trainer.student.eval()
        with trainer.accelerator.autocast():
            parts = prompts.split(config.sample_batch_size)
            quiet = not self.trainer.accelerator.is_local_main_process
            drawn = [self._sample(part, generator) for part in tqdm(parts, "Samples", leave=False, disable=quiet)]
        trainer.student.train(was_training)
        states, kl, rewards = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        advantages, scales = self._compared(prompts, rewards, kl)
        log_probs = doubled(torch.full((len(prompts), self.num_transitions), torch.nan, device=trainer.device))
        rollout = Rollout(states, prompts, rewards, advantages, scales, log_probs)
        if not self.is_on_policy:
            self._fill_log_probs(rollout)
        self._remember(number, rewards, kl)
        return rollout

    def _sample(self, prompts: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """States `(B, H + 1, ...)`, divergences from the model before training `(B,)`, and rewards `(B,)`."""
        nets, (cond, uncond) = self.trainer.nets, self.task.conditions(prompts)
        noise = torch.randn(self.policy.num_steps + 1, len(prompts), *self.task.shape, generator=generator)
        noise, kl = noise.to(prompts.device), doubled(torch.zeros(len(prompts), device=prompts.device))
        states = [self.policy.start(noise[0])]
        for index, sample, taken, action in self.policy.walk(nets.student, noise, cond, uncond):
            states.append(action)
            if self.measures_kl and taken.std > 0:
                before = self.policy.transition(nets.teacher, index, sample, cond, uncond)
                kl += kl_divergence(taken, before, self.trainer.objective.config.logprob_reduction)
        return torch.stack(states, dim=1), kl, self.task.score(states[-1], prompts).float()

    def _compared(self, prompts: Tensor, rewards: Tensor, kl: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and scales of this process's samples, compared with those of all."""
        accelerator, own = self.trainer.accelerator, len(prompts)
        mine = slice(accelerator.process_index * own, (accelerator.process_index + 1) * own)

        def standing(name: str, values: Tensor) -> tuple[Tensor, Tensor]:
            values, numbers = (accelerator.gather(part).cpu() for part in (values, prompts))
            found = compared(values, numbers, self.config.baseline, self.statistics[name])
            return found.of(values)[mine].to(prompts.device), found.scale[mine].float().to(prompts.device)

        advantages, scales = standing("reward", rewards)
        if self.config.kl_in_advantage:
            advantages = advantages - self.config.kl_in_advantage * standing("kl", kl)[0]
        return advantages, scales

    def _fill_log_probs(self, rollout: Rollout) -> None:
        """As training computes them: in its precision and its micro-batches' size, or rounding would look like learning."""
        trainer, reduction = self.trainer, self.trainer.objective.config.logprob_reduction
        for rows in torch.arange(len(rollout.prompts), device=trainer.device).split(self.config.train_batch_size):
            cond, uncond = self.task.conditions(rollout.prompts[rows])
            for index in range(self.num_transitions):
                states = rollout.states[rows, index]
                with trainer.accelerator.autocast():
                    taken = self.policy.transition(trainer.nets.student, index, states, cond, uncond)
                if taken.std > 0:
                    found = log_prob(taken, rollout.states[rows, index + 1], reduction)
                    rollout.log_probs[rows.to(found.device), index] = found

    def _remember(self, number: int, rewards: Tensor, kl: Tensor) -> None:
        """A row of the history. A pass of training counts three times, with its gradient; one of the model before, once."""
        rewards, kl = (self.trainer.accelerator.gather(part).cpu().double() for part in (rewards, kl))
        steps, epochs, config = self.policy.num_steps, self.config.inner_epochs, self.trainer.objective.config
        again = 0 if self.is_on_policy else self.num_transitions
        noisy = steps if self.policy.ends_random else steps - 1  # of which there are divergences
        before = noisy * (self.measures_kl + epochs * bool(config.kl_coef))
        each = steps + again + 3 * epochs * self.num_transitions + before
        passes = len(rewards) * self.policy.passes * each
        spread = rewards.mean().item(), rewards.std(correction=0).item()
        self.history.add(number, passes, spread, kl.mean().item())

    def state(self) -> dict[str, Tensor]:
        """Statistics, history, and of all processes what was drawn but not yet learnt from; to be called by all."""
        tensors = self.history.state()
        for name, statistics in self.statistics.items():
            tensors |= {f"{name}.{key}": value for key, value in statistics.state().items()}
        if self.rollout is not None and self.place + 1 < self.per_rollout:
            gathered = {name: self.trainer.accelerator.gather(part) for name, part in self.rollout._asdict().items()}
            tensors |= gathered | {"number": torch.tensor(self.number)}
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.history.load_state(tensors)
        for name, statistics in self.statistics.items():
            statistics.load_state({key: tensors[f"{name}.{key}"] for key in statistics.state()})
        if "number" in tensors:
            own, rank = self.config.samples_per_rollout, self.trainer.accelerator.process_index
            parts = {name: tensors[name][rank * own : (rank + 1) * own] for name in Rollout._fields}
            moved = {name: part.to(self.trainer.device) for name, part in parts.items() if name != "log_probs"}
            home = home_of_float64(self.trainer.device)
            self.rollout = Rollout(**moved, log_probs=parts["log_probs"].to(home))
            self.number = int(tensors["number"])

    def _generator(self, *entropy: int) -> Generator:
        config, rank = self.trainer.config, self.trainer.accelerator.process_index
        seed = np.random.SeedSequence((config.seed, rank, *entropy)).generate_state(1, np.uint64)[0]
        return Generator().manual_seed(int(seed) >> 1)

    def _check(self) -> None:
        config, transitions = self.config, self.num_transitions
        for part in ("samples_per_prompt", "train_batch_size"):
            if config.samples_per_rollout % getattr(config, part):
                raise UserError(
                    f"--samples_per_rollout {config.samples_per_rollout} must be a multiple of --{part} "
                    f"{getattr(config, part)}."
                )
        if self.accumulation % transitions:
            raise UserError(
                f"--gradient_accumulation_steps {self.accumulation} must be a multiple of {transitions}, the transitions of a "
                "sample that are learnt from: each is a micro-batch."
            )
        if self.per_rollout % self.accumulation:
            raise UserError(
                f"--gradient_accumulation_steps {self.accumulation} must divide the {self.per_rollout} micro-batches of a "
                "roll-out: --samples_per_rollout / --train_batch_size x transitions x --inner_epochs."
            )
