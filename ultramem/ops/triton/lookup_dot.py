"""Launch of lookup_dot: the dot products of a query with looked-up rows are the score gradient of lookup_reduce."""

from __future__ import annotations

import triton
from torch import Tensor
from torch.library import wrap_triton

from ultramem.ops.triton._launch import refuse_float64
from ultramem.ops.triton.lookup_reduce import SCORE_SLOTS, score_gradient_kernel, score_gradient_launch


def lookup_dot(rows_ND: Tensor, row_TK: Tensor, query_TD: Tensor) -> Tensor:
    """[T,K]; `row_TK` in [0, N), for the kernel knows one block here."""
    refuse_float64(rows_ND=rows_ND, query_TD=query_TD)
    n, d = rows_ND.shape
    t, k = row_TK.shape
    dots_TK = rows_ND.new_empty(t, k)
    if dots_TK.numel() == 0:
        return dots_TK
    launch = score_gradient_launch(int(d), 1, 1)
    wrap_triton(score_gradient_kernel)[(t, triton.cdiv(k, SCORE_SLOTS), 1)](
        query_TD, rows_ND, row_TK, dots_TK, n, k, **launch
    )
    return dots_TK
