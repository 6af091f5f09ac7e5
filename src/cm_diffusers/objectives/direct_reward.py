"""Differentiable rewards followed back into the network: RG-LCD (2403.11027), DRaFT (2309.17400), whole trajectories."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.process import as_like, home_of_float64
from cm_diffusers.errors import UserError
from cm_diffusers.policy.policy import Policy
from cm_diffusers.policy.transitions import kl_divergence
from cm_diffusers.types import Batch, Loss, Networks, Progress


Score = Callable[[Tensor, list[str], list[dict[str, Any]] | None], Tensor]  # (latents, texts, metadata) -> (B,)
TEACHER_PASSES, TARGET_PASSES = 2, 1  # of a sample of the joined loss, with DDIM; the student's is trained


@dataclass
class DirectRewardConfig:
    """What the reward's gradient goes through."""

    through: Literal["single_step", "last_step", "trajectory"] = HfArg(
        default="last_step",
        help="single_step: the jump from noised images of the data, beside the distillation loss (RG-LCD). last_step: the last "
        "step of sampling (DRaFT-1). trajectory: all steps; --gradient_checkpointing keeps its memory small.",
    )
    pretrained_teacher_model: str | None = HfArg(
        default=None,
        help="single_step: the diffusion model of the distillation; the student's base model if not given.",
    )
    reward_weight: float = HfArg(default=1.0, help="single_step: weight of the reward beside the distillation loss.")
    kl_coef: float = HfArg(
        default=0.0, help="trajectory: weight of the divergence of its steps from the model before training."
    )


class Distillation(Protocol):
    """A loss between a student's jump and a target's, as `LCMObjective`."""

    def pair(self, nets: Networks, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The student's jump, with a gradient, the target's, each `(B, ...)`, and what else there is."""
        ...

    def distance(self, online: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        ...


class DirectRewardObjective:
    """max E[r(x0, c)] by the gradient dr/dx0 dx0/dtheta, for x0 of a jump or of sampling.

    Args:
        config: See `DirectRewardConfig`.
        policy: How the model is sampled; batches without data are drawn by it.
        score: The reward of latents, with a gradient.
        shape: Of a sample's latents.
        distillation: For `single_step`: the loss that it is joined with, and whose jump it scores.

    Raises:
        ValueError: A setting is out of range, or the distillation is missing.
    """

    def __init__(
        self,
        config: DirectRewardConfig,
        policy: Policy,
        score: Score,
        shape: tuple[int, ...],
        distillation: Distillation | None = None,
    ) -> None:
        if (config.through == "single_step") != (distillation is not None):
            raise UserError("The distillation loss and --through single_step belong together: give both, or none.")
        if config.reward_weight <= 0 or config.kl_coef < 0:
            raise UserError("--reward_weight must be positive, and --kl_coef not negative.")
        self.config, self.policy, self.score, self.shape = config, policy, score, shape
        self.distillation = distillation
        self.players = {"student": self}

    @property
    def passes(self) -> int:
        """Of the network, for a sample; those with a gradient count three times."""
        if self.distillation is not None:
            return TEACHER_PASSES + TARGET_PASSES + 3
        steps, learnt = self.policy.num_steps, self.policy.num_steps - self._first
        return self.policy.passes * (steps - learnt + (3 + bool(self.config.kl_coef)) * learnt)

    @property
    def _first(self) -> int:
        """Step of sampling from which on gradients are kept."""
        return 0 if self.config.through == "trajectory" else self.policy.num_steps - 1

    def __call__(self, nets: Networks, batch: Batch, progress: Progress) -> Loss:
        return self._sampled(nets, batch) if self.distillation is None else self._joined(nets, batch)

    def _joined(self, nets: Networks, batch: Batch) -> Loss:
        """L_LCD - beta r(f(x_t, t, w, c), c) (2403.11027, Sec. 4.1)."""
        online, target, _ = self.distillation.pair(nets, batch)
        distance = self.distillation.distance(online, target)
        rewards = self.score(online, batch.texts, batch.metadata)
        value = distance - self.config.reward_weight * rewards.mean()
        return Loss(value, self._logs(rewards, distillation=distance))

    def _sampled(self, nets: Networks, batch: Batch) -> Loss:
        """-r of samples; of a trajectory also the divergence of its steps (2503.06171), in closed form."""
        size, device = batch.size, next(iter(batch.cond.values())).device
        noise = torch.randn(self.policy.num_steps + 1, size, *self.shape, device=device)
        steps = list(self.policy.walk(nets.student, noise, batch.cond, batch.uncond, self._first))
        kl = torch.zeros(size, dtype=torch.float64, device=home_of_float64(device))
        for index, sample, taken, _ in steps if self.config.kl_coef else ():
            before = self.policy.transition(nets.teacher, index, sample, batch.cond, batch.uncond)
            kl = kl + (kl_divergence(taken, before, "mean") if taken.std > 0 else 0)
        rewards = self.score(steps[-1][-1], batch.texts, batch.metadata)
        apart = as_like(kl.mean(), rewards)
        return Loss(self.config.kl_coef * apart - rewards.mean(), self._logs(rewards, kl=apart))

    def _logs(self, rewards: Tensor, **more: Tensor) -> dict[str, Tensor]:
        found = {"reward": rewards.mean(), "reward_std": rewards.std(correction=0)} | more
        return {name: value.detach() for name, value in found.items()}
