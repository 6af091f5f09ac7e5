"""Optimizers by name, and learning-rate schedules: diffusers' own plus warm-up-stable-decay."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.hf_argparser import HfArg

from cm_diffusers.errors import UserError
from cm_diffusers.extras import BITSANDBYTES, TIMM, missing
from cm_diffusers.ranges import check_ranges


Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "wsd"]


@dataclass
class OptimConfig:
    """How one player learns."""

    learning_rate: float = HfArg(default=1e-4, help="Peak learning rate.")
    optimizer: Literal["adamw", "adamw_8bit", "radam", "adamp"] = HfArg(
        default="adamw",
        help="adamw is fused; adamw_8bit needs the extra bnb, adamp the extra timm, and both wait for the device at every step.",
    )
    adam_beta1: float = HfArg(default=0.9, help="Decay of the first moment.")
    adam_beta2: float = HfArg(default=0.999, help="Decay of the second moment.")
    adam_epsilon: float = HfArg(default=1e-8, help="Epsilon of the optimizer.")
    adam_weight_decay: float = HfArg(default=0.0, help="Decoupled weight decay.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradients are clipped to this norm; inf does not clip.")
    lr_scheduler: Schedule = HfArg(
        default="constant_with_warmup", help="Shape of the learning rate; wsd is warm-up, stable, cooldown."
    )
    lr_warmup_steps: int = HfArg(default=0, help="Steps of linear warm-up (all but 'constant').")
    lr_cooldown_steps: int | None = HfArg(default=0, help="Steps of the cooldown at the end, for wsd.")
    lr_cooldown_shape: Literal["1-sqrt", "linear", "cosine"] = HfArg(default="1-sqrt", help="Of that cooldown.")

    def __post_init__(self) -> None:
        check_ranges(self)

    def cooldown_of(self, max_steps: int) -> int:
        """Steps of the cooldown at the end of a run: a third of it where they are None, and there is one."""
        if self.lr_cooldown_steps is not None:
            return self.lr_cooldown_steps
        return min(max_steps // 3, max(0, max_steps - self.lr_warmup_steps)) if self.lr_scheduler == "wsd" else 0


class RAdam(torch.optim.RAdam):
    """torch's, which can be told on the device to change nothing, as fused AdamW; it keeps a copy of weights and moments for that.

    Attributes:
        found_inf: 1 for a step that is to change nothing, else 0.
    """

    _step_supports_amp_scaling = True  # what torch calls it
    found_inf: Tensor | None = None

    def __init__(self, parameters: list[nn.Parameter], **settings: object) -> None:
        super().__init__(parameters, **settings)
        self.register_step_pre_hook(self._keep)
        self.register_step_post_hook(self._restore)

    @torch.no_grad()
    def _keep(self, *_: object) -> None:
        self._before = {id(value): value.clone() for value in self._on_the_device()}

    @torch.no_grad()
    def _restore(self, *_: object) -> None:
        before, self._before = self._before, {}
        if self.found_inf is not None:
            for value in self._on_the_device():  # moments begin at 0 in the first step
                value.copy_(torch.where(self.found_inf > 0, before.get(id(value), 0), value))

    def _on_the_device(self) -> list[Tensor]:
        """What trains, and its moments; the numbers of steps are on the CPU."""
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        moments = [value for p in moved for name, value in self.state[p].items() if name != "step"]
        return moved + moments


def skips_on_the_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its `found_inf`, a tensor that is 1 or 0, decides whether a step changes anything."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def lay_out_moments(optimizer: torch.optim.Optimizer) -> None:
    """Moments that were loaded lie in memory as their weights do, which `--channels_last` may have changed."""
    for p, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                moments[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)


@dataclass
class CooledOptimConfig(OptimConfig):
    """Of distillations with text: the rate falls at the end, which wins at equal cost (docs/results/defaults.md)."""

    lr_scheduler: Schedule = HfArg(default="wsd", help="Shape of the learning rate; wsd is warm-up, stable, cooldown.")
    lr_cooldown_steps: int | None = HfArg(
        default=None, help="Steps of the cooldown at the end, for wsd; a third of --max_train_steps if not given."
    )


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    settings = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }
    return OPTIMIZERS[config.optimizer](list(parameters), **settings)


def _adamw(parameters: list[nn.Parameter], **settings: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True, **settings)


def _radam(parameters: list[nn.Parameter], **settings: object) -> torch.optim.Optimizer:
    return RAdam(parameters, decoupled_weight_decay=True, **settings)


def _adamw_8bit(parameters: list[nn.Parameter], **settings: object) -> torch.optim.Optimizer:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(missing("--optimizer adamw_8bit", BITSANDBYTES)) from error
    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def _adamp(parameters: list[nn.Parameter], **settings: object) -> torch.optim.Optimizer:
    try:
        from timm.optim import AdamP
    except ModuleNotFoundError as error:
        raise UserError(missing("--optimizer adamp", TIMM)) from error
    except (ImportError, RuntimeError) as error:  # timm imports torchvision, which raises RuntimeError if mismatched
        raise UserError(f"--optimizer adamp needs timm with a matching torchvision: {error}.") from error
    return AdamP(parameters, **settings)


OPTIMIZERS = {"adamw": _adamw, "adamw_8bit": _adamw_8bit, "radam": _radam, "adamp": _adamp}


COOLDOWNS = {  # share of the cooldown that is over -> factor of the rate
    "1-sqrt": lambda share: 1 - math.sqrt(share),  # 2405.18392, Sec. 3
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
}


def wsd_factor(step: int, warmup: int, cooldown: int, max_steps: int, shape: str = "1-sqrt") -> float:
    """Warm-up, stable, cooldown."""
    if step < warmup:
        return step / warmup
    into_cooldown = step - (max_steps - cooldown)
    return 1.0 if into_cooldown <= 0 else COOLDOWNS[shape](min(1.0, into_cooldown / cooldown))


def make_lr_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, max_steps: int) -> LambdaLR:
    """A scheduler to step once per optimizer step, on every rank."""
    cooldown = config.cooldown_of(max_steps)
    if config.lr_scheduler != "wsd" and cooldown:
        raise UserError(f"--lr_cooldown_steps acts with --lr_scheduler wsd, not {config.lr_scheduler!r}.")
    if not cooldown and config.lr_cooldown_shape != "1-sqrt":
        raise UserError("--lr_cooldown_shape has no effect without --lr_cooldown_steps: give both, or leave it out.")
    if config.lr_warmup_steps + cooldown > max_steps:
        raise UserError(
            f"--lr_warmup_steps {config.lr_warmup_steps} and --lr_cooldown_steps {cooldown} take more than the "
            f"{max_steps} steps of the run (--max_train_steps): shorten them."
        )
    if config.lr_scheduler == "wsd":
        stages = config.lr_warmup_steps, cooldown, max_steps, config.lr_cooldown_shape
        return LambdaLR(optimizer, lambda step: wsd_factor(step, *stages))
    counts = {"num_warmup_steps": config.lr_warmup_steps, "num_training_steps": max_steps}
    return get_scheduler(config.lr_scheduler, optimizer, **counts)
