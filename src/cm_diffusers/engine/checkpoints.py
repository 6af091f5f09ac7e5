"""Checkpoints of a run: safetensors and JSON in a folder that appears whole or not at all, and says what is in it."""

import json
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cm_diffusers.engine.own_files import foreign_files, is_checkpoint_file, keep_foreign, remove
from cm_diffusers.engine.ranks import Ranks
from cm_diffusers.engine.slices import DamagedCheckpointError, Stored, file_name, ranks_of, stems, to_write
from cm_diffusers.errors import UserError, writable


logger = logging.getLogger(__name__)

PREFIX, STATE, FILES, BRANCH_POINT = "checkpoint-", "state.json", "files", "branch_point"
NEEDED = ("step", "identity", "players")  # in every `state.json`


class OtherNetworkError(ValueError):
    """A checkpoint is whole, but of another network."""


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and buffers: for a LoRA student, its adapters only."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def load_trainable_state(module: nn.Module, state: Stored) -> None:
    """
    Raises:
        OtherNetworkError: Names or shapes of the parameters are not the module's.
    """
    own = trainable_state(module)
    expected, found = {name: tuple(value.shape) for name, value in own.items()}, state.shapes
    if odd := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise OtherNetworkError(
            f"The checkpoint belongs to another network: {len(odd)} parameters differ, such as {odd[0]}."
        )
    state.fill_all(own)


def split_optimizer_state(state: dict) -> tuple[dict[str, Tensor], dict]:
    """Part an optimizer's state dict into flat tensors and JSON."""
    tensors, scalars = {}, {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{index}.{name}"] = value
    return tensors, {"scalars": scalars, "param_groups": state["param_groups"]}


def join_optimizer_state(tensors: Stored, rest: dict, parameters: list[nn.Parameter]) -> dict:
    """
    Args:
        parameters: What it optimizes; of a sharded one, what has its shape is sharded alike.
    """
    state: dict[int, dict] = {}
    for key in tensors:
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensors.like(key, parameters[int(index)])
    for key, value in rest["scalars"].items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": rest["param_groups"]}


def write_checkpoint(output_dir: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict) -> Path:
    """Write `<output_dir>/checkpoint-<step>`, replacing one of the same step.

    Args:
        tensors: file stem -> named tensors.
        state: JSON, as `state.json`.

    Raises:
        ValueError: As `write_folder`.
    """
    kept = list_checkpoints(output_dir)
    advice = f"make room; the last good checkpoint is {kept[-1] if kept else 'none yet'}"
    return write_folder(output_dir / f"{PREFIX}{step}", tensors, state, advice)


def write_folder(
    final: Path, tensors: dict[str, dict[str, Tensor]], state: dict | None = None, advice: str = "make room"
) -> Path:
    """Write a folder aside, under a name of its own, and rename it, replacing what was there.

    Args:
        tensors: File stem -> named tensors.
        state: JSON, as `state.json`, where the other files and their sizes are listed too; None for no such file.
        advice: To who reads that it cannot be written.

    Raises:
        ValueError: The disk is full or may not be written to; nothing has changed.
    """
    final, ranks = Path(os.path.realpath(final)), ranks_of(tensors)
    aside = final.with_name(f".{final.name}.{ranks.first(lambda: uuid4().hex[:8])}.partial")
    size = sum(value.nbytes for named in tensors.values() for value in named.values())
    try:
        with writable(str(final), size, advice):
            ranks.first(lambda: aside.mkdir(parents=True))
            written = ranks.each(lambda: _write(aside, tensors, ranks))
            ranks.first(
                lambda: _finish(aside, final, state, {name: size for one in written for name, size in one.items()})
            )
    except BaseException:
        if ranks.rank == 0:
            remove(aside)
        raise
    return final


def _write(folder: Path, tensors: dict[str, dict[str, Tensor]], ranks: Ranks) -> dict[str, int]:
    """What this process has of them; returns sizes by file name."""
    for stem, named in tensors.items():
        values, header = to_write(named, ranks.rank)
        if values or ranks.rank == 0:
            save_file(values, folder / file_name(stem, ranks), *([] if header is None else [header]))
    paths = [path for stem in tensors if (path := folder / file_name(stem, ranks)).exists()]
    for path in paths:
        _sync(path)
    return {path.name: path.stat().st_size for path in paths}


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _finish(aside: Path, final: Path, state: dict | None, sizes: dict[str, int]) -> None:
    """Where all files of all processes are there: say so, and give the folder its name."""
    if unseen := [name for name in sizes if not (aside / name).is_file()]:
        raise UserError(
            f"{final} is not one folder for all machines: {unseen[0]} of another process is not in it; give an --output_dir that "
            "they share."
        )
    if state is not None:
        (aside / STATE).write_text(json.dumps(state | {FILES: dict(sorted(sizes.items()))}, indent=1))
        _sync(aside / STATE)
    keep_foreign(final, aside, is_checkpoint_file)
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        remove(replaced)
        os.replace(final, replaced)
    os.replace(aside, final)
    remove(replaced)


def read_state(path: Path) -> dict:
    """The JSON of a checkpoint, whose files are there in the sizes that it lists; older ones list none.

    Raises:
        ValueError: There is none.
        DamagedCheckpointError: It, or another file, is not as it was written.
    """
    file = path / STATE
    if not file.exists():
        raise UserError(f"{path} is not a checkpoint: there is no {STATE} in it.")
    try:
        state = json.loads(file.read_text("utf-8"))
        lacking = [name for name in NEEDED if name not in state]
        sizes = dict(state.get(FILES, {}))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{file} is damaged: it is not the JSON that was written.") from error
    if lacking:
        raise DamagedCheckpointError(f"{file} is damaged: {lacking[0]} is missing in it.")
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            what = "it is not there" if found is None else f"it has {found} bytes, not {size}"
            raise DamagedCheckpointError(f"{path / name} is damaged: {what}.")
    return state


def read_checkpoint(path: Path) -> tuple[dict[str, Stored], dict]:
    """Tensors by file stem and name, and the JSON.

    Raises:
        ValueError, DamagedCheckpointError: As `read_state`.
    """
    state = read_state(path)
    found = stems(state.get(FILES) or (file.name for file in path.glob("*.safetensors")))
    return {stem: Stored(path / name for name in names) for stem, names in found.items()}, state


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """What fails inside the block, for a part is missing or has another form, is the damage of this checkpoint."""
    try:
        yield
    except (DamagedCheckpointError, OtherNetworkError, torch.OutOfMemoryError):
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [""]
        reason = f"{lines[0]} is missing in it" if isinstance(error, LookupError) else lines[0].rstrip(".:")
        raise DamagedCheckpointError(f"{path} is damaged: {reason}.") from error


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p.parent for p in output_dir.glob(f"{PREFIX}*/{STATE}") if p.parent.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def find_checkpoint(output_dir: Path, wanted: str) -> Path:
    """The checkpoint named by `--resume_from_checkpoint`: "latest", a name inside the output folder, or a path."""
    if wanted == "latest":
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints:
            raise UserError(f"--resume_from_checkpoint latest: there is no checkpoint in {output_dir}.")
        return checkpoints[-1]
    for path in (output_dir / wanted, Path(wanted)):
        if path.is_dir():
            return path
    have = ", ".join(p.name for p in list_checkpoints(output_dir)) or "none"
    raise UserError(f"--resume_from_checkpoint {wanted}: no such checkpoint; {output_dir} holds: {have}.")


def _is_branch_point(path: Path, spared: Collection[int]) -> bool:
    if int(path.name.removeprefix(PREFIX)) in spared:
        return True
    with suppress(OSError, ValueError):  # damaged: as any other
        return bool(json.loads((path / STATE).read_text("utf-8")).get(BRANCH_POINT))
    return False


def prune_checkpoints(output_dir: Path, limit: int, spared: Collection[int] = ()) -> None:
    """Keep the newest `limit` checkpoints; renamed first, so that a half-deleted one is never taken for a whole one.

    One to branch from, or with files of the user in it, stays.

    Args:
        spared: Steps of other ones that stay.
    """
    for old in [path for path in list_checkpoints(output_dir) if not _is_branch_point(path, spared)][:-limit]:
        if foreign := foreign_files(old, is_checkpoint_file):
            logger.warning("%s is kept, for %s in it is not of a checkpoint.", old, foreign[0])
            continue
        aside = old.with_name(f".{old.name}.{uuid4().hex[:8]}.pruned")
        os.replace(old, aside)
        remove(aside)
