"""The random state of passes."""

from collections.abc import Iterator
from contextlib import contextmanager

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
