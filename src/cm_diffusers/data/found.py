"""What a data source found, and all that it leaves out: said once in the log, and kept for who wants to show it."""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice


logger = logging.getLogger(__name__)
SHOWN = 3  # names kept of each reason
LONGEST = 80  # characters of a name that are shown


@dataclass
class Counted:
    """How many there are of something, and the names of the first."""

    number: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, names: Iterable[str], number: int) -> None:
        self.number += number
        self.names += islice(names, SHOWN - len(self.names))

    def __str__(self) -> str:
        shown = [name if len(name) <= LONGEST else f"{name[:LONGEST]}..." for name in self.names]
        return f"{self.number} ({', '.join(shown)}{', ...' if self.number > len(shown) else ''})"


@dataclass
class Found:
    """What a data source trains on, and what it leaves out.

    Attributes:
        source: What the data was called on the command line.
        images: Number of images, clips or samples that are trained on; None where only reading on will tell.
        captions: Number of distinct texts among them; None where there are none, or only reading on will tell.
        kind: What is counted: "images", "clips" or "samples".
        skipped: Reason -> what is left out for it.
        remarks: What is trained on, but perhaps not as it was meant -> what.
        aloud: Whether each reason is told the 1st, 10th, 100th ... time, since only reading on will tell.
    """

    source: str
    images: int | None = None
    captions: int | None = None
    kind: str = "images"
    skipped: dict[str, Counted] = field(default_factory=dict)
    remarks: dict[str, Counted] = field(default_factory=dict)
    aloud: bool = False

    def skip(self, reason: str, names: Iterable[str], number: int | None = None) -> None:
        """Counts what is left out: `number` of them, or as many as there are names."""
        self._add(self.skipped, f"left out, {reason}", reason, names, number)

    def remark(self, reason: str, names: Iterable[str], number: int | None = None) -> None:
        """Counts what is trained on, but perhaps not as it was meant."""
        self._add(self.remarks, reason, reason, names, number)

    def lines(self) -> list[str]:
        """A line for each reason: "left out, images that cannot be read: 2 (a.png, b.png)"."""
        left_out = [f"left out, {reason}: {counted}" for reason, counted in self.skipped.items()]
        return left_out + [f"{reason}: {counted}" for reason, counted in self.remarks.items()]

    def __str__(self) -> str:
        counts = {self.kind: self.images, "captions": self.captions}
        known = " and ".join(f"{number} {name}" for name, number in counts.items() if number is not None)
        return "; ".join([f"{self.source}: {known or self.kind} to train on", *self.lines()]) + "."

    def report(self) -> None:
        """One line in the log of the first process, a warning where something is left out or remarkable."""
        if int(os.environ.get("RANK", "0")) == 0:
            logger.log(logging.WARNING if self.lines() else logging.INFO, "%s", self)

    def _add(
        self, counts: dict[str, Counted], told: str, reason: str, names: Iterable[str], number: int | None
    ) -> None:
        names = list(names)
        if number := len(names) if number is None else number:
            counted = counts.setdefault(reason, Counted())
            before = counted.number
            counted.add(names, number)
            if self.aloud and (not before or len(str(before)) < len(str(counted.number))):
                logger.warning("%s, so far %s: %s.", self.source, told, counted)
