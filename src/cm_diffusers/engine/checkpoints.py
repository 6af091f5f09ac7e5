"""Checkpoints of a run: safetensors and JSON in a folder that appears whole or not at all."""

import json
import logging
import os
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cm_diffusers.engine.own_files import foreign_files, is_checkpoint_file, keep_foreign, remove


logger = logging.getLogger(__name__)

PREFIX, STATE = "checkpoint-", "state.json"


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and buffers: for a LoRA student, its adapters only."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def load_trainable_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    expected = trainable_state(module)
    if expected.keys() != state.keys():
        odd = sorted(expected.keys() ^ state.keys())
        raise ValueError(f"The checkpoint belongs to another network: {len(odd)} parameters differ, such as {odd[0]}.")
    module.load_state_dict(state, strict=False)


def split_optimizer_state(state: dict) -> tuple[dict[str, Tensor], dict]:
    """Part an optimizer's state dict into flat tensors and JSON."""
    tensors, scalars = {}, {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{index}.{name}"] = value
    return tensors, {"scalars": scalars, "param_groups": state["param_groups"]}


def join_optimizer_state(tensors: dict[str, Tensor], rest: dict) -> dict:
    state: dict[int, dict] = {}
    for key, value in {**tensors, **rest["scalars"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": rest["param_groups"]}


def write_checkpoint(output_dir: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict) -> Path:
    """Write `<output_dir>/checkpoint-<step>`, replacing one of the same step.

    Args:
        tensors: file stem -> named tensors.
        state: JSON, as `state.json`.
    """
    return write_folder(output_dir / f"{PREFIX}{step}", tensors, {STATE: state})


def write_folder(final: Path, tensors: dict[str, dict[str, Tensor]], texts: dict[str, dict]) -> Path:
    """Write a folder aside and rename it, replacing what was there.

    Args:
        tensors: File stem -> named tensors.
        texts: File name -> JSON.
    """
    final = Path(os.path.realpath(final))
    aside, replaced = (final.with_name(f".{final.name}.{suffix}") for suffix in ("partial", "replaced"))
    remove(aside)
    aside.mkdir(parents=True)
    for stem, named in tensors.items():
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in named.items()}, aside / f"{stem}.safetensors")
    for name, content in texts.items():
        (aside / name).write_text(json.dumps(content, indent=1))
    for path in aside.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    keep_foreign(final, aside, is_checkpoint_file)
    if final.exists():
        os.replace(final, replaced)
    os.replace(aside, final)
    remove(replaced)
    return final


def read_state(path: Path) -> dict:
    """The JSON of a checkpoint."""
    try:
        return json.loads((path / STATE).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not a checkpoint: there is no {STATE} in it.") from error


def read_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    state = read_state(path)
    return {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}, state


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p.parent for p in output_dir.glob(f"{PREFIX}*/{STATE}") if p.parent.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def find_checkpoint(output_dir: Path, wanted: str) -> Path:
    """The checkpoint named by `--resume_from_checkpoint`: "latest", a name inside the output folder, or a path."""
    if wanted == "latest":
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints:
            raise ValueError(f"--resume_from_checkpoint latest: there is no checkpoint in {output_dir}.")
        return checkpoints[-1]
    for path in (output_dir / wanted, Path(wanted)):
        if path.is_dir():
            return path
    have = ", ".join(p.name for p in list_checkpoints(output_dir)) or "none"
    raise ValueError(f"--resume_from_checkpoint {wanted}: no such checkpoint; {output_dir} holds: {have}.")


def prune_checkpoints(output_dir: Path, limit: int) -> None:
    """Keep the newest `limit` checkpoints; renamed first, so that a half-deleted one is never taken for a whole one.

    One with files of the user in it stays.
    """
    for old in list_checkpoints(output_dir)[:-limit]:
        if foreign := foreign_files(old, is_checkpoint_file):
            logger.warning("%s is kept, for %s in it is not of a checkpoint.", old, foreign[0])
            continue
        aside = old.with_name(f".{old.name}.replaced")
        remove(aside)
        os.replace(old, aside)
        remove(aside)
