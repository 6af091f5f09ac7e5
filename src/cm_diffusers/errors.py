"""One clear sentence for data that cannot be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets.exceptions import DatasetGenerationError


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Errors inside the block, of whatever library, become one ValueError: `what` cannot be read, and why."""
    try:
        yield
    except Exception as error:  # of datasets, huggingface_hub, httpx, fsspec, pyarrow, tarfile, zlib ...
        reason = error
        while isinstance(reason, DatasetGenerationError) and reason.__cause__:
            reason = reason.__cause__
        lines = str(reason).strip().splitlines() or [type(reason).__name__]
        raise ValueError(f"{what} cannot be read: {lines[0].rstrip('.: ')}.") from error


def read_text(path: Path) -> str:
    """The text of a file, without the mark that some editors put before it.

    Raises:
        ValueError: It is not in UTF-8.
    """
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is no text in UTF-8 (byte {error.object[error.start]:#04x} at place {error.start}), save it as such"
        ) from error
