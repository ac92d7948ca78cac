"""The lookup on a table whose optimiser writes touched rows alone: stale rows are made up as they are read.

Nothing is written, so the op is as safe as any lookup: several layers may share the table, gradients may be
accumulated, evaluation sees the same rows as training. It belongs to training and is opaque to every compiler.

Shapes: N rows, D value dim, T tokens, K slots a token (heads x top-m), C cores, E blocks, U touched rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ultramem.ops import _checks as checks
from ultramem.ops._registration import opaque_op
from ultramem.ops._sparse_gradient import rows_gradient
from ultramem.ops.catch_up import LazyRows, catch_up_, catch_up_rows
from ultramem.ops.lookup_reduce import (
    _lookup_reduce,
    _lookup_reduce_backward,
    lookup_reduce_reference,
    require_lookup,
)


def lookup_reduce_lazy_reference(
    values_ND: Tensor, lazy: LazyRows, indices_TK: Tensor, scores_TKC: Tensor, *, num_blocks: int = 1
) -> Tensor:
    """The oracle: bring the whole table up to date, look up in it."""
    with torch.no_grad():
        every_row = torch.arange(values_ND.shape[0], device=values_ND.device)
        owed_ND = catch_up_(values_ND.clone(), lazy, every_row) - values_ND
    return lookup_reduce_reference(values_ND + owed_ND, indices_TK, scores_TKC, num_blocks=num_blocks)


class FreshRows(NamedTuple):
    """The lookup moved to a table of the touched rows alone."""

    rows_U: Tensor
    """Ascending."""
    values_UD: Tensor
    """Up to date, in the dtype in which rows are added up."""
    indices_TK: Tensor
    """In [0, U*E)."""


def fresh_rows(values_ND: Tensor, lazy: LazyRows, indices_TK: Tensor) -> FreshRows:
    n = values_ND.shape[0]
    rows_U, position_TK = torch.unique(indices_TK % n, return_inverse=True)
    fresh_UD = catch_up_rows(values_ND, lazy, rows_U)
    return FreshRows(rows_U, fresh_UD, position_TK + indices_TK // n * rows_U.shape[0])


@opaque_op("ultramem::lookup_reduce_lazy")
def _lookup_reduce_lazy(
    values_ND: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    num_blocks: int,
    schedule_S3: Tensor,
    step: Tensor,
    last_step_N: Tensor,
    exp_avg_ND: Tensor | None,
    exp_avg_sq_ND: Tensor | None,
    eps: float,
) -> Tensor:
    lazy = LazyRows(schedule_S3, step, last_step_N, exp_avg_ND, exp_avg_sq_ND, eps)
    fresh = fresh_rows(values_ND, lazy, indices_TK)
    scores_TKC = scores_TKC.to(fresh.values_UD.dtype)
    pooled_TED: Tensor = _lookup_reduce(fresh.values_UD, fresh.indices_TK, scores_TKC, num_blocks, False)
    return pooled_TED.to(values_ND.dtype)


@_lookup_reduce_lazy.register_fake
def _(values_ND: Tensor, indices_TK: Tensor, scores_TKC: Tensor, num_blocks: int, *lazy: Any) -> Tensor:
    return values_ND.new_empty(indices_TK.shape[0], num_blocks, values_ND.shape[1])


@opaque_op("ultramem::lookup_reduce_lazy_backward")
def _lookup_reduce_lazy_backward(
    grad_TED: Tensor,
    values_ND: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    schedule_S3: Tensor,
    step: Tensor,
    last_step_N: Tensor,
    exp_avg_ND: Tensor | None,
    exp_avg_sq_ND: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by touched row: rows [U] ascending, their gradients [U,D], and of the scores [T,K,C]."""
    lazy = LazyRows(schedule_S3, step, last_step_N, exp_avg_ND, exp_avg_sq_ND, eps)
    fresh = fresh_rows(values_ND, lazy, indices_TK)
    dtype = fresh.values_UD.dtype
    grad_UD, grad_scores_TKC = _lookup_reduce_backward(
        grad_TED.to(dtype), fresh.values_UD, fresh.indices_TK, scores_TKC.to(dtype), True
    )
    return fresh.rows_U, grad_UD.to(values_ND.dtype), grad_scores_TKC.to(scores_TKC.dtype)


@_lookup_reduce_lazy_backward.register_fake
def _(
    grad_TED: Tensor, values_ND: Tensor, indices_TK: Tensor, scores_TKC: Tensor, *lazy: Any
) -> tuple[Tensor, Tensor, Tensor]:
    touched = torch.library.get_ctx().new_dynamic_size()
    return (
        indices_TK.new_empty(touched),
        values_ND.new_empty(touched, values_ND.shape[1]),
        scores_TKC.new_empty(scores_TKC.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, scores, _, *state, ctx.eps = inputs
    ctx.save_for_backward(values, indices, scores, *state)


def _backward(ctx: Any, grad_TED: Tensor) -> tuple[Tensor | None, ...]:
    values, *others = ctx.saved_tensors
    rows, row_grads, grad_scores = _lookup_reduce_lazy_backward(grad_TED.contiguous(), values, *others, ctx.eps)
    grad_values = rows_gradient(rows, row_grads, values) if ctx.needs_input_grad[0] else None
    return (grad_values, None, grad_scores, *(None,) * 7)


_lookup_reduce_lazy.register_autograd(_backward, setup_context=_setup_context)


def lookup_reduce_lazy(
    values_ND: Tensor, lazy: LazyRows, indices_TK: Tensor, scores_TKC: Tensor, *, num_blocks: int = 1
) -> Tensor:
    """`lookup_reduce` of the table that a dense optimiser would have by now: each row that is read is caught up first.

    The table itself stays stale; its gradient, a sparse COO tensor of the touched rows (unique, ascending), is that of
    the rows as they were read.

    Args:
        values_ND: the physical table [N,D] with stale rows, float32, bfloat16 or float64.
        lazy: what the optimiser knows of them (`ultramem.optim.LazyAdamW.lazy_rows`).
        indices_TK: virtual indices [T,K] in [0, N*num_blocks), int64.
        scores_TKC: weights [T,K,C] in the dtype of the table or float32; C divides D.
        num_blocks: E, the virtual expansion.

    Returns:
        [T,E,D] in the dtype of the table, accumulated in float32 (float64 for a float64 table).

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: rank, shape or device differ, or C does not divide D.
    """
    require_lookup(values_ND, indices_TK, scores_TKC, num_blocks)
    n, d = values_ND.shape
    checks.require_shape("lazy.last_step_N", lazy.last_step_N, (n,), "the rows of values_ND")
    for name, moment in (("exp_avg_ND", lazy.exp_avg_ND), ("exp_avg_sq_ND", lazy.exp_avg_sq_ND)):
        if moment is not None:
            checks.require_shape(f"lazy.{name}", moment, (n, d), "that of values_ND")
    pooled_TED: Tensor = _lookup_reduce_lazy(
        values_ND, indices_TK.contiguous(), scores_TKC.contiguous(), num_blocks, *lazy
    )
    return pooled_TED
