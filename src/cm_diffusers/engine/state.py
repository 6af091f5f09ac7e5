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
    """Write the checkpoint of the present step, then prune those that are too many.

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
    trainer.averages.write_snapshots(trainer.output_dir, trainer.step)
    checkpoints.write_checkpoint(trainer.output_dir, trainer.step, files, state)
    if trainer.config.checkpoints_total_limit:
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
            trainer.nets.target.load_state_dict(files["target"])
        trainer.averages.load(files)
        if trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(state["grad_scaler"])
        trainer.step = int(state["step"])
    check_rates(trainer, path, state)
    logger.info("Resumed from %s at step %d", path, trainer.step)
    return files.get("source", {})
