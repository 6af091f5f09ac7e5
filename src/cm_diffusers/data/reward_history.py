"""What reward fine-tuning has cost and gained so far, which checkpoints keep."""

import time

import torch
from torch import Tensor


COLUMNS = ("rollout", "passes", "seconds", "reward", "reward_std", "kl")


class RewardHistory:
    """A row for each roll-out, or batch, and for each look of the guard.

    Attributes:
        rows: Of `COLUMNS`; passes of the network and seconds are counted from the start of training.
        looks: What the guard saw, in its own columns.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[float, ...]] = []
        self.looks: list[tuple[float, ...]] = []
        self.since = time.perf_counter()

    def add(self, rollout: int, passes: int, rewards: tuple[float, float], kl: float) -> None:
        """
        Args:
            rollout: Its number.
            passes: Of the network, one with a gradient counting three times.
            rewards: Mean and deviation.
            kl: Divergence from the model before training.
        """
        now = time.perf_counter()
        _, passes_before, seconds_before, *_ = self.rows[-1] if self.rows else (0.0,) * len(COLUMNS)
        self.rows.append((rollout, passes_before + passes, seconds_before + now - self.since, *rewards, kl))
        self.since = now

    def state(self) -> dict[str, Tensor]:
        tables = {"history": self.rows, "looks": self.looks}
        return {name: torch.tensor(rows, dtype=torch.float64) for name, rows in tables.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.rows, self.looks = ([tuple(row) for row in tensors[name].tolist()] for name in ("history", "looks"))
