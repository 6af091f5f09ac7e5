"""What the benchmarks share: interleaved timing, and reports written whole."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(action: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock time of an action, and the CPU time of this process in it."""
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def interleaved(
    actions: dict[str, Callable[[], object]], repeats: int, reset: Callable[[], object]
) -> dict[str, list[tuple[float, float]]]:
    """`seconds` of every action in each of `repeats` rounds, after three rounds that do not count."""
    measured = {name: [] for name in actions}
    for _ in range(repeats + 3):
        for name, action in actions.items():
            measured[name].append(seconds(action))
            reset()
    return {name: values[3:] for name, values in measured.items()}


def ratio(times: dict[str, list[tuple[float, float]]], name: str, others: list[str], clock: int) -> float:
    """Of one thing to the sum of others, the median over the rounds; by the wall (clock 0) or in CPU time (1)."""
    rounds = zip(times[name], *(times[other] for other in others), strict=True)
    return median(one[clock] / sum(part[clock] for part in parts) for one, *parts in rounds)


def write_report(folder: Path, name: str, table: str, numbers: dict) -> None:
    """`name`.md and `name`.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in ((f"{name}.md", table), (f"{name}.json", json.dumps(numbers, indent=1) + "\n")):
        (folder / f".{file}.partial").write_text(text, "utf-8")
        os.replace(folder / f".{file}.partial", folder / file)
