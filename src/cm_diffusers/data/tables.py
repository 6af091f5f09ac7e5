"""Texts and tables that users write: captions and prompts stay the texts they are, whatever they look like."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from cm_diffusers.errors import read_text


MARK = "\ufeff"  # that Windows puts before a text
TABLE_SUFFIXES = (".jsonl", ".csv", ".parquet")


def read_lines(path: Path) -> list[str]:
    """The lines of a text, stripped; only a line break ends one. Each may begin with a mark, of files put together.

    Raises:
        ValueError: As `read_text`.
    """
    return [line.lstrip(MARK).strip() for line in read_text(path).removesuffix("\n").split("\n")]


def read_table(path: Path, texts: Sequence[str]) -> pa.Table:
    """A .jsonl, .csv or .parquet file.

    Args:
        path: Its suffix says what it is.
        texts: Columns that hold texts, even where all look like numbers or dates.

    Raises:
        ValueError: Not UTF-8, a line that is no object, two columns of one name, or a column of texts that holds something else beside them.
        pyarrow.ArrowInvalid: Damaged.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        table = parquet.read_table(path)
    else:
        table = _from_csv(path, texts) if suffix == ".csv" else _from_json_lines(path, texts)
    if twice := [name for name, number in Counter(table.column_names).items() if number > 1]:
        raise ValueError(f"it has several columns named {', '.join(twice)}, give each a name of its own")
    return table


def _from_csv(path: Path, texts: Sequence[str]) -> pa.Table:
    content = read_text(path).encode()
    return csv.read_csv(
        pa.BufferReader(content),
        csv.ReadOptions(block_size=min(max(len(content), 1), 2**31 - 1)),  # one: a text with line breaks stays whole
        csv.ParseOptions(newlines_in_values=True),
        csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string())),
    )


def _from_json_lines(path: Path, texts: Sequence[str]) -> pa.Table:
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if line:
            rows.append(_parsed(line, number))
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _column([row.get(name) for row in rows], name, name in texts) for name in names})


def _parsed(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} must be an object such as {{...}}, but it is {type(row).__name__}")
    return row


def _column(values: list[Any], name: str, of_texts: bool) -> pa.Array:
    if any(isinstance(value, list) for value in values):  # a row may hold one text where others hold several
        values = [[value] if isinstance(value, str) else value for value in values]
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError) as error:
        if of_texts:
            kinds = ", ".join(sorted({type(value).__name__ for value in values}))
            raise ValueError(f"its column {name} must hold texts, but it holds {kinds}") from error
        return pa.array([json.dumps(value) for value in values])  # what nobody reads may be of several kinds
