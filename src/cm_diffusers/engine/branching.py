"""A run that goes on from a checkpoint under another schedule of its learning rate: how it is called, and what must fit."""

from __future__ import annotations

import json
import logging
import math
import sys
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cm_diffusers.engine.recipes import flags_of, with_recipes
from cm_diffusers.errors import UserError
from cm_diffusers.places import without_secrets
from cm_diffusers.types import Objective, Progress


if TYPE_CHECKING:
    from cm_diffusers.engine.trainer import Trainer

logger = logging.getLogger(__name__)

COMMAND = "command"  # in `run.json`: the script's file name, and its flags
SCHEDULE = ("lr_scheduler", "lr_cooldown_steps", "lr_cooldown_shape")  # flags that may change where the rate does not
OF_ONE_RUN = set(  # flags of which a branch has its own, or none: a token least of all
    "output_dir overwrite_output_dir resume_from_checkpoint branch_steps snapshot_steps snapshot_window "
    "stop_when stop_evaluation stop_interval stop_patience "
    "push_to_hub hub_model_id hub_private_repo hub_token".split()
)


def command_line() -> list[str]:
    """Of this process, recipes written out, without what says where its result goes."""
    words = [word for name, words in flags_of(with_recipes(None)) if name not in OF_ONE_RUN for word in words]
    return [Path(sys.argv[0]).name, *map(without_secrets, words)]


def command_of(checkpoint: Path, scripts: Path) -> list[str]:
    """`command_line` of the run that a checkpoint is of.

    Args:
        scripts: The folder that the script must be in.

    Raises:
        ValueError: It is not known, or its script is another's.
    """
    run = checkpoint.resolve().parent / "run.json"
    try:
        script, *words = json.loads(run.read_text("utf-8"))[COMMAND]
    except (OSError, ValueError, LookupError) as error:
        raise UserError(
            f"{run} does not tell how the run of {checkpoint} was started: give a checkpoint inside the folder of a run of this "
            "release."
        ) from error
    if not (scripts / script).is_file():
        raise UserError(
            f"The run of {checkpoint} was made by {script}, which is not in {scripts}: start that script itself, with "
            "--resume_from_checkpoint, a new --output_dir, --max_train_steps and --lr_cooldown_steps."
        )
    return [script, *words]


def is_schedule(name: str) -> bool:
    """Of a setting in a run's identity, such as student/lr_scheduler."""
    return name.rpartition("/")[2] in SCHEDULE


def check_rates(trainer: Trainer, path: Path, state: dict) -> None:
    """The schedule goes on where that of a checkpoint was.

    Args:
        path, state: Of the checkpoint, whose players are loaded.

    Raises:
        ValueError: It does not, and its flags were changed; where only the number of steps was, that is a warning.
    """
    now = trainer.identity
    changed = [
        name for name, value in state["identity"].items() if is_schedule(name) and now.get(name, value) != value
    ]
    for player in trainer.players:
        had, has = state["players"][player.name]["lr_scheduler"]["_last_lr"][0], player.scheduled_rate()
        if math.isclose(had, has, rel_tol=1e-6, abs_tol=1e-12):
            continue
        jump = f"The {player.name}'s learning rate was {had:.3g} in {path}, but the schedule has {has:.3g} there"
        if changed:
            raise UserError(
                f"{jump}: a branch begins where the rate is the same, after the warm-up and before the cooldown of both; give an "
                "earlier checkpoint, or a shorter --lr_cooldown_steps."
            )
        logger.warning("%s: it follows --max_train_steps, which was another.", jump)


def check_stages(objective: Objective, cooldowns: Iterable[int], max_steps: int, is_branch: bool) -> None:
    """No curriculum changes its stage when the learning rate has begun to fall (a warning in a run that is no branch).

    Args:
        objective: One with a curriculum has `stage`, of Progress, which grows.
        cooldowns: Steps of the players' cooldowns.
        max_steps: Of the run.

    Raises:
        ValueError: That of a branch does.
    """
    start = max_steps - max(cooldowns)
    if not hasattr(objective, "stage") or start == max_steps:
        return
    stages = [objective.stage(Progress(step, max_steps)) for step in range(max_steps)]
    last = bisect_left(stages, stages[-1])
    if last <= start:
        return
    found = (
        f"The curriculum enters its last stage at step {last}, when the learning rate has been falling since step {start}: what "
        f"the stage asks for is hardly learned. Give at most --lr_cooldown_steps {max_steps - last}"
    )
    if is_branch:
        raise UserError(f"{found}, or a checkpoint from step {last} on.")
    logger.warning("%s, or fewer stages.", found)
