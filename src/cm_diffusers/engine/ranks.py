"""Processes that write one thing together: each knows when another fails, so that none waits for it."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from torch import distributed as dist

from cm_diffusers.errors import UserError


T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """
    Attributes:
        rank: Of this process.
        size: How many take part; each calls the same methods in the same order.
        group: By which they talk; torch's own if None.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def patient(cls) -> "Ranks":
        """All processes of the launcher, which may wait a week for each other: torch's own give up after minutes.

        `PATIENCE` is shorter, for it also ends a training whose processes do not make the same passes. Here each has a share of
        its own, which on a slow device may take hours longer.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(timeout=timedelta(weeks=1), backend="gloo"))

    def each(self, act: Callable[[], T]) -> list[T]:
        """What it gives on every rank.

        Raises:
            ValueError: It failed elsewhere; here it raises what it raised.
        """
        result, failure = None, None
        try:
            result = act()
        except Exception as error:
            failure = error
        found = [(result, str(failure) if failure else None)]
        if self.size > 1:
            found *= self.size
            dist.all_gather_object(found, (result, str(failure) if failure else None), self.group)
        if failure:
            raise failure
        if told := [text for _, text in found if text is not None]:
            raise UserError(f"Another process stopped: {told[0]}")
        return [result for result, _ in found]

    def first(self, act: Callable[[], T]) -> T:
        """What it gives on the first rank, which alone calls it."""
        return self.each(act if self.rank == 0 else lambda: None)[0]
