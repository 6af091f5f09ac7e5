"""WebDataset tar shards: samples are runs of members that share their name up to the first dot.

Where that dot is one of a name such as `bag 2.0.png`, they share it up to the last one.
"""

import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import datasets
from datasets.utils.file_utils import xopen
from fsspec import get_filesystem_class
from fsspec.core import url_to_fs

from cm_diffusers.data.file_names import CAPTION_SUFFIXES, IMAGE_SUFFIXES, is_hidden, suffix_of
from cm_diffusers.data.found import SHOWN
from cm_diffusers.errors import UserError


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
        raise UserError(
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
        raise UserError(
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
            raise UserError(f"The shard {shard} cannot be read as a tar file ({error}); get it anew.") from error


def _rows_of(shard: str, image_column: str, caption_column: str) -> Iterator[dict[str, Any]]:
    with xopen(shard, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as archive:
        for run in runs(archive, image_column, archive):
            yield from (_row(*sample, image_column, caption_column) for sample in run.samples(image_column))


def samples_of(content: bytes, image_column: str, caption_column: str) -> list[dict[str, Any]]:
    """As `tar_rows`, of a piece of a tar; nothing of what is none."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            found = list(runs(archive, image_column, archive))
    except tarfile.ReadError:
        return []
    return [_row(*sample, image_column, caption_column) for run in found for sample in run.samples(image_column)]


@dataclass
class Run:
    """Members that follow one another and share a name up to the first dot.

    Attributes:
        key: That name.
        fields: What follows the dot in each -> its content, empty where nobody reads it.
        start, end: Its first byte in the tar, and the one after its last.
        members: Name, size and time of each.
    """

    key: str
    fields: dict[str, bytes]
    start: int
    end: int
    members: list[tuple[str, int, float]]

    def samples(self, image_column: str) -> Iterator[tuple[str, dict[str, bytes]]]:
        return _samples(self.key, self.fields, image_column)


def runs(archive: tarfile.TarFile, image_column: str, reader: tarfile.TarFile | None) -> Iterator[Run]:
    """
    Args:
        reader: Reads the members; None where their names suffice.
    """
    run = None
    for member in archive:
        path = PurePosixPath(member.name)
        if member.isdir() or is_hidden(path):
            continue
        name, _, field = path.name.partition(".")
        found = str(path.with_name(name))
        if run is None or found != run.key or field in run.fields:
            if run is not None:
                yield run
            run = Run(found, {}, member.offset, 0, [])
        wanted = reader and member.isfile() and (field == image_column or _suffix(field) in READ_SUFFIXES)
        run.fields[field] = reader.extractfile(member).read() if wanted else b""
        run.end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        run.members.append((member.name, member.size, member.mtime))
    if run is not None:
        yield run


@dataclass
class Lacks:
    """Samples that lack an image or a caption, by the names of their members.

    Attributes:
        reasons: Reason -> how many, and the names of the first.
        fields: What samples hold that lack something, of the first.
        samples: Number of all, with those that lack nothing.
    """

    reasons: dict[str, tuple[int, list[str]]]
    fields: list[str]
    samples: int

    def has_all(self, key: str, fields: Iterable[str], image_column: str) -> bool:
        """Whether a sample has both; counted here if not."""
        self.samples += 1
        has_image = any(_is_image(field, image_column) for field in fields)
        if has_image and any(_suffix(field) in TEXT_SUFFIXES for field in fields):
            return True
        reason = "samples without a caption" if has_image else "samples without an image"
        number, names = self.reasons.get(reason, (0, []))
        self.reasons[reason] = number + 1, [*names, key] if number < SHOWN else names
        if (held := ", ".join(fields)) not in self.fields and len(self.fields) < SHOWN:
            self.fields.append(held)
        return False

    @classmethod
    def together(cls, parts: Iterable[list[Any]]) -> "Lacks":
        """Of several shards, as `list(...)` had them."""
        whole = cls({}, [], 0)
        for reasons, fields, samples in parts:
            for reason, (more, names) in reasons.items():
                number, known = whole.reasons.get(reason, (0, []))
                whole.reasons[reason] = number + more, [*known, *names][:SHOWN]
            whole.fields = list(dict.fromkeys([*whole.fields, *fields]))[:SHOWN]
            whole.samples += samples
        return whole


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
