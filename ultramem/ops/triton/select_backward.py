"""Kernels of the backward of product_topk and tucker_topk: one launch each.

Shapes: T tokens, H heads, P = T*H pairs, R ranks, N the side of the grid, C cores, K kept slots.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem.ops.triton._launch import next_power_of_2, refuse_float64

# Floats that a program of the backward clears at once: 16 bytes a lane for bf16 and 4 warps.
CLEAR = 1024
BACKWARD_WARPS = 4


@triton.jit
def _clear(out, SPAN: tl.constexpr, CLEAR: tl.constexpr):
    zeros = tl.zeros([CLEAR], out.dtype.element_ty)
    for start in range(0, SPAN, CLEAR):
        at = start + tl.arange(0, CLEAR)
        tl.store(out + at, zeros, mask=at < SPAN)


@triton.jit
def _add_up(out, position, contribution, mask):
    """out[position] = the sum over all slots at that position; slots that share one write the same bits."""
    same = (position[:, None] == position[None, :]) & mask[None, :]
    total = tl.sum(tl.where(same, contribution[None, :], 0.0), axis=1)
    tl.store(out + position, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def product_topk_backward_kernel(
    grad, addresses, grad_row, grad_col, N: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, CLEAR: tl.constexpr
):
    """Gradients of both sides of a pair, written whole: cleared, then every touched position once.

    Bytes: 2 N * itemsize written, K (8 + itemsize) read. Registers: 30 to 128, for the K x K comparison.
    """
    pair = tl.program_id(0).to(tl.int64)
    grad_row += pair * N
    grad_col += pair * N
    _clear(grad_row, N, CLEAR)
    _clear(grad_col, N, CLEAR)
    tl.debug_barrier()  # the sums overwrite zeros of other threads
    a = tl.arange(0, SLOTS)
    address = tl.load(addresses + pair * K + a, mask=a < K, other=0)
    g = tl.load(grad + pair * K + a, mask=a < K, other=0.0).to(tl.float32)
    _add_up(grad_row, address // N, g, a < K)
    _add_up(grad_col, address % N, g, a < K)


@triton.jit
def tucker_topk_backward_kernel(
    grad,
    row,
    col,
    cores,
    addresses,
    grad_row,
    grad_col,
    core_parts,
    H,
    N: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """All gradients of a pair: of both sides, written whole, and its own part [C,R,R] of the cores' gradient.

    Bytes: 2 R N * itemsize written; K (8 + C * itemsize) and 2 R K scattered elements read.
    Registers: 32 to 152, for the K x K comparison.
    """
    pair = tl.program_id(0).to(tl.int64)
    row += pair * (R * N)
    col += pair * (R * N)
    grad_row += pair * (R * N)
    grad_col += pair * (R * N)
    cores += (tl.program_id(0) % H) * (C * R * R)
    core_parts += pair * (C * R * R)
    _clear(grad_row, R * N, CLEAR)
    _clear(grad_col, R * N, CLEAR)
    tl.debug_barrier()  # the sums overwrite zeros of other threads
    a = tl.arange(0, SLOTS)
    mask = a < K
    address = tl.load(addresses + pair * K + a, mask=mask, other=0)
    i = address // N
    j = address % N
    grad += (pair * K + a) * C
    for r in tl.static_range(R):
        along_row = tl.zeros([SLOTS], tl.float32)
        along_col = tl.zeros([SLOTS], tl.float32)
        row_r = tl.load(row + r * N + i, mask=mask, other=0.0).to(tl.float32)
        for s in tl.static_range(R):
            col_s = tl.load(col + s * N + j, mask=mask, other=0.0).to(tl.float32)
            row_s = tl.load(row + s * N + i, mask=mask, other=0.0).to(tl.float32)
            for c in tl.static_range(C):
                g = tl.load(grad + c, mask=mask, other=0.0).to(tl.float32)
                along_row += g * tl.load(cores + (c * R + r) * R + s).to(tl.float32) * col_s
                along_col += g * tl.load(cores + (c * R + s) * R + r).to(tl.float32) * row_s
                tl.store(core_parts + (c * R + r) * R + s, tl.sum(g * row_r * col_s))
        _add_up(grad_row + r * N, i, along_row, mask)
        _add_up(grad_col + r * N, j, along_col, mask)


def product_backward_launch(n: int, k: int) -> dict[str, Any]:
    """Constants and warps of the backward of product_topk."""
    return {"N": n, "K": k, "SLOTS": next_power_of_2(k), "CLEAR": CLEAR, "num_warps": BACKWARD_WARPS}


def tucker_backward_launch(n: int, r: int, c: int, k: int) -> dict[str, Any]:
    """Constants and warps of the backward of tucker_topk."""
    return {"R": r, "C": c, **product_backward_launch(n, k)}


def product_topk_backward(grad_scores_THK: Tensor, addresses_THK: Tensor, n: int) -> tuple[Tensor, Tensor]:
    refuse_float64(grad_scores_THK=grad_scores_THK)
    t, h, k = grad_scores_THK.shape
    grad_row_THN, grad_col_THN = grad_scores_THK.new_empty(t, h, n), grad_scores_THK.new_empty(t, h, n)
    if t * h:
        product_topk_backward_kernel[(t * h,)](
            grad_scores_THK, addresses_THK, grad_row_THN, grad_col_THN, **product_backward_launch(n, k)
        )
    return grad_row_THN, grad_col_THN


def tucker_topk_backward(
    grad_THKC: Tensor, row_THRN: Tensor, col_THRN: Tensor, cores_HCRR: Tensor, addresses_THK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of row scores, column scores and cores; the last adds one part a pair in torch's fixed order."""
    refuse_float64(row_scores_THRN=row_THRN, cores_HCRR=cores_HCRR)
    t, h, r, n = row_THRN.shape
    c, k = cores_HCRR.shape[1], addresses_THK.shape[-1]
    grad_row_THRN, grad_col_THRN = torch.empty_like(row_THRN), torch.empty_like(col_THRN)
    core_parts = row_THRN.new_empty(t, h, c, r, r, dtype=torch.float32)
    if t * h:
        tucker_topk_backward_kernel[(t * h,)](
            grad_THKC,
            row_THRN,
            col_THRN,
            cores_HCRR,
            addresses_THK,
            grad_row_THRN,
            grad_col_THRN,
            core_parts,
            h,
            **tucker_backward_launch(n, r, c, k),
        )
    return grad_row_THRN, grad_col_THRN, core_parts.sum(0).to(cores_HCRR.dtype)
