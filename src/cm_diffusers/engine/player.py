"""A network that learns: its parameters, optimizer and learning-rate schedule."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from cm_diffusers.engine import checkpoints
from cm_diffusers.engine.optimizers import (
    OptimConfig,
    lay_out_moments,
    make_lr_scheduler,
    make_optimizer,
    skips_on_the_device,
)
from cm_diffusers.engine.parts import whole
from cm_diffusers.engine.slices import Stored
from cm_diffusers.errors import UserError
from cm_diffusers.types import Loss, Networks


class Player:
    """Owns what one trained network of `nets` needs; replaces it there by its prepared (distributed) form."""

    def __init__(
        self, name: str, nets: Networks, optim: OptimConfig, max_steps: int, accelerator: Accelerator
    ) -> None:
        self.name, self.optim, self.accelerator = name, optim, accelerator
        self.raw: nn.Module = getattr(nets, name)
        self.trainable = [p for p in self.raw.parameters() if p.requires_grad]
        if not self.trainable:
            raise UserError(f"The {name} has no trainable parameter: every one has requires_grad=False.")
        optimizer = make_optimizer(self.trainable, optim)
        self.lr_scheduler = make_lr_scheduler(optimizer, optim, max_steps)  # ours to step: once, on every rank
        self.is_sharded = isinstance(self.raw, FSDPModule)
        if self.is_sharded:  # which accelerate could do with one network alone, and rounds times
            self.network, self.optimizer = self.raw, accelerator.prepare_optimizer(optimizer)
        else:
            self.network, self.optimizer = accelerator.prepare(self.raw, optimizer)
        setattr(nets, name, self.network)

    def update(self, loss: Loss) -> dict[str, Tensor]:
        """Clip, step and clear. Where loss or gradient norm is not finite nothing changes; `skipped` is 1 then, else 0."""
        norm = whole(self.accelerator.clip_grad_norm_(self.trainable, self.optim.max_grad_norm))
        self.skipped = 1 - (loss.value.isfinite() & norm.isfinite()).float()
        learning_rate = torch.tensor(self.lr_scheduler.get_last_lr()[0])
        self._step()
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()
        return {f"{self.name}/grad_norm": norm.detach(), f"{self.name}/learning_rate": learning_rate}

    def _step(self) -> None:
        raw = self.optimizer.optimizer
        if self.accelerator.scaler is not None:  # fp16: the scaler sees to it
            self.optimizer.step()
        elif skips_on_the_device(raw):
            raw.found_inf = self.skipped
            self.optimizer.step()
        elif not self.skipped:  # which waits for the device
            self.optimizer.step()

    def scheduled_rate(self) -> float:
        """The learning rate that the schedule has where it stands."""
        scheduler = self.lr_scheduler
        return scheduler.base_lrs[0] * scheduler.lr_lambdas[0](scheduler.last_epoch)

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """Named tensors by file stem, and JSON."""
        tensors, rest = checkpoints.split_optimizer_state(self.optimizer.state_dict())
        files = {self.name: checkpoints.trainable_state(self.raw), f"optimizer-{self.name}": tensors}
        return files, {"optimizer": rest, "lr_scheduler": self.lr_scheduler.state_dict()}

    def load_state(self, files: dict[str, Stored], rest: dict) -> None:
        checkpoints.load_trainable_state(self.raw, files[self.name])
        stored = files[f"optimizer-{self.name}"]
        saved = checkpoints.join_optimizer_state(stored, rest["optimizer"], self.trainable)
        self.optimizer.load_state_dict(saved)
        lay_out_moments(self.optimizer.optimizer)
        self.lr_scheduler.load_state_dict(rest["lr_scheduler"])


@contextmanager
def only_trains(player: Player, players: list[Player]) -> Iterator[None]:
    """Freeze the other players for this one's turn, then restore exactly what was trainable before.

    Nor do they exchange gradients between ranks: frozen, they would wait forever for some to arrive.
    """
    others = [other for other in players if other is not player]
    frozen = [p for other in others for p in other.trainable]
    for p in frozen:
        p.requires_grad_(False)
    try:
        with ExitStack() as stack:
            for other in others:
                stack.enter_context(other.accelerator.no_sync(other.network))
            yield
    finally:
        for p in frozen:
            p.requires_grad_(True)
