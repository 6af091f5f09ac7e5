"""One clear sentence for data that cannot be read."""

from collections.abc import Iterator
from contextlib import contextmanager

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
