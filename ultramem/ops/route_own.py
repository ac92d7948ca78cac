"""Which slots of all ranks' tokens read rows of this rank: the lookup that an owner does on its own part of a table.

Shapes: S tokens of all ranks, K slots a token, N rows of the table, M slots of a token that are read here, at most,
U distinct rows that are read here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ultramem.ops import _checks as checks
from ultramem.ops._registration import opaque_op


class OwnSlots(NamedTuple):
    """The slots of each token that name a row of this rank, and padding."""

    rows_U: Tensor
    """Ascending, counted from the first row of this rank; int64."""
    position_SM: Tensor
    """Where a slot's row stands in `rows_U`; U for padding."""
    slot_SM: Tensor
    """Which of the token's K slots it is; 0 for padding."""


@opaque_op("ultramem::route_own")
def _route_own(rows_SK: Tensor, first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    is_own_SK = (rows_SK >= first) & (rows_SK < end)
    most = int(is_own_SK.sum(1).max()) if is_own_SK.numel() else 0
    slot_SM = (~is_own_SK).to(torch.uint8).sort(dim=1, stable=True).indices[:, :most]  # own slots first, in order
    is_own_SM = is_own_SK.gather(1, slot_SM)
    rows_U = torch.unique(rows_SK[is_own_SK])
    position_SM = torch.searchsorted(rows_U, rows_SK.gather(1, slot_SM))
    position_SM = torch.where(is_own_SM, position_SM, len(rows_U))
    return rows_U - first, position_SM, torch.where(is_own_SM, slot_SM, 0)


@_route_own.register_fake
def _(rows_SK: Tensor, first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    touched, most = context.new_dynamic_size(), context.new_dynamic_size()
    shape = rows_SK.shape[0], most
    return rows_SK.new_empty(touched), rows_SK.new_empty(shape), rows_SK.new_empty(shape)


def route_own(rows_SK: Tensor, *, first: int, end: int) -> OwnSlots:
    """Pick the slots whose row is in [first, end).

    Args:
        rows_SK: row of each slot [S,K], int64.
        first: row of the table that this rank's part begins with.
        end: the row after its last.

    Raises:
        TypeError: rows_SK is not int64.
        ValueError: rows_SK is no matrix, or `end` is not above `first`.
    """
    checks.require_tensor("rows_SK", rows_SK, ndim=2, shape="[S,K]")
    checks.require_int64("rows_SK", rows_SK)
    if not 0 <= first < end:
        raise ValueError(f"first and end must be 0 <= first < end, got {first} and {end}")
    return OwnSlots(*_route_own(rows_SK, first, end))
