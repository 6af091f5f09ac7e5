"""Reward fine-tuning of consistency models by policy gradients: RLCM (2404.03673), DDPO (2305.13301)."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.process import as_like
from cm_diffusers.errors import UserError
from cm_diffusers.policy.policy import Moves, Policy
from cm_diffusers.policy.transitions import Transition, kl_divergence, log_prob
from cm_diffusers.types import Loss, Networks, Progress


logger = logging.getLogger(__name__)
Score = Callable[[Tensor, Tensor], Tensor]  # (latents (B, ...), prompt numbers (B,)) -> rewards (B,), with gradient
LOGS = "log_ratio", "clip_fraction", "kl"  # beside the reward; 0 where a step has no transition


@dataclass
class RLCMConfig:
    """How the policy learns from its own samples."""

    final_step: Literal["drop", "stochastic", "pathwise"] = HfArg(
        default="drop",
        help="The reward passes through the last step, which adds no noise. drop: as RLCM, its gradient is left out. "
        "stochastic: the last step gets noise of --final_std too. pathwise: its gradient is that of the reward itself, "
        "which must be differentiable.",
    )
    final_std: float = HfArg(default=0.1, help="With --final_step stochastic: its noise, in units of the latents.")
    loss: Literal["ppo", "reinforce"] = HfArg(default="ppo", help="ppo clips the ratio of probabilities.")
    clip_range: float = HfArg(
        default=1e-4, help="ppo: how far the ratio may go from 1; 0.1 suits --logprob_reduction sum."
    )
    adv_clip: float = HfArg(default=10.0, help="Largest advantage, in deviations.")
    logprob_reduction: Literal["mean", "sum"] = HfArg(
        default="mean", help="Over the numbers of a latent: mean, as DDPO and RLCM have it, or sum, the true density."
    )
    kl_coef: float = HfArg(default=0.0, help="Weight of the divergence from the model before training, in the loss.")


class RLCMObjective:
    """max E[sum_i min(rho_i A, clip(rho_i) A)], rho_i the ratio of a transition's probability to that when it was drawn.

    With `pathwise` the gradient has both parts of the true one, E[sum_i grad log p_i A] + E[dr/dx grad f], the second
    divided by the deviation of rewards, as A is. Without it, what the last step does to the reward is not seen: for
    parameters that all steps share, the sign can be wrong. Each micro-batch is one transition of some samples.

    Args:
        config: See `RLCMConfig`.
        policy: What drew the samples; with the noise of `final_std` in its last step for `stochastic`.
        score: For `pathwise`: the reward of the final latents.

    Raises:
        ValueError: Nothing is left to learn from, or a setting is out of range.
    """

    def __init__(self, config: RLCMConfig, policy: Policy, score: Score | None = None) -> None:
        if config.final_step == "pathwise" and policy.ends_random:
            raise UserError(
                "--final_step pathwise is for a last step without noise, but this one has some; take drop."
            )
        if config.final_step == "drop" and policy.num_steps == 1 and not policy.ends_random:
            raise UserError(
                "--final_step drop leaves out the last step, and there is no other: nothing would be learnt; take "
                "stochastic or pathwise, or more --num_inference_steps."
            )
        for name in ("clip_range", "adv_clip", "final_std"):
            if getattr(config, name) <= 0:
                raise UserError(f"--{name} must be positive, but it is {getattr(config, name)}.")
        self.config, self.policy, self.score, self.has_warned = config, policy, score, False
        self.first_step: int | None = None
        self.players = {"student": self}

    @property
    def num_transitions(self) -> int:
        """How many of a sample's transitions are learnt from, the first ones."""
        return self.policy.num_steps - (self.config.final_step == "drop" and not self.policy.ends_random)

    def __call__(self, nets: Networks, batch: Moves, progress: Progress) -> Loss:
        config, where = self.config, (batch.index, batch.sample, batch.cond, batch.uncond)
        taken = self.policy.transition(nets.student, *where)
        logs = {"reward": batch.reward.mean()}
        if taken.std == 0:
            value = -(self.score(taken.mean, batch.prompt) / batch.scale).mean()
            value = value / (batch.sample[0].numel() if config.logprob_reduction == "mean" else 1)
            return Loss(value, logs | dict.fromkeys(LOGS, torch.zeros_like(logs["reward"])))
        log_ratio, kl = self._log_ratio(taken, batch), torch.zeros_like(logs["reward"])
        if config.kl_coef:
            with torch.no_grad():
                before = self.policy.transition(nets.teacher, *where)
            kl = as_like(kl_divergence(taken, before, config.logprob_reduction).mean(), kl)
        off = (log_ratio.detach().exp() - 1).abs()
        self._check_rounding(off, batch, progress)
        value = self._policy_loss(log_ratio.exp(), batch)
        clipped = (off > config.clip_range).float().mean()
        found = (log_ratio.detach().abs().mean(), clipped, kl.detach())
        return Loss(value + config.kl_coef * kl, logs | dict(zip(LOGS, found, strict=True)))

    def _log_ratio(self, taken: Transition, batch: Moves) -> Tensor:
        """Of the action's probability now to that when it was drawn `(B,)`."""
        now = log_prob(taken, batch.action, self.config.logprob_reduction)
        return as_like(now - (now.detach() if batch.log_prob is None else batch.log_prob), batch.advantage)

    def _policy_loss(self, ratio: Tensor, batch: Moves) -> Tensor:
        """PPO's clipped objective (1707.06347, Eq. 7), or the importance-weighted one."""
        config, advantage = self.config, batch.advantage.clamp(-self.config.adv_clip, self.config.adv_clip)
        if config.loss == "reinforce":
            return -(ratio * advantage).mean()
        clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
        return -torch.minimum(ratio * advantage, clipped * advantage).mean()

    def _check_rounding(self, off: Tensor, batch: Moves, progress: Progress) -> None:
        """Warn where ratios are off by `off` `(B,)` before anything was learnt; in the first step alone, for it waits for the device."""
        self.first_step = progress.step if self.first_step is None else self.first_step
        checks = self.config.loss != "reinforce" and batch.is_fresh and progress.step == self.first_step
        if checks and not self.has_warned and (off > self.config.clip_range).any():
            self.has_warned = True
            logger.warning(
                "The clip acts on %.0f %% of the samples before anything was learnt from them: rounding moves the ratio by up "
                "to %.1e, more than --clip_range %g. Take --mixed_precision no, a larger range, or --loss reinforce.",
                100 * (off > self.config.clip_range).float().mean().item(), off.max().item(), self.config.clip_range,
            )  # fmt: skip
