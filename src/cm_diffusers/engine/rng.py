"""Random state on whichever device a pass runs."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def rewind_rng(device: torch.device) -> Iterator[None]:
    """Put the generator of `device` back at the end, so that the next pass draws the same dropout masks."""
    module = torch if device.type == "cpu" else getattr(torch, device.type)
    which = (
        (device,) if device.index is not None and device.type != "mps" else ()
    )  # or the only one, or the current one
    state = module.get_rng_state(*which)
    try:
        yield
    finally:
        module.set_rng_state(state, *which)


def seed_everything(*entropy: int) -> None:
    """Seed Python, NumPy and torch (all devices) from a tuple such as (seed, rank, step)."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
