"""Dot products of a token's query with the rows that its slots name: the input side of one-neuron experts.

Shapes: N rows, D row dim, T tokens, K slots a token (heads x top-m).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ultramem.ops import _checks as checks
from ultramem.ops._registration import traceable_op
from ultramem.ops._sparse_gradient import rows_gradient
from ultramem.ops.implementation import runs_native, runs_triton
from ultramem.ops.lookup_reduce import (
    _MODE_SUM,
    _lookup_reduce,
    _lookup_reduce_backward,
    _lookup_reduce_backward_rows,
)


def lookup_dot_reference(rows_ND: Tensor, indices_TK: Tensor, query_TD: Tensor) -> Tensor:
    """The oracle: gather every row, multiply, add up."""
    return (rows_ND[indices_TK % rows_ND.shape[0]] * query_TD.unsqueeze(1)).sum(-1)


@traceable_op("ultramem::lookup_dot")
def _lookup_dot(rows_ND: Tensor, indices_TK: Tensor, query_TD: Tensor, sparse_grad: bool) -> Tensor:
    row_TK = indices_TK % rows_ND.shape[0]
    if runs_triton(rows_ND):
        from ultramem.ops.triton import lookup_dot as kernels

        return kernels.lookup_dot(rows_ND, row_TK, query_TD)
    if runs_native(rows_ND):
        native_dots: Tensor = torch.ops.ultramem_native.lookup_dot(rows_ND, indices_TK, query_TD)
        return native_dots
    t, k = row_TK.shape
    if rows_ND.is_cuda and rows_ND.dtype == torch.bfloat16:  # aten has no such kernel
        products_TKD = rows_ND[row_TK].float() * query_TD.float().unsqueeze(1)
        return products_TKD.sum(-1).to(rows_ND.dtype)
    # The gradient of an embedding bag's weights is this very product, without a copy of the rows: token t is a bag
    # of K slots, and the query is the gradient of its sum.
    slots = torch.arange(t * k, device=row_TK.device)
    first = torch.arange(t, device=row_TK.device) * k
    dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        query_TD, rows_ND, row_TK.reshape(-1), first, slots // k, _MODE_SUM
    )
    return dots.view(t, k)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, indices, query, ctx.sparse_grad = inputs
    ctx.save_for_backward(rows, indices, query)


def _backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor | None, ...]:
    """Both gradients are lookups themselves: the query's pools rows weighted by `grad`, the rows' is that of pooling
    with weights `grad` into a sum whose gradient is the query."""
    rows, indices, query = ctx.saved_tensors
    row_TK, weights_TK1, query_T1D = indices % rows.shape[0], grad_TK.contiguous().unsqueeze(-1), query.unsqueeze(1)
    grad_rows = grad_query = None
    if ctx.needs_input_grad[0] and ctx.sparse_grad:
        touched_U, grads_UD, _ = _lookup_reduce_backward_rows(query_T1D, rows, row_TK, weights_TK1, False)
        grad_rows = rows_gradient(touched_U, grads_UD, rows)
    elif ctx.needs_input_grad[0]:
        grad_rows, _ = _lookup_reduce_backward(query_T1D, rows, row_TK, weights_TK1, True, False)
    if ctx.needs_input_grad[2]:
        grad_query = _lookup_reduce(rows, row_TK, weights_TK1, 1, False).squeeze(1)
    return grad_rows, None, grad_query, None


_lookup_dot.register_autograd(_backward, setup_context=_setup_context)


def lookup_dot(
    rows_ND: Tensor, indices_TK: Tensor, query_TD: Tensor, *, sparse_grad: bool = False, checked: bool = False
) -> Tensor:
    """Dot products with looked-up rows: `out[t,k] = <query[t], W[row(k)]>`.

    PEER's expert k computes `gelu(<x, down[row(k)]>) * up[row(k)]` (arXiv 2407.04153), UltraMemV2's
    `<W_pre x, pre[row(k)]>` times its value row (arXiv 2508.18756); `lookup_reduce` adds up what follows. A virtual
    index v names row `v % N`, as there; its block does not matter here.

    Args:
        rows_ND: the physical table W [N,D], float32, bfloat16, float16 or float64.
        indices_TK: virtual indices [T,K], at least 0, int64. Duplicates are computed each. T may be 0.
        query_TD: [T,D] in the dtype of the table.
        sparse_grad: the table's gradient is a sparse COO tensor of the touched rows (unique, ascending) instead of a
            dense [N,D].
        checked: read the indices and raise if one is negative. This waits for the device and cannot be traced;
            without it a negative index is undefined behaviour.

    Returns:
        [T,K] in the dtype of the table, added in float32 (float64 for a float64 table).

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: rank, shape or device differ, or (checked) an index is negative.
    """
    require_lookup_dot(rows_ND, indices_TK, query_TD)
    if checked:
        checks.require_in_range("indices_TK", indices_TK, torch.iinfo(torch.int64).max)
    dots_TK: Tensor = _lookup_dot(rows_ND.contiguous(), indices_TK.contiguous(), query_TD.contiguous(), sparse_grad)
    return dots_TK


def require_lookup_dot(rows_ND: Tensor, indices_TK: Tensor, query_TD: Tensor) -> None:
    """Raise unless the tensors are a table, indices and queries that belong together."""
    checks.require_tensor("rows_ND", rows_ND, ndim=2, shape="[N,D]")
    checks.require_tensor("indices_TK", indices_TK, ndim=2, shape="[T,K]")
    checks.require_tensor("query_TD", query_TD, ndim=2, shape="[T,D]")
    checks.require_floating("rows_ND", rows_ND)
    checks.require_int64("indices_TK", indices_TK)
    checks.require_same_dtype(rows_ND=rows_ND, query_TD=query_TD)
    checks.require_shape("query_TD", query_TD, (indices_TK.shape[0], rows_ND.shape[1]), "T of indices_TK, D of rows_ND")
    checks.require_same_device(rows_ND=rows_ND, indices_TK=indices_TK, query_TD=query_TD)
