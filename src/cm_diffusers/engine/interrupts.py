"""SIGINT, SIGTERM and the end of the launcher as requests to stop at the end of the current step."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


OF_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")  # which torchrun and `accelerate launch` set
LAUNCHER = os.getppid() if any(name in os.environ for name in OF_LAUNCHERS) else None


class StopRequest:
    """Which signal arrived, or None."""

    signum: int | None = None

    def note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:  # a second one means now
            raise KeyboardInterrupt
        self.signum = signum

    @property
    def arrived(self) -> bool:
        """Also when a launcher that was killed can no longer send one."""
        return self.signum is not None or (LAUNCHER is not None and os.getppid() != LAUNCHER)


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
