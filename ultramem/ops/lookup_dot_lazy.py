"""`lookup_dot` on a table whose optimiser writes touched rows alone: stale rows are made up as they are read.

As in `lookup_reduce_lazy`, nothing is written, and it belongs to training.

Shapes: N rows, D row dim, T tokens, K slots a token (heads x top-m), U touched rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ultramem.ops import _checks as checks
from ultramem.ops._registration import opaque_op
from ultramem.ops._sparse_gradient import rows_gradient
from ultramem.ops.catch_up import LazyRows, catch_up_
from ultramem.ops.lookup_dot import _lookup_dot, lookup_dot_reference, require_lookup_dot
from ultramem.ops.lookup_reduce import _lookup_reduce, _lookup_reduce_backward
from ultramem.ops.lookup_reduce_lazy import fresh_rows


def lookup_dot_lazy_reference(rows_ND: Tensor, lazy: LazyRows, indices_TK: Tensor, query_TD: Tensor) -> Tensor:
    """The oracle: bring the whole table up to date, take the products with it."""
    with torch.no_grad():
        every_row = torch.arange(rows_ND.shape[0], device=rows_ND.device)
        owed_ND = catch_up_(rows_ND.clone(), lazy, every_row) - rows_ND
    return lookup_dot_reference(rows_ND + owed_ND, indices_TK, query_TD)


@opaque_op("ultramem::lookup_dot_lazy")
def _lookup_dot_lazy(
    rows_ND: Tensor,
    indices_TK: Tensor,
    query_TD: Tensor,
    schedule_S3: Tensor,
    step: Tensor,
    last_step_N: Tensor,
    exp_avg_ND: Tensor | None,
    exp_avg_sq_ND: Tensor | None,
    eps: float,
) -> Tensor:
    lazy = LazyRows(schedule_S3, step, last_step_N, exp_avg_ND, exp_avg_sq_ND, eps)
    fresh = fresh_rows(rows_ND, lazy, indices_TK % rows_ND.shape[0])  # the block does not matter
    dots_TK: Tensor = _lookup_dot(fresh.values_UD, fresh.indices_TK, query_TD.to(fresh.values_UD.dtype), False)
    return dots_TK.to(rows_ND.dtype)


@_lookup_dot_lazy.register_fake
def _(rows_ND: Tensor, indices_TK: Tensor, *_: Any) -> Tensor:
    return rows_ND.new_empty(indices_TK.shape)


@opaque_op("ultramem::lookup_dot_lazy_backward")
def _lookup_dot_lazy_backward(
    grad_TK: Tensor,
    rows_ND: Tensor,
    indices_TK: Tensor,
    query_TD: Tensor,
    schedule_S3: Tensor,
    step: Tensor,
    last_step_N: Tensor,
    exp_avg_ND: Tensor | None,
    exp_avg_sq_ND: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by touched row: rows [U] ascending, their gradients [U,D], and of the query [T,D]."""
    lazy = LazyRows(schedule_S3, step, last_step_N, exp_avg_ND, exp_avg_sq_ND, eps)
    fresh = fresh_rows(rows_ND, lazy, indices_TK % rows_ND.shape[0])  # the block does not matter
    dtype = fresh.values_UD.dtype
    weights_TK1 = grad_TK.to(dtype).unsqueeze(-1)
    grad_query_TD = _lookup_reduce(fresh.values_UD, fresh.indices_TK, weights_TK1, 1, False).squeeze(1)
    grad_UD, _ = _lookup_reduce_backward(
        query_TD.to(dtype).unsqueeze(1), fresh.values_UD, fresh.indices_TK, weights_TK1, True, False
    )
    return fresh.rows_U, grad_UD.to(rows_ND.dtype), grad_query_TD.to(query_TD.dtype)


@_lookup_dot_lazy_backward.register_fake
def _(grad_TK: Tensor, rows_ND: Tensor, indices_TK: Tensor, query_TD: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    touched = torch.library.get_ctx().new_dynamic_size()
    return (
        indices_TK.new_empty(touched),
        rows_ND.new_empty(touched, rows_ND.shape[1]),
        query_TD.new_empty(query_TD.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor | None, ...]:
    rows_ND, *others = ctx.saved_tensors
    touched, grads, grad_query = _lookup_dot_lazy_backward(grad_TK.contiguous(), rows_ND, *others, ctx.eps)
    grad_rows = rows_gradient(touched, grads, rows_ND) if ctx.needs_input_grad[0] else None
    return (grad_rows, None, grad_query, *(None,) * 6)


_lookup_dot_lazy.register_autograd(_backward, setup_context=_setup_context)


def lookup_dot_lazy(rows_ND: Tensor, lazy: LazyRows, indices_TK: Tensor, query_TD: Tensor) -> Tensor:
    """`lookup_dot` with the table that a dense optimiser would have by now: each row that is read is caught up first.

    Args:
        rows_ND: the physical table [N,D] with stale rows, float32, bfloat16 or float64.
        lazy: what the optimiser knows of them (`ultramem.optim.LazyAdamW.lazy_rows`).
        indices_TK: virtual indices [T,K], at least 0, int64.
        query_TD: [T,D] in the dtype of the table.

    Returns:
        [T,K] in the dtype of the table, with gradients into the query and, as a sparse COO tensor of the touched rows
        (unique, ascending), into the table.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: rank, shape or device differ.
    """
    require_lookup_dot(rows_ND, indices_TK, query_TD)
    n, d = rows_ND.shape
    checks.require_shape("lazy.last_step_N", lazy.last_step_N, (n,), "the rows of rows_ND")
    for name, moment in (("exp_avg_ND", lazy.exp_avg_ND), ("exp_avg_sq_ND", lazy.exp_avg_sq_ND)):
        if moment is not None:
            checks.require_shape(f"lazy.{name}", moment, (n, d), "that of rows_ND")
    dots_TK: Tensor = _lookup_dot_lazy(rows_ND, indices_TK.contiguous(), query_TD.contiguous(), *lazy)
    return dots_TK
