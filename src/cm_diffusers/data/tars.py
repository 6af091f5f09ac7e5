"""WebDataset tar shards: samples are runs of members that share their name up to the first dot.

Where that dot is one of a name such as `bag 2.0.png`, they share it up to the last one.
"""

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import datasets
from datasets.utils.file_utils import xopen
from fsspec import get_filesystem_class
from fsspec.core import url_to_fs

from cm_diffusers.data.file_names import CAPTION_SUFFIXES, IMAGE_SUFFIXES, is_hidden, suffix_of


FIELDS = "__fields__"  # column that names what a sample holds, for error messages
FAULT = "__fault__"  # column that says what of a sample is not read, although it seems meant to be
TAR_ROWS = 3  # in the key of what `datasets` keeps: raise it when `tar_rows` changes
TEXT_SUFFIXES = (*CAPTION_SUFFIXES, ".json")
WORD = re.compile(r"[A-Za-z_]\w*(\.\w+)*")  # how a field's name begins that says what it holds, as in `depth.png`
READ_SUFFIXES = IMAGE_SUFFIXES | {*TEXT_SUFFIXES}


def tar_shards(pattern: str) -> list[str]:
    """The shards a pattern names: a path or URL with `{00..12}`, `{a,b}` and `*`.

    Raises:
        ValueError: a shard that is named is not there, or a package that reads from such addresses is missing.
    """
    if "://" in pattern:
        _check_protocol(pattern)
    found = [(name, _matches(name)) for name in _expand_braces(os.path.expanduser(pattern))]
    if missing := [name for name, shards in found if not shards]:
        raise ValueError(
            f"--train_shards_path_or_url {pattern} names {len(found)} shards or patterns, of which {len(missing)} are "
            f"not there, such as {missing[0]}; give the tar files that exist."
        )
    return [shard for _, shards in found for shard in shards]


def _check_protocol(pattern: str) -> None:
    protocol = pattern.partition("://")[0]
    try:
        get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        advice = "pip install 'cm_diffusers[streaming]'" if protocol in ("http", "https") else str(error)
        raise ValueError(
            f"--train_shards_path_or_url {pattern} needs a package that reads {protocol} addresses, which is missing: "
            f"{advice.rstrip('.')}."
        ) from error


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    choices = match[1].split(",")
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        choices = [str(i).zfill(len(bounds[1])) for i in range(int(bounds[1]), int(bounds[2]) + 1)]
    return [
        name
        for choice in choices
        for name in _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


def _matches(name: str) -> list[str]:
    if "://" not in name:
        return [name] if os.path.isfile(name) else sorted(filter(os.path.isfile, glob.glob(name)))
    if "*" not in name:
        return [name]  # asking the server about each of thousands would take minutes
    file_system, path = url_to_fs(name)
    return sorted(map(file_system.unstrip_protocol, file_system.glob(path)))


def tar_features(image_column: str, caption_column: str) -> datasets.Features:
    """Of the rows of `tar_rows`."""
    text = datasets.Value("string")
    columns = {image_column: datasets.Image(decode=False), caption_column: [text]}
    return datasets.Features(columns | {FIELDS: text, FAULT: text})


def tar_rows(shards: list[str], image_column: str, caption_column: str) -> Iterator[dict[str, Any]]:
    """A row for each sample: the image undecoded, the captions, under `FIELDS` what it holds, under `FAULT` what is wrong.

    The image is the member named `image_column`, else the first whose suffix says so. The captions are the entry
    `caption_column` of the .json, else the .txt or .caption. Neither is required: what lacks one is counted by who reads the rows,
    and samples may differ in their members and in their .json.

    Raises:
        ValueError: a shard is missing, cut off or not a tar file.
    """
    for shard in shards:
        try:
            yield from _rows_of(shard, image_column, caption_column)
        except (FileNotFoundError, tarfile.ReadError) as error:
            raise ValueError(f"The shard {shard} cannot be read as a tar file ({error}); get it anew.") from error


def _rows_of(shard: str, image_column: str, caption_column: str) -> Iterator[dict[str, Any]]:
    def rows(key: str, members: dict[str, bytes]) -> Iterator[dict[str, Any]]:
        for name, sample in _samples(key, members, image_column):
            yield _row(name, sample, image_column, caption_column)

    key, members = None, {}
    with xopen(shard, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if member.isdir() or is_hidden(path):
                continue
            name, _, field = path.name.partition(".")
            found = str(path.with_name(name))
            if found != key or field in members:
                yield from rows(key, members)
                members = {}
            key = found
            wanted = member.isfile() and (field == image_column or _suffix(field) in READ_SUFFIXES)
            members[field] = archive.extractfile(member).read() if wanted else b""
    yield from rows(key, members)


def _samples(key: str, members: dict[str, bytes], image_column: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of one run: one, unless what follows the first dot belongs to their names.

    It does where an image and a caption share it and it is no word, as in `bag 2.0.png`; or where several images have
    captions of their own, as those of `mr.smith` and `mr.jones`, and nothing has the bare name.
    """
    groups: dict[str, dict[str, bytes]] = {}
    for field, content in members.items():
        inner, dot, suffix = field.rpartition(".")
        groups.setdefault(inner, {})[suffix if dot else field] = content
    with_image = {inner for inner, fields in groups.items() if any(_is_image(f, image_column) for f in fields)}
    own = {inner for inner in with_image if any(_suffix(f) in TEXT_SUFFIXES for f in groups[inner])} - {""}
    numbers = {inner for inner in groups if inner and not WORD.fullmatch(inner)}
    apart = with_image if len(own) > 1 and "" not in groups else numbers if own & numbers else set()
    if rest := {field: content for field, content in members.items() if field.rpartition(".")[0] not in apart}:
        yield key, rest
    yield from ((f"{key}.{inner}", fields) for inner, fields in groups.items() if inner in apart)


def _suffix(field: str) -> str:
    return suffix_of(PurePosixPath(f".{field}")) or f".{field.lower()}"


def _is_image(field: str, image_column: str) -> bool:
    return field == image_column or _suffix(field) in IMAGE_SUFFIXES


def _row(key: str, members: dict[str, bytes], image_column: str, caption_column: str) -> dict[str, Any]:
    images = [field for field in members if _is_image(field, image_column)]
    images.sort(key=lambda field: field != image_column)
    record = {"bytes": members[images[0]], "path": f"{key}.{images[0]}"} if images else None
    metadata, faults = {}, []
    if content := next((content for field, content in members.items() if _suffix(field) == ".json"), b""):
        metadata = _parsed(content)
        if metadata is None:
            metadata, faults = {}, ["damaged .json files"]
    value = metadata.get(caption_column) or _text(members)
    values = value if isinstance(value, list) else [value]
    captions = [text for text in values if isinstance(text, str)]
    if value is None:
        faults.append("captions that are not UTF-8")
    elif any(not isinstance(text, str | None) for text in values):
        faults.append("captions that are no texts")
    if len(images) > 1 and images[0] != image_column:
        faults.append("further images of a sample, whose first is read")
    fields = ", ".join(f"{f} ({', '.join(metadata)})" if metadata and _suffix(f) == ".json" else f for f in members)
    return {image_column: record, caption_column: captions, FIELDS: fields, FAULT: next(iter(faults), None)}


def _text(members: dict[str, bytes]) -> str | None:
    """The caption in a member of its own; None where it is no text in UTF-8."""
    found = {_suffix(field): content for field, content in reversed(members.items())}
    content = next((found[suffix] for suffix in CAPTION_SUFFIXES if suffix in found), b"")
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _parsed(content: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(content.decode("utf-8-sig"))
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else {}
