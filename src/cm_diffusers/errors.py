"""What the user can mend has a class of its own; one clear sentence for what cannot be read, or written."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


logger = logging.getLogger(__name__)


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


@contextmanager
def writable(what: str, size: int = 0, advice: str = "make room, or name another place") -> Iterator[None]:
    """Errors of the disk inside the block become one ValueError: `what` cannot be written, and why.

    Args:
        size: Of it, in bytes; 0 if that is not known.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        of_safetensors = re.search(r"I/O error: (.+?) \(os error", str(error))
        reason = of_safetensors[1] if of_safetensors else getattr(error, "strerror", None)
        if reason is None:  # no error of the system: libraries raise OSError for other things, too
            raise
        needs = f" ({size / 2**20:,.1f} MiB are needed)" if size else ""
        raise UserError(f"{what} cannot be written: {reason}{needs}; {advice}.") from error


@contextmanager
def optional(what: str, told: str = "{} failed, and training goes on: {}") -> Iterator[None]:
    """Errors inside the block are a warning: what lies in it is less than the training, or the weights.

    Args:
        told: The warning, with places for `what` and for the reason.
    """
    try:
        yield
    except Exception as error:  # memory, a full disk, a server that is down ...
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        logger.warning(told.format(what, f"{type(error).__name__}: {reason}"))


def read_text(path: Path) -> str:
    """The text of a file, without the mark that some editors put before it.

    Raises:
        ValueError: It is not in UTF-8.
    """
    try:
        text = path.read_text("utf-8-sig")
        if "\0" in text:  # which UTF-16 without its mark would be read as
            raise UnicodeDecodeError("utf-8", text.encode(), place := text.index("\0"), place + 1, "zero byte")
        return text
    except UnicodeDecodeError as error:
        raise UserError(
            f"it is no text in UTF-8 (byte {error.object[error.start]:#04x} at place {error.start}), save it as such"
        ) from error
