"""What a run writes into its folder: all that a later run may replace. Whatever else lies there is the user's."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


RESULTS = ("pipeline", "lora", "student", "motion_adapter", "controlnet", "image_adapter", "vae", "classifier")
PARTS = (
    "unet|vae|text_encoder|text_encoder_2|tokenizer|tokenizer_2|scheduler|safety_checker|feature_extractor|"
    "image_encoder|motion_adapter|controlnet"
)
IN_RESULT = re.compile(
    r"README\.md|samples\.(?:png|gif)|pipeline\.py"
    r"|(?:cm_diffusers|training|model_index|config|scheduler_config|metrics|\w+\.safetensors\.index)\.json"
    r"|(?:diffusion_pytorch_model|model|pytorch_lora_weights)[\w.-]*\.safetensors"
    rf"|(?:{PARTS})/[^/]+\.(?:json|safetensors|txt|model)"
    r"|peft/adapter_(?:config\.json|model\.safetensors)|single_file/[^/]+\.safetensors"
    r"|comfyui/[^/]+\.safetensors"  # of LoRAs before its form was that at the top
    r"|(?:evaluation/)?(?:table\.json|grid\.png|clips\.gif)"
)
IN_CHECKPOINT = re.compile(r"state\.json|[^/]+\.safetensors")
IN_RUN = re.compile(
    r"samples/step-\d+\.(?:png|gif|webp|mp4)"
    r"|averages/step-\d+/[^/]+\.safetensors|(?:best|snapshots)/step-\d+/student\.safetensors"
    r"|(?:rewards|watch)\.(?:json|png)|metrics\.json"
)
LEFTOVER = re.compile(
    rf"\.(?P<of>(?:checkpoint-\d+|step-\d+|rewards|watch|{'|'.join(RESULTS)})(?:\.\w+)?)\.(?P<kind>partial|pruned|replaced)"
)
LATER = re.compile(r"(?:checkpoint|step)-(\d+)(?:\.(?:png|gif|webp|mp4))?")
WEIGHTS = ("best", "snapshots")  # of steps between checkpoints, which a resumed run makes anew
HOLD_LEFTOVERS = ("averages", "best", "samples", "snapshots")  # beside the run's folder itself
LOGS = re.compile(r"(?:[\d.]+/)?(?:events\.out\.tfevents\.[^/]+|hparams\.yml)")
FOLDERS = re.compile(rf"checkpoint-\d+|samples|averages|best|snapshots|later-\d+|{'|'.join(RESULTS)}")
LOCK = ".lock"  # of the process that writes into the folder; no file of a run: it stays where it is, and vanishes


def is_result_file(name: str) -> bool:
    """Whether publishing writes it, by its path inside the result's folder."""
    return bool(IN_RESULT.fullmatch(name))


def is_checkpoint_file(name: str) -> bool:
    """Whether `write_checkpoint` writes it, by its path inside the checkpoint."""
    return bool(IN_CHECKPOINT.fullmatch(name))


def is_run_file(name: str, logs: str) -> bool:
    """Whether a run writes it, by its path inside the run's folder.

    Args:
        logs: Name of the tracker's folder.
    """
    first, _, rest = name.partition("/")
    if re.fullmatch(r"later-\d+", first):
        return is_run_file(rest, logs)
    if re.fullmatch(r"checkpoint-\d+", first):
        return is_checkpoint_file(rest)
    if LEFTOVER.fullmatch(first) or (first in HOLD_LEFTOVERS and LEFTOVER.fullmatch(rest.partition("/")[0])):
        return True
    return (
        bool(IN_RUN.fullmatch(name))
        or (first in RESULTS and is_result_file(rest))
        or (first == logs and bool(LOGS.fullmatch(rest)))
    )


def files_in(folder: Path) -> Iterator[str]:
    """Paths of files and links below a folder, relative to it; what a link leads to is not entered."""
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in sorted([*names, *links]):
            yield (Path(place) / name).relative_to(folder).as_posix()


def foreign_files(folder: Path, is_ours: Callable[[str], bool]) -> list[str]:
    """Paths of the user's files in a folder of ours, relative to it."""
    return [name for name in files_in(folder) if not is_ours(name)]


def keep_foreign(old: Path, new: Path, is_ours: Callable[[str], bool]) -> None:
    """Copy the user's files of a folder that is to be replaced into the one that takes its place."""
    for name in foreign_files(old, is_ours) if old.is_dir() else ():
        if not os.path.lexists(new / name):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(old / name, new / name, follow_symlinks=False)


def move_own(source: Path, goal: Path, is_ours: Callable[[str], bool]) -> None:
    """Rename what a run wrote from one folder into another: whole where it can be, beside the user's files one by one.

    A link with a name of ours is moved as a link; what it leads to stays as it is.
    """
    for entry in sorted(source.iterdir()):
        inside = [entry.name] if not entry.is_dir() else [f"{entry.name}/{name}" for name in files_in(entry)]
        mine = [name for name in inside if is_ours(name)]
        if entry.is_symlink():
            mine = [entry.name] if FOLDERS.fullmatch(entry.name) or is_ours(entry.name) else []
        elif mine == inside and (mine or FOLDERS.fullmatch(entry.name)) and not (goal / entry.name).exists():
            mine = [entry.name]
        for name in mine:
            (goal / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(source / name, goal / name)
            remove_empty((source / name).parent, source)


def set_later_aside(run: Path, step: int) -> Path | None:
    """Move checkpoints of later steps, with averages, samples and snapshots, into `later-<n>`; None if there is no such checkpoint.

    Without one weights of later steps are removed: nothing else in the folder goes on from there.

    The newest step goes first, its checkpoint last: a kill in between leaves all of the steps before, as the end of a run does.
    """
    found = [
        path for kind in (*(f"{name}/step-*" for name in HOLD_LEFTOVERS), "checkpoint-*") for path in run.glob(kind)
    ]
    steps = {path: int(match[1]) for path in found if (match := LATER.fullmatch(path.name))}
    later = sorted((path for path in steps if steps[path] > step), key=lambda path: (-steps[path], path.parent == run))
    if not any(path.parent == run for path in later):  # without a checkpoint: a kill before their checkpoint was whole
        for path in later:
            if path.parent.name in WEIGHTS and not foreign_files(path, is_checkpoint_file):
                remove(path)
        return None
    goal = run / f"later-{next(i for i in range(1, 10**6) if not (run / f'later-{i}').exists())}"
    for path in later:
        (goal / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, goal / path.relative_to(run))
    return goal


def clear_leftovers(run: Path) -> None:
    """What a kill left of a file or folder that was being written or removed; the one that was being replaced returns."""
    for entry in [entry for name in ("", *HOLD_LEFTOVERS) for entry in (run / name).glob(".*")]:
        if match := LEFTOVER.fullmatch(entry.name):
            final = entry.with_name(match["of"])
            if match["kind"] == "replaced" and not os.path.lexists(final):
                os.replace(entry, final)
            else:
                remove(entry)


def remove_empty(folder: Path, above: Path) -> None:
    """A folder and those around it, up to one that stays, as far as nothing is in them."""
    while folder != above and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def remove(path: Path) -> None:
    """A folder, a file or a link; of a link not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
