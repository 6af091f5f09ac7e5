"""Every tried vector in a file, a line each, from which an interrupted search goes on."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cm_diffusers.errors import UserError, writable
from cm_diffusers.evaluation.report import Row


LOG = "search.jsonl"


@dataclass(frozen=True)
class Entry:
    """One evaluation.

    Attributes:
        name: Of a baseline, or "search".
        vector: The coefficients.
        value: What is to be least.
        seconds: That it took.
        rows: All columns, for each number of steps.
    """

    name: str
    vector: list[float]
    value: float
    seconds: float
    rows: list[Row]


class SearchLog:
    """Answers for the vectors that the file holds, in their order, and evaluates and appends those that come after.

    What asks must be a function of its seed and of the answers, so that a resumed search is the straight one.

    Args:
        path: Of the file; its first line is the identity.
        identity: All that a value, or the order of the vectors, depends on.

    Raises:
        ValueError: The file is of another search.
    """

    def __init__(self, path: Path, identity: dict[str, object]) -> None:
        self.path, self.entries = path, []
        identity = json.loads(json.dumps(identity))
        lines = _whole_lines(path)
        if lines and (odd := sorted(k for k in identity.keys() | lines[0] if identity.get(k) != lines[0].get(k))):
            raise UserError(
                f"{path} is of another search: {odd[0]} was {lines[0].get(odd[0])}, and now is {identity.get(odd[0])}; give the "
                "flags of then, or another --output_dir."
            )
        self.known = [Entry(**line) for line in lines[1:]]
        with writable(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.partial")
            aside.write_text("".join(json.dumps(line) + "\n" for line in lines or [identity]), "utf-8")
            aside.replace(path)

    def evaluate(
        self, name: str, vector: np.ndarray, measure: Callable[[np.ndarray], tuple[float, list[Row]]]
    ) -> Entry:
        """
        Args:
            measure: vector -> value and rows.

        Raises:
            ValueError: The file holds another vector in this place, or cannot be written.
        """
        if len(self.entries) < len(self.known):
            entry = self.known[len(self.entries)]
            if (entry.name, entry.vector) != (name, vector.tolist()):
                raise UserError(
                    f"{self.path} tried other vectors from line {len(self.entries) + 2} on, with other releases of this package, "
                    "numpy or cma: give another --output_dir."
                )
        else:
            started = time.perf_counter()
            value, rows = measure(vector)
            entry = Entry(name, vector.tolist(), value, time.perf_counter() - started, rows)
            with writable(str(self.path)), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(entry)) + "\n")
        self.entries.append(entry)
        return entry


def _whole_lines(path: Path) -> list[dict]:
    """Without a last one that an interrupt has cut; none where there is no file."""
    lines = path.read_text("utf-8").split("\n")[:-1] if path.is_file() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): give another --output_dir.") from error
