"""What the user can mend has a class of its own; and one clear sentence for data that cannot be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something given is wrong; one sentence says what, what was found and what to do, and scripts print only that."""


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Errors inside the block, of whatever library, become one UserError: `what` cannot be read, and why."""
    try:
        yield
    except Exception as error:  # of datasets, huggingface_hub, httpx, fsspec, pyarrow, tarfile, zlib ...
        reason = error
        while type(reason).__name__ == "DatasetGenerationError" and reason.__cause__:  # of datasets, which is optional
            reason = reason.__cause__
        lines = str(reason).strip().splitlines() or [type(reason).__name__]
        raise UserError(f"{what} cannot be read: {lines[0].rstrip('.: ')}.") from error


def read_text(path: Path) -> str:
    """The text of a file, without the mark that some editors put before it.

    Raises:
        ValueError: It is not in UTF-8.
    """
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"it is no text in UTF-8 (byte {error.object[error.start]:#04x} at place {error.start}), save it as such"
        ) from error
