"""Kernels of lookup_reduce: forward, and a backward that reads each touched row once.

Shapes: N rows, D value dim, T tokens, K slots a token, C cores, E blocks, U distinct rows touched, X = D/C columns a
core. A tile is [blocks, slots, columns]; every row load and store is 16 bytes a lane where D allows it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ultramem.ops.triton._launch import next_power_of_2, refuse_float64

# Blocks pooled by one program. Their accumulators are the registers of the forward (GROUP * SLOTS * COLUMNS / threads
# floats a thread): 4 is the paper's E; a larger E takes more programs, each of which loads only rows of its own blocks.
GROUP = 4
# Rows in flight in the forward: 8 rows x 128 bf16 columns are 16 bytes a lane for the 128 threads of 4 warps.
SLOTS = 8
COLUMNS = 128
FORWARD_WARPS = 4
# Slots of one row added at a time in the backward. Uniform access touches a row 1 to 2 times a step, so a wide tile
# would be mostly masked; 4 keep enough loads in flight for the few rows that thousands of slots share.
ROW_SLOTS = 4
# Columns of a program of the backward: a core's whole share of a row at the paper's sizes (256, 384, 512), so that
# indices and scores are read once a slot.
ROW_COLUMNS = 512
# 256 bf16 columns a warp: one row is 16 bytes for each of its 32 lanes, and the accumulator 32 registers.
ROW_COLUMNS_PER_WARP = 256
# The gradient of the scores alone (frozen table): slots and columns of a tile, as in the forward.
SCORE_SLOTS = 8
SCORE_COLUMNS = 128


@triton.jit
def _member_block(index, first, N, GROUP: tl.constexpr):
    """Block of a virtual index within the group that starts at index `first`, by comparisons: no 64-bit division."""
    local = index - first
    block = tl.zeros_like(local).to(tl.int32)
    for e in tl.static_range(1, GROUP):
        block += (local >= e * N).to(tl.int32)
    return block


@triton.jit
def _load_slots(indices, scores, token, k0, K, core, C: tl.constexpr, SLOTS: tl.constexpr):
    slot = k0 + tl.arange(0, SLOTS)
    index = tl.load(indices + token * K + slot, mask=slot < K, other=-1)
    weight = tl.load(scores + (token * K + slot) * C + core, mask=slot < K, other=0.0)
    return index, weight.to(tl.float32)


@triton.jit
def lookup_reduce_kernel(
    values,
    indices,
    scores,
    out,
    N,
    K,
    D: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[t,e,x] = sum over slots k of token t in block e of scores[t,k,core(x)] * values[row(k),x].

    A program pools COLUMNS columns of one core of one token into GROUP blocks. Slots stay apart in the accumulator
    until the end, so that the loop holds no reduction.
    Bytes: K * D * itemsize of rows a token (each once), 8 K of indices a program, E * D * itemsize written.
    Registers (sm_80 and sm_90, the paper's sizes, bf16 and float32): 80 to 94, 32 of them the accumulator.
    """
    token = tl.program_id(0).to(tl.int64)
    X: tl.constexpr = D // C
    CHUNKS: tl.constexpr = (X + COLUMNS - 1) // COLUMNS
    core = tl.program_id(1) // CHUNKS
    lane = (tl.program_id(1) % CHUNKS) * COLUMNS + tl.arange(0, COLUMNS)
    column = core * X + lane
    first_block = tl.program_id(2) * GROUP
    rows_N = tl.cast(N, tl.int64)
    first = first_block * rows_N
    member = tl.arange(0, GROUP)
    acc = tl.zeros([GROUP, SLOTS, COLUMNS], tl.float32)
    index, weight = _load_slots(indices, scores, token, 0, K, core, C, SLOTS)
    for k0 in range(0, K, SLOTS):
        mine = (index >= first) & (index < first + GROUP * rows_N)
        block = tl.where(mine, _member_block(index, first, rows_N, GROUP), GROUP)
        row = index - first - block * rows_N
        value = tl.load(
            values + row[:, None] * D + column[None, :], mask=mine[:, None] & (lane < X)[None, :], other=0.0
        ).to(tl.float32)
        weighted_by = weight
        # The next indices travel while these rows do: without this each round waits for memory twice.
        index, weight = _load_slots(indices, scores, token, k0 + SLOTS, K, core, C, SLOTS)
        # A select, not a product with 0 or 1: an infinity in one block's row must not reach the other blocks.
        weighted = weighted_by[:, None] * value
        acc += tl.where((block[None, :] == member[:, None])[:, :, None], weighted[None, :, :], 0.0)
    block = first_block + member
    pooled = tl.sum(acc, axis=1)
    where = out + (token * E + block[:, None]) * D + column[None, :]
    tl.store(where, pooled.to(out.dtype.element_ty), mask=(block[:, None] < E) & (lane < X)[None, :])


@triton.jit
def row_gradient_kernel(
    grad,
    values,
    indices,
    scores,
    sorted_rows,
    order,
    targets,
    grad_rows,
    grad_scores,
    N,
    K,
    slots,
    D: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Both gradients in one pass: the program at the first of a row's sorted slots adds them all, in that order.

    grad_rows[target,x] = sum over slots of scores * grad[t,block,x]; grad_scores[chunk,slot,core] = the row's values
    times grad[t,block], over the columns of this program.
    Bytes: K * D * itemsize of grad a token and each touched row once; 20 K of sorted rows, order and indices a program.
    Registers: 72 to 103, 32 of them the accumulator.
    """
    start = tl.program_id(0).to(tl.int64)
    row = tl.load(sorted_rows + start)
    before = tl.load(sorted_rows + tl.maximum(start - 1, 0))
    if (start == 0) | (row != before):
        X: tl.constexpr = D // C
        CHUNKS: tl.constexpr = (X + COLUMNS - 1) // COLUMNS
        core = tl.program_id(1) // CHUNKS
        chunk = tl.program_id(1) % CHUNKS
        lane = chunk * COLUMNS + tl.arange(0, COLUMNS)
        column = core * X + lane
        inside = lane < X
        rows_N = tl.cast(N, tl.int64)
        value = tl.load(values + row.to(tl.int64) * D + column, mask=inside, other=0.0).to(tl.float32)
        acc = tl.zeros([SLOTS, COLUMNS], tl.float32)
        position = start
        found = tl.full([], SLOTS, tl.int32)
        while found == SLOTS:
            at = position + tl.arange(0, SLOTS)
            same = tl.load(sorted_rows + at, mask=at < slots, other=-1) == row
            slot = tl.load(order + at, mask=same, other=0)
            token = slot // K
            block = tl.load(indices + slot, mask=same, other=0) // rows_N
            weight = tl.load(scores + slot * C + core, mask=same, other=0.0).to(tl.float32)
            g = tl.load(
                grad + (token * E + block)[:, None] * D + column[None, :],
                mask=same[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            acc += weight[:, None] * g
            along = tl.sum(g * value[None, :], axis=1)
            tl.store(
                grad_scores + (chunk.to(tl.int64) * slots + slot) * C + core,
                along.to(grad_scores.dtype.element_ty),
                mask=same,
            )
            found = tl.sum(same.to(tl.int32))
            position += SLOTS
        target = tl.load(targets + start).to(tl.int64)
        summed = tl.sum(acc, axis=0).to(grad_rows.dtype.element_ty)
        tl.store(grad_rows + target * D + column, summed, mask=inside)


@triton.jit
def score_gradient_kernel(
    grad,
    values,
    indices,
    grad_scores,
    N,
    K,
    D: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """grad_scores[t,k,c] = values[row,c] . grad[t,block,c]: the backward of a frozen table, in one pass over the rows.

    A program serves SLOTS slots of one token and one core.
    Bytes: K * D * itemsize of rows a token; the E * D of grad come from L1 after the first slot of each block.
    Registers: 30 to 62.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    core = tl.program_id(2)
    X: tl.constexpr = D // C
    rows_N = tl.cast(N, tl.int64)
    index = tl.load(indices + token * K + slot, mask=slot < K, other=0)
    block = index // rows_N
    row = index - block * rows_N
    acc = tl.zeros([SLOTS, COLUMNS], tl.float32)
    for x0 in range(0, X, COLUMNS):
        lane = x0 + tl.arange(0, COLUMNS)
        column = core * X + lane
        mask = (slot < K)[:, None] & (lane < X)[None, :]
        value = tl.load(values + row[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + (token * E + block)[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += value * g
    summed = tl.sum(acc, axis=1).to(grad_scores.dtype.element_ty)
    tl.store(grad_scores + (token * K + slot) * C + core, summed, mask=slot < K)


def forward_launch(d: int, c: int, num_blocks: int) -> dict[str, Any]:
    """Constants and warps of the forward kernel."""
    columns = min(COLUMNS, next_power_of_2(d // c))
    group = min(GROUP, next_power_of_2(num_blocks))
    constants = {"D": d, "C": c, "E": num_blocks, "GROUP": group, "SLOTS": SLOTS, "COLUMNS": columns}
    return {**constants, "num_warps": FORWARD_WARPS}


def row_gradient_launch(d: int, c: int, num_blocks: int) -> dict[str, Any]:
    """Constants and warps of the backward by rows."""
    columns = min(ROW_COLUMNS, next_power_of_2(d // c))
    constants = {"D": d, "C": c, "E": num_blocks, "SLOTS": ROW_SLOTS, "COLUMNS": columns}
    return {**constants, "num_warps": max(1, columns // ROW_COLUMNS_PER_WARP)}


def score_gradient_launch(d: int, c: int, num_blocks: int) -> dict[str, Any]:
    """Constants and warps of the gradient of the scores alone."""
    columns = min(SCORE_COLUMNS, next_power_of_2(d // c))
    constants = {"D": d, "C": c, "E": num_blocks, "SLOTS": SCORE_SLOTS, "COLUMNS": columns}
    return {**constants, "num_warps": FORWARD_WARPS}


def lookup_reduce(values_ND: Tensor, indices_TK: Tensor, scores_TKC: Tensor, num_blocks: int) -> Tensor:
    refuse_float64(values_ND=values_ND, scores_TKC=scores_TKC)
    n, d = values_ND.shape
    t, k, c = scores_TKC.shape
    out_TED = values_ND.new_empty(t, num_blocks, d)
    if t == 0:
        return out_TED
    launch = forward_launch(int(d), int(c), int(num_blocks))
    chunks = triton.cdiv(launch["D"] // launch["C"], launch["COLUMNS"])
    groups = triton.cdiv(launch["E"], launch["GROUP"])
    wrap_triton(lookup_reduce_kernel)[(t, launch["C"] * chunks, groups)](
        values_ND, indices_TK, scores_TKC, out_TED, n, k, **launch
    )
    return out_TED


def lookup_reduce_backward(
    grad_TED: Tensor, values_ND: Tensor, indices_TK: Tensor, scores_TKC: Tensor, need_values: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the table [N,D] (empty unless `need_values`) and of the scores [T,K,C]."""
    refuse_float64(values_ND=values_ND, scores_TKC=scores_TKC)
    if not need_values:
        return values_ND.new_empty(0), _score_gradient(grad_TED, values_ND, indices_TK, scores_TKC)
    grad_values_ND = values_ND.new_zeros(values_ND.shape)
    sorted_rows, order = _sorted_rows(indices_TK, values_ND.shape[0])
    grad_scores = _row_gradient(
        grad_TED, values_ND, indices_TK, scores_TKC, sorted_rows, order, sorted_rows, grad_values_ND
    )
    return grad_values_ND, grad_scores


def lookup_reduce_backward_rows(
    grad_TED: Tensor, values_ND: Tensor, indices_TK: Tensor, scores_TKC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Touched rows [U] ascending, their gradients [U,D], and the gradient of the scores [T,K,C]. Waits for U."""
    refuse_float64(values_ND=values_ND, scores_TKC=scores_TKC)
    sorted_rows, order = _sorted_rows(indices_TK, values_ND.shape[0])
    rows_U, inverse = torch.unique_consecutive(sorted_rows, return_inverse=True)
    grads_UD = values_ND.new_empty(rows_U.shape[0], values_ND.shape[1])
    grad_scores = _row_gradient(grad_TED, values_ND, indices_TK, scores_TKC, sorted_rows, order, inverse, grads_UD)
    return rows_U.to(torch.int64), grads_UD, grad_scores


def _sorted_rows(indices_TK: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Flat rows ascending and the slots that they came from; stable, so that a row's slots are added in their order."""
    rows = (indices_TK % n).reshape(-1)
    if n < 2**31:
        rows = rows.to(torch.int32)  # half the passes of a radix sort
    return rows.sort(stable=True)


def _row_gradient(
    grad_TED: Tensor,
    values_ND: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    sorted_rows: Tensor,
    order: Tensor,
    targets: Tensor,
    grad_rows: Tensor,
) -> Tensor:
    """Write `grad_rows` at `targets`; return the gradient of the scores."""
    n, d = values_ND.shape
    t, k, c = scores_TKC.shape
    grad_scores = scores_TKC.new_empty(t, k, c)
    if grad_scores.numel() == 0:
        return grad_scores
    launch = row_gradient_launch(d, c, grad_TED.shape[1])
    chunks = triton.cdiv(d // c, launch["COLUMNS"])
    # Each chunk of columns writes its own part of a score's gradient: adding them afterwards needs no atomics.
    parts = grad_scores if chunks == 1 else scores_TKC.new_empty(chunks, t, k, c, dtype=torch.float32)
    row_gradient_kernel[(t * k, c * chunks)](
        grad_TED,
        values_ND,
        indices_TK,
        scores_TKC,
        sorted_rows,
        order,
        targets,
        grad_rows,
        parts,
        n,
        k,
        t * k,
        **launch,
    )
    return grad_scores if chunks == 1 else parts.sum(0).to(scores_TKC.dtype)


def _score_gradient(grad_TED: Tensor, values_ND: Tensor, indices_TK: Tensor, scores_TKC: Tensor) -> Tensor:
    n, d = values_ND.shape
    t, k, c = scores_TKC.shape
    grad_scores = scores_TKC.new_empty(t, k, c)
    if grad_scores.numel() == 0:
        return grad_scores
    launch = score_gradient_launch(d, c, grad_TED.shape[1])
    score_gradient_kernel[(t, triton.cdiv(k, SCORE_SLOTS), c)](
        grad_TED, values_ND, indices_TK, grad_scores, n, k, **launch
    )
    return grad_scores
