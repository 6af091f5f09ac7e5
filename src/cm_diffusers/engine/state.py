"""What of a training a checkpoint holds, and how it returns."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from cm_diffusers.engine import checkpoints
from cm_diffusers.engine.branching import check_rates


if TYPE_CHECKING:
    from cm_diffusers.engine.trainer import Trainer

logger = logging.getLogger(__name__)


def write_state(trainer: Trainer, source: dict[str, Tensor]) -> None:
    """Write the checkpoint of the present step, then prune those that are too many; called by all that hold a part of it.

    Args:
        source: What the source of batches keeps.

    Raises:
        ValueError: It cannot be written; the one before stands.
    """
    files, state = trainer.averages.state(), {"step": trainer.step, "identity": trainer.identity, "players": {}}
    state[checkpoints.BRANCH_POINT] = trainer.step in trainer.config.branch_steps
    for player in trainer.players:
        tensors, state["players"][player.name] = player.state()
        files |= tensors
    if trainer.nets.target is not None:
        files["target"] = trainer.nets.target.state_dict()
    if source:
        files["source"] = source
    if trainer.accelerator.scaler is not None:
        state["grad_scaler"] = trainer.accelerator.scaler.state_dict()
    is_main = trainer.accelerator.is_main_process
    trainer.averages.write_snapshots(trainer.output_dir, trainer.step, is_main)
    checkpoints.write_checkpoint(trainer.output_dir, trainer.step, files, state)
    if trainer.config.checkpoints_total_limit and is_main:
        checkpoints.prune_checkpoints(
            trainer.output_dir, trainer.config.checkpoints_total_limit, trainer.config.branch_steps
        )


def load_state(trainer: Trainer, path: Path) -> dict[str, Tensor]:
    """Bring a trainer to where a checkpoint was written; returns what the source of batches kept.

    Raises:
        OtherNetworkError, DamagedCheckpointError: It cannot be; what of it was loaded before that stays.
        ValueError: The schedule of the learning rate does not go on from there.
    """
    files, state = checkpoints.read_checkpoint(path)
    with checkpoints.undamaged(path):
        for player in trainer.players:
            player.load_state(files, state["players"][player.name])
        if trainer.nets.target is not None:
            files["target"].fill_all(trainer.nets.target.state_dict())
        trainer.averages.load(files)
        if trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(state["grad_scaler"])
        trainer.step = int(state["step"])
    check_rates(trainer, path, state)
    had, has = state["identity"].get("num_processes"), trainer.accelerator.num_processes
    if had != has and trainer.accelerator.is_main_process:
        logger.warning(
            "%s was written by %s processes, and %d go on: weights, averages and optimizers are the same, but each process draws "
            "noise and times of its own, so what follows is not what it would have been.",
            path,
            had,
            has,
        )
    logger.info("Resumed from %s at step %d", path, trainer.step)
    return dict(files.get("source", {}))
