"""A step of an optimiser straight from the gradient of the pooled rows: each touched row's gradient stays in registers.

As in row_gradient.py, a program takes a window of slots sorted by row and adds up each row's run of them; where a run
ends, the row moves. A run that goes on in the next window leaves float32 parts; a second kernel adds the parts in
order, a third moves those rows. No number of touched rows is read, so nothing waits for the device.

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
from ultramem.ops.triton._launch import cdiv, next_power_of_2, refuse_float64, require_contiguous
from ultramem.ops.triton.round_stochastically import row_word
from ultramem.ops.triton.row_gradient import combine_launch, combine_parts_kernel, window_of
from ultramem.ops.triton.update_rows import (
    OPEN,
    adagrad_factors,
    adagrad_tile,
    adamw_debt,
    adamw_scalars,
    adamw_tile,
)

# A program owns whole rows, since a row's last step and its sum of squares are read before they are written: 8 columns
# a lane, of which the sum, a row's state and SLOTS rows of gradients take 100 registers or so.
WARP_COLUMNS = 256
MAX_WARPS = 16
# Slots of a run whose gradients are under way together.
SLOTS = 4


@triton.jit
def load_row(row, at, mask, values, exp_avg, exp_avg_sq, row_sum, last_step):
    """What a row was before its step: last step, p, m, v. Without momentum, m and v are its sum of squares."""
    then = tl.load(last_step + row)
    p = tl.load(values + at, mask=mask, other=0.0)
    if row_sum is None:
        m = tl.load(exp_avg + at, mask=mask, other=0.0)
        v = tl.load(exp_avg_sq + at, mask=mask, other=0.0)
    else:
        m = tl.load(row_sum + row)
        v = m
    return then, p, m, v


@triton.jit
def update_row(
    g, then, p, m, v, row, at, mask, column,
    values, exp_avg, exp_avg_sq, row_sum, last_step, schedule, step, seed,
    log2_beta1, log2_beta1_rest, log2_beta2, log2_beta2_rest, rest1, rest2, root_scale, rate, decay, eps,
    D: tl.constexpr,
):  # fmt: skip
    """Step number `step` of one row with gradient g: of Adagrad if it has a `row_sum`, else of AdamW."""
    tl.debug_barrier()  # every warp has read what the row was
    word = row_word(row, seed, step)
    if row_sum is None:
        missed, owed_decay, drift, eps_row, shrink1, shrink2 = adamw_debt(
            schedule, then, step, log2_beta1, log2_beta1_rest, log2_beta2, log2_beta2_rest, eps
        )
        adamw_tile(
            values, exp_avg, exp_avg_sq, at, mask, p, m, v, g, word, column,
            missed, owed_decay, drift, eps_row, shrink1, shrink2, rest1, rest2, root_scale, rate, decay, eps,
        )  # fmt: skip
    else:
        total = m + tl.sum(tl.sum(g * g, axis=1), axis=0) / D
        row_decay, row_rate = adagrad_factors(schedule, then, step, total, rate, decay, eps)
        adagrad_tile(values, at, mask, p, g, word, column, row_decay, row_rate)
        tl.store(row_sum + row, total)
    tl.store(last_step + row, tl.cast(step, tl.int32))


@triton.jit(do_not_specialize=OPEN)
def update_segments_kernel(
    grad, scores, keys, order, parts,
    values, exp_avg, exp_avg_sq, row_sum, last_step, schedule,
    K, count, step, seed,
    log2_beta1, log2_beta1_rest, log2_beta2, log2_beta2_rest, rest1, rest2, root_scale, rate, decay, eps,
    D: tl.constexpr, C: tl.constexpr, E: tl.constexpr,
    WINDOW: tl.constexpr, SLOTS: tl.constexpr, CORES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows whose runs lie in one window: their gradients, and their step. Of the others: parts, as in row_gradient.py.

    A tile is [CORES,COLUMNS], C and X rounded up. Adagrad (with a `row_sum`) takes lr as `rate`.
    Bytes: S * D * itemsize of grad; touched rows and what their rule keeps, read and written once; 4 D a part.
    """
    X: tl.constexpr = D // C
    core = tl.arange(0, CORES)
    lane = tl.arange(0, COLUMNS)[None, :]
    column = core[:, None] * X + lane
    inside = (core < C)[:, None] & (lane < X)
    window = tl.program_id(0).to(tl.int64)
    start = window * WINDOW
    last = tl.cast(count, tl.int64) - 1
    stop = tl.minimum(start + WINDOW, last + 1)
    before = (tl.load(keys + tl.maximum(start - 1, 0)) // E).to(tl.int64)
    at = start
    while at < stop:
        row = (tl.load(keys + at) // E).to(tl.int64)
        began_here = (at > start) | (start == 0) | (row != before)
        row_at = row * D + column
        # Asked for before the gradients are added up, in vain only where the run goes on in the next window.
        then, p, m, v = load_row(
            row,
            row_at,
            inside & (lane * 0 + began_here.to(tl.int32) > 0),
            values,
            exp_avg,
            exp_avg_sq,
            row_sum,
            last_step,
        )
        acc = tl.zeros([CORES, COLUMNS], tl.float32)
        found = tl.full([], SLOTS, tl.int32)
        while found == SLOTS:
            found = tl.full([], 0, tl.int32)
            grads = ()
            weights = ()
            for i in tl.static_range(SLOTS):
                here = tl.minimum(at + i, last)
                key = tl.load(keys + here)
                slot = tl.load(order + here).to(count.dtype)  # 32 bits, if they do: 64-bit divisions are slow
                same = ((at + i < stop) & ((key // E).to(tl.int64) == row)).to(tl.int32)
                where = ((slot // K).to(tl.int64) * E + key % E) * D + column
                grads = grads + (tl.load(grad + where, mask=inside & (lane * 0 + same > 0), other=0.0),)
                weight_at = scores + slot.to(tl.int64) * C + core
                weights = weights + (tl.load(weight_at, mask=(core < C) & (core * 0 + same > 0), other=0.0),)
                found += same
            for i in tl.static_range(SLOTS):
                acc += weights[i].to(tl.float32)[:, None] * grads[i].to(tl.float32)
            at += found
        goes_on = (at <= last) & ((tl.load(keys + tl.minimum(at, last)) // E).to(tl.int64) == row)
        if began_here & (goes_on == 0):
            update_row(
                acc, then, p, m, v, row, row_at, inside, column,
                values, exp_avg, exp_avg_sq, row_sum, last_step, schedule, step, seed,
                log2_beta1, log2_beta1_rest, log2_beta2, log2_beta2_rest, rest1, rest2, root_scale, rate, decay, eps,
                D,
            )  # fmt: skip
        else:
            tl.store(parts + (2 * window + began_here.to(tl.int64)) * D + column, acc, mask=inside)


@triton.jit(do_not_specialize=(*OPEN, "windows"))
def update_crossing_rows_kernel(
    keys, parts,
    values, exp_avg, exp_avg_sq, row_sum, last_step, schedule,
    windows, step, seed,
    log2_beta1, log2_beta1_rest, log2_beta2, log2_beta2_rest, rest1, rest2, root_scale, rate, decay, eps,
    D: tl.constexpr, C: tl.constexpr, E: tl.constexpr,
    WINDOW: tl.constexpr, CORES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The step of the row whose run begins in this program's window and goes on, of its combined part.

    Bytes: as the rows of the first kernel, and 4 D of the part; 8 to 24 a window of keys.
    """
    X: tl.constexpr = D // C
    core = tl.arange(0, CORES)
    lane = tl.arange(0, COLUMNS)[None, :]
    column = core[:, None] * X + lane
    inside = (core < C)[:, None] & (lane < X)
    window = tl.program_id(0).to(tl.int64)
    start = window * WINDOW
    if window < windows - 1:
        row = (tl.load(keys + start + WINDOW - 1) // E).to(tl.int64)
        goes_on = (tl.load(keys + start + WINDOW) // E).to(tl.int64) == row
        came_in = (start > 0) & ((tl.load(keys + tl.maximum(start - 1, 0)) // E).to(tl.int64) == row)
        if goes_on & (came_in == 0):
            row_at = row * D + column
            then, p, m, v = load_row(row, row_at, inside, values, exp_avg, exp_avg_sq, row_sum, last_step)
            g = tl.load(parts + (2 * window + 1) * D + column, mask=inside, other=0.0)
            update_row(
                g, then, p, m, v, row, row_at, inside, column,
                values, exp_avg, exp_avg_sq, row_sum, last_step, schedule, step, seed,
                log2_beta1, log2_beta1_rest, log2_beta2, log2_beta2_rest, rest1, rest2, root_scale, rate, decay, eps,
                D,
            )  # fmt: skip


def segments_launch(d: int, c: int, num_blocks: int, window: int) -> dict[str, Any]:
    """Constants and warps of both kernels."""
    cores, columns = next_power_of_2(c), next_power_of_2(d // c)
    warps = max(1, min(MAX_WARPS, cores * columns // WARP_COLUMNS))
    constants = {"D": d, "C": c, "E": num_blocks, "WINDOW": window, "CORES": cores, "COLUMNS": columns}
    return {**constants, "num_warps": warps}


def adamw_segments_(
    values_ND: Tensor,
    exp_avg_ND: Tensor,
    exp_avg_sq_ND: Tensor,
    last_step_N: Tensor,
    schedule_S3: Tensor,
    slots: SortedSlots,
    grad_TED: Tensor,
    scores_TKC: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int,
) -> None:
    state = (values_ND, exp_avg_ND, exp_avg_sq_ND, None, last_step_N, schedule_S3)
    scalars = adamw_scalars(step, lr, beta1, beta2, eps, weight_decay)
    _update_segments_(state, slots, grad_TED, scores_TKC, step, seed, scalars)


def adagrad_segments_(
    values_ND: Tensor,
    row_sum_N: Tensor,
    last_step_N: Tensor,
    schedule_S3: Tensor,
    slots: SortedSlots,
    grad_TED: Tensor,
    scores_TKC: Tensor,
    step: int,
    lr: float,
    eps: float,
    weight_decay: float,
    seed: int,
) -> None:
    state = (values_ND, None, None, row_sum_N, last_step_N, schedule_S3)
    scalars = (*(None,) * 7, lr, 1 - lr * weight_decay, eps)
    _update_segments_(state, slots, grad_TED, scores_TKC, step, seed, scalars)


def _update_segments_(
    state: tuple[Tensor | None, ...],
    slots: SortedSlots,
    grad_TED: Tensor,
    scores_TKC: Tensor,
    step: int,
    seed: int,
    scalars: tuple[float | None, ...],
) -> None:
    """`state` and `scalars` in the order of the kernels' arguments."""
    refuse_float64(grad_TED=grad_TED, scores_TKC=scores_TKC)
    require_contiguous(values_ND=state[0], exp_avg_ND=state[1], exp_avg_sq_ND=state[2])
    (_, num_blocks, d), (t, k, c) = grad_TED.shape, scores_TKC.shape
    count = t * k
    if count == 0 or d == 0:
        return
    window = window_of(count)
    windows = cdiv(count, window)
    parts = grad_TED.new_empty(2 * windows, d, dtype=torch.float32)
    launch = segments_launch(d, c, num_blocks, window)
    update_segments_kernel[(windows,)](
        grad_TED, scores_TKC, *slots, parts, *state, k, count, step, seed, *scalars, **launch, SLOTS=SLOTS
    )
    if windows == 1:
        return
    combine = combine_launch(d, num_blocks, window)
    combine_parts_kernel[(cdiv(windows, combine["SLOTS"]), cdiv(d, combine["COLUMNS"]))](
        slots.keys_S, None, None, parts, windows, **combine
    )
    update_crossing_rows_kernel[(windows,)](slots.keys_S, parts, *state, windows, step, seed, *scalars, **launch)
