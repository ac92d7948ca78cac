"""Ranks that would not do the same thing do not start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from ultramem.runtime.distributed.ranks import Ranks


def require_agreement(ranks: Ranks, description: dict[str, Any]) -> None:
    """Raise on every rank unless all were given the same description of the run.

    Raises:
        ValueError: names the first field that differs, with its values by rank.
    """
    if ranks.size == 1:
        return
    seen: list[Any] = [None] * ranks.size
    dist.all_gather_object(seen, flatten(description))
    if difference := first_difference(seen):
        raise ValueError(difference)


def first_difference(seen: Sequence[dict[str, Any]]) -> str | None:
    """The first field, of the flat descriptions of all ranks, that differs, in words; None if none does."""
    for name in {name: None for fields in seen for name in fields}:
        values = [fields.get(name) for fields in seen]
        if any(value != values[0] for value in values):
            by_rank = ", ".join(f"{value!r} on rank {rank}" for rank, value in enumerate(values))
            return f"{name} must be the same on all ranks, got {by_rank}"
    return None


def flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dots in its names."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
