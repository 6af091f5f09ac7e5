"""Which split a local file belongs to: as the folder's README.md says, or as names of folders and tables tell."""

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import metadata_load

from cm_diffusers.data.file_names import suffix_of
from cm_diffusers.errors import readable


TRAIN, TEST = "train", "test"
WORDS = {  # that `datasets` takes for one split -> its name
    word: name
    for name, words in {
        TRAIN: "train training", "validation": "validation valid val dev", TEST: "test testing eval evaluation",
    }.items()
    for word in words.split()
}  # fmt: skip
SEPARATORS = r"[-._\d]"
WORD = re.compile(rf"(?:^|{SEPARATORS})({'|'.join(WORDS)})(?:$|{SEPARATORS})", re.IGNORECASE)
NUMBERED = re.compile(r"(.+)-\d{5}-of-\d{5}")  # a table of the Hub, whose split may have any name


def split_name(word: str) -> str:
    """One name of a split that has several: "val" is "validation"."""
    return WORDS.get(word.lower(), word)


def splits_of(top: Path, files: list[Path], asked: str) -> dict[Path, str | None]:
    """The split of each file; None where nothing tells one.

    What the folder itself is called is no news: in a folder `test` everything is of that split.

    Args:
        top: The folder that was named.
        files: In it, at any depth.
        asked: Name of a split, of which a folder may be called.

    Raises:
        ValueError: README.md tells of several data sets.
    """
    told, own = _told(top, files), WORDS.get(top.resolve().name.lower())
    found = {file: told.get(file) or _of_names(file.relative_to(top), asked) for file in files}
    return {file: None if split == own else split for file, split in found.items()}


def _of_names(path: PurePath, asked: str) -> str | None:
    for name in path.parts[:-1]:
        if name == asked:
            return split_name(asked)
        if found := WORD.search(name):
            return split_name(found[1])
    return _of_table(path) if suffix_of(path) == ".parquet" else None


def _of_table(path: PurePath) -> str | None:
    found = NUMBERED.match(path.stem) or WORD.search(path.stem)
    return split_name(found[1]) if found else None


def other_than_training(shards: Iterable[str]) -> list[str]:
    """Those of several tar files that are called after another split than training."""
    return [shard for shard in shards if (name := WORD.search(PurePath(shard).stem)) and split_name(name[1]) != TRAIN]


def _told(top: Path, files: list[Path]) -> dict[Path, str]:
    """What the front matter of README.md says, as the Hub reads it."""
    if not (top / "README.md").is_file():
        return {}
    with readable(f"{top / 'README.md'}"):
        configs = [one for one in _listed((metadata_load(top / "README.md") or {}).get("configs")) if one]
    told = [dict(_patterns(config.get("data_files"))) for config in configs]
    found = [{file: name for file in files if (name := _matched(file.relative_to(top), one))} for one in told]
    if len(named := [one for one in found if one]) > 1:
        names = ", ".join(str(config.get("config_name")) for config, one in zip(configs, found, strict=True) if one)
        raise ValueError(
            f"README.md in {top} tells of {len(named)} data sets ({names}): choose one by --dataset_name {top} with "
            "--dataset_config_name."
        )
    return named[0] if named else {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _patterns(data_files: Any) -> list[tuple[str, str]]:
    """Each pattern of files, and its split."""
    entries = [one if isinstance(one, dict) else {"split": TRAIN, "path": one} for one in _listed(data_files)]
    return [
        (pattern, split_name(str(one.get("split", TRAIN)))) for one in entries for pattern in _listed(one.get("path"))
    ]


def _matched(path: PurePath, patterns: dict[str, str]) -> str | None:
    return next((split for pattern, split in patterns.items() if fnmatch(path.as_posix(), pattern)), None)
