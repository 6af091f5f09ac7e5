"""Conditions of which a mask says what is there: stored without padding, and padded again."""

from torch import Tensor


Tensors = dict[str, Tensor]
OF = " of "  # "tokens of mask": its rows are the places where the mask is, not the rows of the shard


def packed(conditions: Tensors) -> Tensors:
    """Each `(N, ...)`, but of those with a mask `(N, L)` for their L tokens, those that it shows, `(T, ...)` of all rows."""
    stored = {name: value for name, value in conditions.items() if _is_mask(name)}
    for name, value in conditions.items():
        if mask := _mask_of(name, conditions):
            stored[f"{name}{OF}{mask}"] = value[conditions[mask] != 0]
        else:
            stored[name] = value
    return stored


def row_of(stored: Tensors, row: int) -> Tensors:
    """One row of what was `packed`, each `(...)`; with zeros where the mask hides a token."""
    found = {}
    for key, value in stored.items():
        name, _, mask = key.partition(OF)
        if not mask:
            found[name] = value[row]
            continue
        shown = stored[mask][row] != 0
        start = int((stored[mask][:row] != 0).sum())
        found[name] = value.new_zeros(len(shown), *value.shape[1:])
        found[name][shown] = value[start : start + int(shown.sum())]
    return found


def is_by_row(name: str) -> bool:
    """Whether a stored tensor's first dimension is the rows of the shard."""
    return OF not in name


def blanked(conditions: Tensors) -> Tensors:
    """With zeros where a mask hides a token, as they come back from what was `packed`."""
    masks = {name: _mask_of(name, conditions) for name in conditions}
    return {
        name: _shown(value, conditions[masks[name]]) if masks[name] else value for name, value in conditions.items()
    }


def _is_mask(name: str) -> bool:
    return name.endswith("mask")


def _mask_of(name: str, conditions: Tensors) -> str | None:
    """The one mask of the length of a value of three or more dimensions; pooled embeddings may be as wide as it is long."""
    shape = conditions[name].shape
    fitting = [mask for mask, value in conditions.items() if _is_mask(mask) and value.shape == shape[:2]]
    return fitting[0] if len(fitting) == 1 and len(shape) > 2 else None


def _shown(value: Tensor, mask: Tensor) -> Tensor:
    return value.masked_fill((mask == 0).view(*mask.shape, *(1,) * (value.ndim - 2)), 0)
