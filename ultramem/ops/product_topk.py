"""Exact top-k over a grid of additive scores (product keys): the retrieval of PKM.

Shapes: T tokens, H heads, N the side of the grid, K kept slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ultramem.ops import _checks as checks
from ultramem.ops._registration import accumulation_dtype, opaque_op, traceable_op
from ultramem.ops._top_k import MAX_ADDRESS, top_addresses
from ultramem.ops.implementation import runs_native, runs_triton


class TopK(NamedTuple):
    """Kept slots: `scores` [T,H,K] or, with C cores, [T,H,K,C]; `addresses` [T,H,K] int64, row * n + col."""

    scores: Tensor
    addresses: Tensor


def product_topk_reference(row_scores_THN: Tensor, col_scores_THN: Tensor, k: int) -> TopK:
    """The oracle: every cell of the grid, sorted."""
    t, h, n = row_scores_THN.shape
    grid_THNN = row_scores_THN.unsqueeze(-1) + col_scores_THN.unsqueeze(-2)
    scores, addresses = grid_THNN.reshape(t, h, n * n).sort(dim=-1, descending=True, stable=True)
    return TopK(scores[..., :k], addresses[..., :k])


@traceable_op("ultramem::product_topk")
def _product_topk(row_scores_THN: Tensor, col_scores_THN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if runs_triton(row_scores_THN):
        from ultramem.ops.triton import select

        return select.product_topk(row_scores_THN, col_scores_THN, k)
    if runs_native(row_scores_THN):
        top: tuple[Tensor, Tensor] = torch.ops.ultramem_native.product_topk(row_scores_THN, col_scores_THN, k)
        return top
    return _product_topk_aten(row_scores_THN, col_scores_THN, k)


def _product_topk_aten(row_scores_THN: Tensor, col_scores_THN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Two phases: k of each side lose no cell of the top k; then k of the k * k candidates."""
    t, h, n = row_scores_THN.shape
    dtype = accumulation_dtype(row_scores_THN.dtype)
    row_THN, col_THN = row_scores_THN.to(dtype), col_scores_THN.to(dtype)
    position = torch.arange(n, device=row_THN.device)
    row_THK = top_addresses(row_THN, position, k).sort(-1).values
    col_THK = top_addresses(col_THN, position, k).sort(-1).values
    grid_THKK = row_THN.gather(-1, row_THK).unsqueeze(-1) + col_THN.gather(-1, col_THK).unsqueeze(-2)
    address_THKK = row_THK.unsqueeze(-1) * n + col_THK.unsqueeze(-2)
    addresses_THK = top_addresses(grid_THKK.view(t, h, k * k), address_THKK.view(t, h, k * k), k)
    scores_THK = row_THN.gather(-1, addresses_THK // n) + col_THN.gather(-1, addresses_THK % n)
    return scores_THK.to(row_scores_THN.dtype), addresses_THK


@opaque_op("ultramem::product_topk_backward")
def _product_topk_backward(grad_scores_THK: Tensor, addresses_THK: Tensor, n: int) -> tuple[Tensor, Tensor]:
    if runs_triton(grad_scores_THK):
        from ultramem.ops.triton import select_backward

        return select_backward.product_topk_backward(grad_scores_THK, addresses_THK, n)
    if runs_native(grad_scores_THK):
        grads: tuple[Tensor, Tensor] = torch.ops.ultramem_native.product_topk_backward(
            grad_scores_THK, addresses_THK, n
        )
        return grads
    t, h, _ = grad_scores_THK.shape
    zeros = grad_scores_THK.new_zeros(t, h, n)
    return (
        zeros.scatter_add(-1, addresses_THK // n, grad_scores_THK),
        zeros.scatter_add(-1, addresses_THK % n, grad_scores_THK),
    )


@_product_topk_backward.register_fake
def _(grad_scores_THK: Tensor, addresses_THK: Tensor, n: int) -> tuple[Tensor, Tensor]:
    t, h, _ = grad_scores_THK.shape
    return grad_scores_THK.new_empty(t, h, n), grad_scores_THK.new_empty(t, h, n)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.n = inputs[0].shape[-1]


def _backward(ctx: Any, grad_scores_THK: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    (addresses_THK,) = ctx.saved_tensors
    row, col = _product_topk_backward(grad_scores_THK.contiguous(), addresses_THK, ctx.n)
    return row, col, None


_product_topk.register_autograd(_backward, setup_context=_setup_context)


def product_topk(row_scores_THN: Tensor, col_scores_THN: Tensor, k: int) -> TopK:
    """Keep the k largest cells of the grid `row[i] + col[j]`, per token and head (UltraMem paper, eq 2-3).

    Args:
        row_scores_THN: [T,H,N], float32, bfloat16, float16 or float64; N at most 65536.
        col_scores_THN: the same shape, dtype and device.
        k: slots to keep, 1 to N.

    Returns:
        TopK: scores [T,H,K] in the dtype of the input (added in float32), best first, with gradients into both
        sides; addresses [T,H,K] int64, row * N + col. Of equal scores the lower address is kept and comes first.

    Raises:
        TypeError: a dtype that is not accepted, or a k that is not an int.
        ValueError: rank, shape or device differ, or k is not in 1..N.
    """
    checks.require_tensor("row_scores_THN", row_scores_THN, ndim=3, shape="[T,H,N]")
    checks.require_tensor("col_scores_THN", col_scores_THN, ndim=3, shape="[T,H,N]")
    checks.require_floating("row_scores_THN", row_scores_THN)
    checks.require_shape("col_scores_THN", col_scores_THN, tuple(row_scores_THN.shape), "that of row_scores_THN")
    checks.require_same_dtype(row_scores_THN=row_scores_THN, col_scores_THN=col_scores_THN)
    checks.require_same_device(row_scores_THN=row_scores_THN, col_scores_THN=col_scores_THN)
    require_k(k, n=row_scores_THN.shape[-1])
    return TopK(*_product_topk(row_scores_THN.contiguous(), col_scores_THN.contiguous(), k))


def require_k(k: int, *, n: int) -> None:
    """k in 1..n, and addresses of an n x n grid that fit the 32 bits that selection packs beside a score."""
    checks.require_positive("k", k)
    if k > n:
        raise ValueError(f"k must be at most the {n} scores of a side, got {k}")
    if n * n > MAX_ADDRESS:
        raise ValueError(f"a side may have at most {int(MAX_ADDRESS**0.5)} scores, got {n}")
