"""SIGINT and SIGTERM as a request to stop at the end of the current step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Which signal arrived, or None."""

    signum: int | None = None

    def note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:  # a second one means now
            raise KeyboardInterrupt
        self.signum = signum


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catch the signals inside the block; the previous handlers return at its end."""
    request = StopRequest()
    previous = {s: signal.signal(s, request.note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
