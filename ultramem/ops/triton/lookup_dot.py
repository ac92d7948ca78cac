"""Launch of lookup_dot: the dot products of a query with looked-up rows are the score gradient of lookup_reduce."""

from __future__ import annotations

from torch import Tensor

from ultramem.ops.triton.score_gradient import score_gradient


def lookup_dot(rows_ND: Tensor, row_TK: Tensor, query_TD: Tensor) -> Tensor:
    """[T,K]; `row_TK` in [0, N), for the kernel knows one block here."""
    like_TK1 = query_TD.new_empty(row_TK.shape).unsqueeze(-1)
    return score_gradient(query_TD.unsqueeze(1), rows_ND, row_TK, like_TK1).squeeze(-1)
