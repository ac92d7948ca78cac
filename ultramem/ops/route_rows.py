"""Which rows a rank asks of which: its slots in the order of the rows' owners, each row once if wanted.

Shapes: T tokens, K slots a token, P ranks, U rows asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ultramem.ops import _checks as checks
from ultramem.ops._registration import opaque_op


class Route(NamedTuple):
    """The rows that a rank asks for."""

    rows_U: Tensor
    """Ascending, so those of one owner lie together; int64."""
    position_TK: Tensor
    """Where a slot's row stands in `rows_U`; int64."""
    counts_P: Tensor
    """Rows asked of each rank; int64."""


@opaque_op("ultramem::route_rows")
def _route_rows(
    rows_TK: Tensor, rows_per_rank: int, num_ranks: int, deduplicate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if deduplicate:
        rows_U, position_TK = torch.unique(rows_TK, return_inverse=True)
    else:
        rows_U, order = rows_TK.flatten().sort(stable=True)
        position_TK = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        position_TK = position_TK.view(rows_TK.shape)
    ends = torch.arange(1, num_ranks + 1, device=rows_TK.device) * rows_per_rank
    counts_P = torch.searchsorted(rows_U, ends).diff(prepend=ends.new_zeros(1))
    return rows_U, position_TK, counts_P


@_route_rows.register_fake
def _(rows_TK: Tensor, rows_per_rank: int, num_ranks: int, deduplicate: bool) -> tuple[Tensor, Tensor, Tensor]:
    asked = torch.library.get_ctx().new_dynamic_size() if deduplicate else rows_TK.numel()
    return rows_TK.new_empty(asked), rows_TK.new_empty(rows_TK.shape), rows_TK.new_empty(num_ranks)


def route_rows(rows_TK: Tensor, *, rows_per_rank: int, num_ranks: int, deduplicate: bool = True) -> Route:
    """Sort the rows of all slots by owner: rank `p` owns rows `p * rows_per_rank` up to the next rank's first.

    Args:
        rows_TK: row of each slot [T,K], at least 0, int64.
        rows_per_rank: of all ranks but the last, which may own fewer.
        num_ranks: P.
        deduplicate: name each row once, however many slots read it.

    Raises:
        TypeError: rows_TK is not int64.
        ValueError: rows_TK is no matrix, or a number is below 1.
    """
    checks.require_tensor("rows_TK", rows_TK, ndim=2, shape="[T,K]")
    checks.require_int64("rows_TK", rows_TK)
    checks.require_positive("rows_per_rank", rows_per_rank)
    checks.require_positive("num_ranks", num_ranks)
    return Route(*_route_rows(rows_TK, rows_per_rank, num_ranks, deduplicate))
