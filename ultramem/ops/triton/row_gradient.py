"""Gradients of rows and scores in one pass over slots sorted by row: no atomics, the same bits every time.

A program takes a window of consecutive slots and adds up each row's run of them. A run that goes on in the next window
leaves a float32 part there; a second kernel adds the parts in order. So a row that every token shares is worked on by
as many programs as its slots fill windows.

Shapes: N rows, D value dim, T tokens, K slots a token, S = T*K slots, C cores, E blocks, X = D/C columns a core,
W windows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem.ops.sorted_slots import SortedSlots
from ultramem.ops.triton._launch import cdiv, next_power_of_2

# A core's share of a row at the paper's sizes (256, 384, 512 columns) in one warp, so that the dot products behind the
# scores' gradients need no other warp, and indices and scores are read once a slot and core.
MAX_COLUMNS = 512
# Slots whose rows are under way together: a row of the gradient and one of the table each, 1 KB in bf16.
ROW_BYTES_IN_FLIGHT = 4096
# Slots of a window: few enough for several waves of programs, many enough that the parts of runs stay a few per cent of
# the memory (2 D float32 a window) and traffic.
WINDOWS = ((2**21, 128), (2**19, 64), (0, 32))
# Windows that a program of the second kernel looks at, and parts of a run that it loads at a time.
COMBINED_WINDOWS = 16
COMBINED_COLUMNS = 256


@triton.jit(do_not_specialize=["count"])  # a count of 1 would be no tensor, of no width
def row_gradient_kernel(
    grad,
    values,
    scores,
    keys,
    order,
    targets,
    grad_rows,
    grad_scores,
    parts,
    K,
    count,
    D: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    WINDOW: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCORES: tl.constexpr,
):
    """grad_rows[target,x] = sum over a row's slots of scores * grad[t,block,x].

    If SCORES, grad_scores[chunk,slot,core] = the row's values times grad[t,block], over the columns of this program.

    parts[2w] is of the run that came into window w, parts[2w+1] of the one that began there and goes on.
    Bytes: S * D * itemsize of grad; touched rows once (again where a run meets a new window; the repeats of a run come
    from L1), not at all without SCORES; touched rows written once; 20 to 24 S a core of keys, order and scores.
    """
    X: tl.constexpr = D // C
    CHUNKS: tl.constexpr = (X + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    window = (program // (C * CHUNKS)).to(tl.int64)
    core = program // CHUNKS % C
    chunk = program % CHUNKS
    lane = chunk * COLUMNS + tl.arange(0, COLUMNS)
    column = core * X + lane
    inside = lane < X
    last = tl.cast(count, tl.int64) - 1
    start = window * WINDOW
    row = (tl.load(keys + start) // E).to(tl.int64)
    before = (tl.load(keys + tl.maximum(start - 1, 0)) // E).to(tl.int64)
    began_here = (start == 0) | (row != before)
    acc = tl.zeros([COLUMNS], tl.float32)
    for k0 in range(0, WINDOW, SLOTS):
        # All rows of the tile are asked for before the first is used: a store in between would hold the loads back.
        slots = ()
        keys_here = ()
        grads = ()
        table = ()
        for i in tl.static_range(SLOTS):
            here = tl.minimum(start + k0 + i, last)  # behind the last slot, that one again; nothing of it is kept
            slot = tl.load(order + here).to(count.dtype)  # 32 bits, if they do: 64-bit divisions are slow
            key = tl.load(keys + here)
            where = ((slot // K).to(tl.int64) * E + key % E) * D + column
            slots = slots + (slot,)
            keys_here = keys_here + (key,)
            grads = grads + (tl.load(grad + where, mask=inside, other=0.0),)
            if SCORES:
                row_at = values + (key // E).to(tl.int64) * D + column
                table = table + (tl.load(row_at, mask=inside, other=0.0),)
        keys_here = keys_here + (tl.load(keys + tl.minimum(start + k0 + SLOTS, last)),)
        for i in tl.static_range(SLOTS):
            at = start + k0 + i
            exists = at <= last
            slot = slots[i].to(tl.int64)
            g = grads[i].to(tl.float32)
            if SCORES:
                along = tl.sum(g * table[i].to(tl.float32), axis=0).to(grad_scores.dtype.element_ty)
                tl.store(grad_scores + (chunk.to(tl.int64) * count + slot) * C + core, along, mask=exists)
            acc += tl.load(scores + slot * C + core).to(tl.float32) * g
            row = (keys_here[i] // E).to(tl.int64)
            ends = (at == last) | ((keys_here[i + 1] // E).to(tl.int64) != row)
            if exists & ends & began_here:
                target = row if targets is None else tl.load(targets + at).to(tl.int64)
                tl.store(grad_rows + target * D + column, acc.to(grad_rows.dtype.element_ty), mask=inside)
            if exists & ((ends & (began_here == 0)) | ((ends == 0) & (k0 + i == WINDOW - 1))):
                part = 2 * window + began_here.to(tl.int64)
                tl.store(parts + part * D + column, acc, mask=inside)
            acc = tl.where(ends, 0.0, acc)
            began_here = began_here | ends


@triton.jit
def combine_parts_kernel(
    keys,
    targets,
    grad_rows,
    parts,
    windows,
    D: tl.constexpr,
    E: tl.constexpr,
    WINDOW: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the rows whose runs cross windows: the parts of each, in the order of the windows.

    To `grad_rows`, or (None) over the first part of each run.
    A program looks at SLOTS windows and adds up, in COLUMNS columns, the runs that begin in one and go on.
    Bytes: 4 D a part, for 2 parts a run that crosses once; 16 a window and program of keys.
    """
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < D
    each = tl.arange(0, SLOTS)
    first_window = tl.program_id(0).to(tl.int64) * SLOTS
    window = first_window + each
    goes_on = window < windows - 1
    start = window * WINDOW
    row = tl.load(keys + start + WINDOW - 1, mask=goes_on, other=-1) // E
    goes_on &= tl.load(keys + start + WINDOW, mask=goes_on, other=-1) // E == row
    came_in = goes_on & (start > 0)
    came_in &= tl.load(keys + start - 1, mask=came_in, other=-1) // E == row
    begins = (goes_on & (came_in == 0)).to(tl.int32)
    for j in range(SLOTS):
        if tl.sum(tl.where(each == j, begins, 0), axis=0) != 0:
            run_window = first_window + j
            at = run_window * WINDOW + WINDOW - 1
            run = tl.load(keys + at) // E
            acc = tl.load(parts + (2 * run_window + 1) * D + column, mask=inside, other=0.0)
            following = run_window + 1
            found = tl.full([], SLOTS, tl.int32)
            while found == SLOTS:
                onward = following + each
                same = onward < windows
                same &= tl.load(keys + onward * WINDOW, mask=same, other=-1) // E == run
                part = tl.load(
                    parts + (2 * onward * D)[:, None] + column[None, :], mask=same[:, None] & inside[None, :], other=0.0
                )
                acc += tl.sum(part, axis=0)
                found = tl.sum(same.to(tl.int32), axis=0)
                following += SLOTS
            if grad_rows is None:
                tl.store(parts + (2 * run_window + 1) * D + column, acc, mask=inside)
            else:
                target = run.to(tl.int64) if targets is None else tl.load(targets + at).to(tl.int64)
                tl.store(grad_rows + target * D + column, acc.to(grad_rows.dtype.element_ty), mask=inside)


def window_of(count: int) -> int:
    """Slots of a window, of `count` slots in all."""
    return next(window for least, window in WINDOWS if count >= least)


def row_gradient_launch(
    count: int, d: int, c: int, num_blocks: int, *, itemsize: int, need_scores: bool
) -> dict[str, Any]:
    """Constants and warps of the first kernel."""
    columns = min(MAX_COLUMNS, next_power_of_2(d // c))
    slots = max(1, min(4, ROW_BYTES_IN_FLIGHT // (columns * itemsize)))
    constants = {"D": d, "C": c, "E": num_blocks, "WINDOW": window_of(count), "SLOTS": slots, "COLUMNS": columns}
    return {**constants, "SCORES": need_scores, "num_warps": 1}


def combine_launch(d: int, num_blocks: int, window: int) -> dict[str, Any]:
    """Constants and warps of the second kernel."""
    columns = min(COMBINED_COLUMNS, next_power_of_2(d))
    constants = {"D": d, "E": num_blocks, "WINDOW": window, "SLOTS": COMBINED_WINDOWS, "COLUMNS": columns}
    return {**constants, "num_warps": 1}


def row_gradient(
    grad_TED: Tensor,
    values_ND: Tensor,
    scores_TKC: Tensor,
    sorted_slots: SortedSlots,
    targets_S: Tensor | None,
    grad_rows: Tensor,
    *,
    need_scores: bool,
) -> Tensor:
    """Write each touched row's gradient into `grad_rows`, at its targets_S (None: at the row itself).

    Returns the gradient of the scores [T,K,C], empty unless `need_scores`.
    """
    d = values_ND.shape[1]
    t, k, c = scores_TKC.shape
    num_blocks, count = grad_TED.shape[1], t * k
    grad_scores = scores_TKC.new_empty((t, k, c) if need_scores else 0)
    if count == 0 or d == 0:
        return grad_scores.zero_()
    launch = row_gradient_launch(count, d, c, num_blocks, itemsize=values_ND.element_size(), need_scores=need_scores)
    chunks, windows = cdiv(d // c, launch["COLUMNS"]), cdiv(count, launch["WINDOW"])
    # Each chunk of columns writes its own part of a score's gradient: adding them afterwards needs no atomics.
    by_chunk = need_scores and chunks > 1
    score_parts = scores_TKC.new_empty(chunks, t, k, c, dtype=torch.float32) if by_chunk else grad_scores
    parts = values_ND.new_empty(2 * windows, d, dtype=torch.float32)
    keys, slots = sorted_slots
    row_gradient_kernel[(windows * c * chunks,)](
        grad_TED, values_ND, scores_TKC, keys, slots, targets_S, grad_rows, score_parts, parts, k, count, **launch
    )
    combine = combine_launch(d, num_blocks, launch["WINDOW"])
    combine_parts_kernel[(cdiv(windows, combine["SLOTS"]), cdiv(d, combine["COLUMNS"]))](
        keys, targets_S, grad_rows, parts, windows, **combine
    )
    return score_parts.sum(0).to(scores_TKC.dtype) if by_chunk else grad_scores
