"""Weighted pooling of value rows, per expansion block and scoring core: the one place where the table is read.

Shapes: N rows, D value dim, T tokens, K slots a token (heads x top-m), C cores, E blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ultramem.ops import _checks as checks
from ultramem.ops._registration import accumulation_dtype, opaque_op, traceable_op
from ultramem.ops._sparse_gradient import rows_gradient
from ultramem.ops.implementation import runs_native, runs_triton
from ultramem.ops.permute_addresses import _permute_addresses, native_permutation, require_seed


def lookup_reduce_reference(
    values_ND: Tensor, indices_TK: Tensor, scores_TKC: Tensor, *, num_blocks: int = 1
) -> Tensor:
    """The oracle: gather every row, weight it core by core, add it to its block."""
    n, d = values_ND.shape
    t, k, c = scores_TKC.shape
    rows_TKCX = values_ND[indices_TK % n].view(t, k, c, d // c)
    weighted_TKD = (rows_TKCX * scores_TKC.unsqueeze(-1)).reshape(t, k, d)
    member_TEK = (indices_TK // n).unsqueeze(1) == torch.arange(num_blocks, device=indices_TK.device).view(1, -1, 1)
    return torch.einsum("tek,tkd->ted", member_TEK.to(weighted_TKD.dtype), weighted_TKD).to(values_ND.dtype)


@traceable_op("ultramem::lookup_reduce")
def _lookup_reduce(
    values_ND: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    num_blocks: int,
    sparse_grad: bool,
    permutation_seed: int | None = None,
) -> Tensor:
    if runs_triton(values_ND):
        from ultramem.ops.triton import lookup_reduce as kernels

        return kernels.lookup_reduce(values_ND, indices_TK, scores_TKC, num_blocks, permutation_seed)
    n, d = values_ND.shape
    if runs_native(values_ND):
        pooled_TED: Tensor = torch.ops.ultramem_native.lookup_reduce(
            values_ND, indices_TK, scores_TKC, num_blocks, _native_numbers(n * num_blocks, permutation_seed)
        )
        return pooled_TED
    indices_TK = _permuted(indices_TK, n * num_blocks, permutation_seed)
    t, _, c = scores_TKC.shape
    bags = _bags(n, indices_TK, scores_TKC.to(values_ND.dtype), num_blocks)
    pooled = torch.nn.functional.embedding_bag(
        bags.rows, values_ND.view(n * c, d // c), bags.first, mode="sum", per_sample_weights=bags.weights
    )
    return pooled.view(t, c, num_blocks, d // c).transpose(1, 2).reshape(t, num_blocks, d)


def _permuted(indices_TK: Tensor, size: int, seed: int | None) -> Tensor:
    return indices_TK if seed is None else _permute_addresses(indices_TK, size, seed, False)


def _native_numbers(size: int, seed: int | None) -> tuple[int, ...]:
    """The permutation as the C++ lookups take it."""
    return () if seed is None else native_permutation(size, seed)


class _Bags(NamedTuple):
    """The lookup as bags for `embedding_bag`: one per (token, core, block) over the table seen as [N*C, D/C]."""

    rows: Tensor
    """[T*C*K], the slots of a token sorted by block."""
    first: Tensor
    """[T*C*E] where each bag begins."""
    weights: Tensor
    """[T*C*K]."""
    order_TK: Tensor | None
    """Which slot of the token came to each place; None: as it was."""


def _bags(n: int, indices_TK: Tensor, scores_TKC: Tensor, num_blocks: int) -> _Bags:
    t, k, c = scores_TKC.shape
    core = torch.arange(c, device=indices_TK.device)
    if num_blocks == 1:
        rows_TCK = indices_TK.unsqueeze(1) * c + core.view(1, c, 1)
        first = torch.arange(t * c, device=indices_TK.device) * k
        return _Bags(rows_TCK.reshape(-1), first, scores_TKC.transpose(1, 2).reshape(-1), None)
    block_TK, order_TK = (indices_TK // n).sort(dim=1, stable=True)
    rows_TCK = (indices_TK % n).gather(1, order_TK).unsqueeze(1) * c + core.view(1, c, 1)
    weights_TCK = scores_TKC.gather(1, order_TK.unsqueeze(-1).expand(t, k, c)).transpose(1, 2)
    block = torch.arange(num_blocks, device=indices_TK.device)
    first_TE = (block_TK.unsqueeze(1) < block.view(1, -1, 1)).sum(-1)
    first_TCE = first_TE.unsqueeze(1) + torch.arange(t * c, device=indices_TK.device).view(t, c, 1) * k
    return _Bags(rows_TCK.reshape(-1), first_TCE.reshape(-1), weights_TCK.reshape(-1), order_TK)


@opaque_op("ultramem::lookup_reduce_backward")
def _lookup_reduce_backward(
    grad_TED: Tensor,
    values_ND: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    need_values: bool,
    need_scores: bool = True,
    permutation_seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the table [N,D] and of the scores [T,K,C], each empty unless needed; the same bits every time."""
    if runs_triton(values_ND):
        from ultramem.ops.triton import lookup_reduce_backward as kernels

        return kernels.lookup_reduce_backward(
            grad_TED, values_ND, indices_TK, scores_TKC, need_values, need_scores, permutation_seed
        )
    indices_TK = _permuted(indices_TK, values_ND.shape[0] * grad_TED.shape[1], permutation_seed)
    if runs_native(values_ND):
        grads: tuple[Tensor, Tensor] = torch.ops.ultramem_native.lookup_reduce_backward(
            grad_TED, values_ND, indices_TK, scores_TKC, need_values, need_scores
        )
        return grads
    if values_ND.dtype in _BAG_DTYPES:
        return _bag_gradients(grad_TED, values_ND, indices_TK, scores_TKC, need_values, need_scores)
    rows_U, row_grads_UD, grad_scores = _touched_gradients(grad_TED, values_ND, indices_TK, scores_TKC, need_scores)
    if not need_values:
        return values_ND.new_empty(0), grad_scores
    return torch.zeros_like(values_ND).index_copy(0, rows_U, row_grads_UD), grad_scores


@_lookup_reduce_backward.register_fake
def _(
    grad_TED: Tensor,
    values_ND: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    need_values: bool,
    need_scores: bool = True,
    permutation_seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    return (
        values_ND.new_empty(values_ND.shape if need_values else (0,)),
        scores_TKC.new_empty(scores_TKC.shape if need_scores else (0,)),
    )


# What aten's backward of an embedding bag takes; it adds up in the dtype of the table.
_BAG_DTYPES = (torch.float32, torch.float64)
_MODE_SUM = 0


def _bag_gradients(
    grad_TED: Tensor,
    values_ND: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    need_values: bool,
    need_scores: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the table [N,D] and of the scores, each empty unless needed, without a row gradient per slot."""
    n, d = values_ND.shape
    t, k, c = scores_TKC.shape
    e, x = grad_TED.shape[1], d // c
    bags = _bags(n, indices_TK, scores_TKC.to(values_ND.dtype), e)
    table = values_ND.view(n * c, x)
    sizes = torch.diff(bags.first, append=bags.first.new_tensor([t * c * k]))
    bag = torch.repeat_interleave(torch.arange(t * c * e, device=sizes.device), sizes)
    grad_bags = grad_TED.view(t, e, c, x).transpose(1, 2).reshape(t * c * e, x)
    grad_scores = scores_TKC.new_empty(0)
    if need_scores:
        grad_weights = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad_bags, table, bags.rows, bags.first, bag, _MODE_SUM
        )
        grad_scores = grad_weights.view(t, c, k).transpose(1, 2)
        if bags.order_TK is not None:
            order_TKC = bags.order_TK.unsqueeze(-1).expand(t, k, c)
            grad_scores = torch.empty_like(grad_scores).scatter_(1, order_TKC, grad_scores)
        grad_scores = grad_scores.to(scores_TKC.dtype).contiguous()
    if not need_values:
        return values_ND.new_empty(0), grad_scores
    unused = bags.first.new_empty(0)  # bag sizes and argmax, which sums do not need
    grad_values = torch.ops.aten._embedding_bag_dense_backward(
        grad_bags, bags.rows, bag, unused, unused, n * c, False, _MODE_SUM, bags.weights
    )
    return grad_values.view(n, d), grad_scores


def _touched_gradients(
    grad_TED: Tensor, values_ND: Tensor, indices_TK: Tensor, scores_TKC: Tensor, need_scores: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Touched rows [U] ascending, their gradients [U,D], and those of the scores: the lookup on a table of U rows."""
    n = values_ND.shape[0]
    dtype = accumulation_dtype(values_ND.dtype)
    rows_U, position_TK = torch.unique(indices_TK % n, return_inverse=True)
    touched_UD = values_ND[rows_U].to(dtype)
    moved_TK = position_TK + indices_TK // n * rows_U.shape[0]
    grad_UD, grad_scores = _bag_gradients(grad_TED.to(dtype), touched_UD, moved_TK, scores_TKC, True, need_scores)
    return rows_U, grad_UD.to(values_ND.dtype), grad_scores


@opaque_op("ultramem::lookup_reduce_backward_rows")
def _lookup_reduce_backward_rows(
    grad_TED: Tensor,
    values_ND: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    need_scores: bool = True,
    permutation_seed: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """By touched row: rows [U] ascending, their gradients [U,D]; and of the scores [T,K,C], empty unless needed."""
    if runs_triton(values_ND):
        from ultramem.ops.triton import lookup_reduce_backward as kernels

        return kernels.lookup_reduce_backward_rows(
            grad_TED, values_ND, indices_TK, scores_TKC, need_scores, permutation_seed
        )
    indices_TK = _permuted(indices_TK, values_ND.shape[0] * grad_TED.shape[1], permutation_seed)
    if runs_native(values_ND):
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.ultramem_native.lookup_reduce_backward_rows(
            grad_TED, values_ND, indices_TK, scores_TKC, need_scores
        )
        return grads
    return _touched_gradients(grad_TED, values_ND, indices_TK, scores_TKC, need_scores)


@_lookup_reduce_backward_rows.register_fake
def _(
    grad_TED: Tensor,
    values_ND: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    need_scores: bool = True,
    permutation_seed: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    touched = torch.library.get_ctx().new_dynamic_size()
    return (
        indices_TK.new_empty(touched),
        values_ND.new_empty(touched, values_ND.shape[1]),
        scores_TKC.new_empty(scores_TKC.shape if need_scores else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, scores, _, ctx.sparse_grad, ctx.permutation_seed = inputs
    ctx.save_for_backward(values, indices, scores)


def _backward(ctx: Any, grad_TED: Tensor) -> tuple[Tensor | None, ...]:
    need_values, _, need_scores, *_ = ctx.needs_input_grad
    values, indices, scores = ctx.saved_tensors
    grads = grad_TED.contiguous(), values, indices, scores
    if ctx.sparse_grad and need_values:
        rows, row_grads, grad_scores = _lookup_reduce_backward_rows(*grads, need_scores, ctx.permutation_seed)
        grad_values = rows_gradient(rows, row_grads, values)
    else:
        grad_values, grad_scores = _lookup_reduce_backward(*grads, need_values, need_scores, ctx.permutation_seed)
    return grad_values if need_values else None, None, grad_scores if need_scores else None, None, None, None


_lookup_reduce.register_autograd(_backward, setup_context=_setup_context)


def require_lookup(values_ND: Tensor, indices_TK: Tensor, scores_TKC: Tensor, num_blocks: int) -> None:
    """Raise unless the arguments of a lookup fit together."""
    checks.require_tensor("values_ND", values_ND, ndim=2, shape="[N,D]")
    checks.require_tensor("indices_TK", indices_TK, ndim=2, shape="[T,K]")
    checks.require_tensor("scores_TKC", scores_TKC, ndim=3, shape="[T,K,C]")
    checks.require_floating("values_ND", values_ND)
    checks.require_int64("indices_TK", indices_TK)
    checks.require_scores(values_ND, scores_TKC)
    t, k = indices_TK.shape
    c = scores_TKC.shape[-1]
    checks.require_shape("scores_TKC", scores_TKC, (t, k, c), "[T,K] of indices_TK, then C")
    checks.require_same_device(values_ND=values_ND, indices_TK=indices_TK, scores_TKC=scores_TKC)
    checks.require_positive("num_blocks", num_blocks)


def lookup_reduce(
    values_ND: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    *,
    num_blocks: int = 1,
    sparse_grad: bool = False,
    permutation_seed: int | None = None,
    checked: bool = False,
) -> Tensor:
    """Pool weighted rows: `out[t,p] = sum_{k: block(k)=p} concat_c(score[t,k,c] * V[row(k)]_c)` (paper, eq 14-17).

    A virtual index v names row `v % N` and block `v // N`; the virtual table of E*N rows is never built. Core c
    weights columns `c*D/C .. (c+1)*D/C`.

    Args:
        values_ND: the physical table [N,D], float32, bfloat16, float16 or float64.
        indices_TK: virtual indices [T,K] in [0, N*num_blocks), int64. Duplicates add up. T may be 0.
        scores_TKC: weights [T,K,C] in the dtype of the table or float32; C divides D.
        num_blocks: E, the virtual expansion.
        sparse_grad: the table's gradient is a sparse COO tensor of the touched rows (unique, ascending) instead of a
            dense [N,D].
        permutation_seed: the indices are addresses before the permutation; `permute_addresses(indices_TK,
            N*num_blocks, permutation_seed)` are the virtual indices. A kernel permutes as it reads them.
        checked: read the indices and raise if one is out of range. This waits for the device and cannot be traced;
            without it an index out of range is undefined behaviour.

    Returns:
        [T,E,D] in the dtype of the table, accumulated in float32 (float64 for a float64 table).

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: rank, shape or device differ, C does not divide D, or (checked) an index is out of range.
    """
    require_lookup(values_ND, indices_TK, scores_TKC, num_blocks)
    if permutation_seed is not None:
        require_seed("permutation_seed", permutation_seed)
    if checked:
        checks.require_in_range("indices_TK", indices_TK, values_ND.shape[0] * num_blocks)
    pooled_TED: Tensor = _lookup_reduce(
        values_ND.contiguous(),
        indices_TK.contiguous(),
        scores_TKC.contiguous(),
        num_blocks,
        sparse_grad,
        permutation_seed,
    )
    return pooled_TED
