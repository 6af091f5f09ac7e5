"""Conditions of which a mask says what is text: stored without padding, and padded again to the longest of a batch.

Networks that are told a mask see no padding, so its length does not matter to them. Others see it: what comes without a
mask keeps its length.
"""

import torch
from torch import Tensor


Tensors = dict[str, Tensor]
OF = " of "  # "tokens of mask": as many rows as all rows of the shard have tokens; "mask" then holds these numbers


def packed(conditions: Tensors) -> Tensors:
    """Each `(N, ...)`; a mask `(N, L)` and what it is of, `(N, L, ...)`, cut after the last token of each row that it shows.

    These become `(T, ...)`, T tokens of all rows.
    """
    stored = {}
    for name, value in conditions.items():
        if mask := _mask_of(name, conditions):
            stored[mask] = lengths = _lengths(conditions[mask])
            stored[f"{name}{OF}{mask}"] = value[torch.arange(value.shape[1], device=value.device) < lengths[:, None]]
        else:
            stored[name] = value
    return stored


def row_of(stored: Tensors, row: int) -> Tensors:
    """One row of what was `packed`, each `(1, ...)`."""
    found = {}
    for key, value in stored.items():
        name, _, mask = key.partition(OF)
        if mask:
            start, length = int(stored[mask][:row].sum()), int(stored[mask][row])
            found[name] = value[None, start : start + length]
        elif f"{key}{OF}{key}" not in stored:
            found[name] = value[row : row + 1]
    return found


def is_by_row(name: str) -> bool:
    """Whether a stored tensor's first dimension is the rows of the shard."""
    return OF not in name


def joined(parts: list[Tensors]) -> Tensors:
    """Conditions `(N, ...)` one after the other; where there is a mask, with zeros after those that are shorter."""
    masked = any(map(_is_mask, parts[0]))
    rows = {name: [part[name] for part in parts] for name in parts[0]}
    return {name: torch.cat(_as_long(values) if masked else values) for name, values in rows.items()}


def trimmed(conditions: Tensors) -> Tensors:
    """With zeros for what a mask hides, and cut after the last token that it shows of any row."""
    found = dict(conditions)
    for name, value in conditions.items():
        if mask := _mask_of(name, conditions):
            hidden = (conditions[mask] == 0).view(*value.shape[:2], *(1,) * (value.ndim - 2))
            found[name] = value.masked_fill(hidden, 0)[:, : int(_lengths(conditions[mask]).max())]
    return found


def _is_mask(name: str) -> bool:
    return name.endswith("mask")


def _mask_of(name: str, conditions: Tensors) -> str | None:
    """The one mask that is as long as a value of three or more dimensions; a mask is its own.

    Pooled embeddings may be as wide as a mask is long, and masks of two towers as long as each other.
    """
    shape = conditions[name].shape
    fitting = [mask for mask, value in conditions.items() if _is_mask(mask) and value.shape == shape[:2]]
    return fitting[0] if len(fitting) == 1 and (len(shape) > 2 or _is_mask(name)) else None


def _lengths(mask: Tensor) -> Tensor:
    """Of each row `(N,)`, the tokens up to the last that the mask `(N, L)` shows; at least 1."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return ((mask != 0) * places).amax(dim=1).clamp(min=1)


def _as_long(values: list[Tensor]) -> list[Tensor]:
    if values[0].ndim == 1:
        return values
    longest = max(value.shape[1] for value in values)
    ends = [value.new_zeros(len(value), longest - value.shape[1], *value.shape[2:]) for value in values]
    return [torch.cat(pair, dim=1) for pair in zip(values, ends, strict=True)]
