"""Stale rows up to date, in registers: the formula of ultramem/ops/catch_up.py, and the kernel that gathers rows by it.

What a row owes is settled in float64 once a row, its columns in float32.

Shapes: N rows, D columns, U touched rows, S steps (or more) in the schedule.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem.ops.catch_up import LazyRows
from ultramem.ops.triton._launch import cdiv, next_power_of_2, refuse_float64, require_contiguous

# A program is one warp, which waits for no other. It works on 256 elements at a time: 16 bytes a lane of a bfloat16
# table, 4 KB of an update of a float32 one. 32 such warps, all that a processor takes, fit into 64 registers a lane and
# ask for 128 KB together, of which an H100 needs 18 under way. Twice as many elements take twice as many registers.
TILE_ELEMENTS = 256
# Columns of a tile, unless narrower tiles leave less of the last one empty: 128 float32 are 16 bytes a lane.
LEAST_COLUMNS = 128
MAX_ROWS = 32


@triton.jit
def debt(schedule, then, now, eps):
    """(decay, drift, eps) in float32 that rows owe at step `now`, of rows that are as they were after step `then`."""
    owed = schedule + then.to(tl.int64) * 3
    log_decay = tl.load(schedule + now.to(tl.int64) * 3) - tl.load(owed)
    drift = tl.load(owed + 1)
    scale = tl.where(drift > 0, tl.load(owed + 2) / tl.where(drift > 0, drift, 1.0), 1.0)
    return tl.exp(log_decay).to(tl.float32), drift.to(tl.float32), (eps.to(tl.float64) * scale).to(tl.float32)


@triton.jit
def root(v):
    """Square root to a bit or two. The instruction takes numbers below 2^-126 for 0, so those are scaled."""
    small = v < 1e-30
    return tl.sqrt(tl.where(small, v * 2.0**64, v)) * tl.where(small, 2.0**-32, 1.0)


@triton.jit
def made_up(p, m, v, decay, drift, eps):
    return (p - drift * (m / (root(v) + eps))) * decay


@triton.jit(do_not_specialize=("count",))
def catch_up_rows_kernel(
    values,
    exp_avg,
    exp_avg_sq,
    last_step,
    schedule,
    step,
    rows,
    out,
    count,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[i] = row rows[i] of the table, up to date.

    Moments may be None: the decay alone is owed. Those of a row that misses no step are not read.
    Bytes: U * D * (itemsize + 4), and 8 U * D for the moments of stale rows; 36 to 44 a row.
    """
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = index < count
    row = tl.load(rows + index, mask=exists, other=0)
    now = tl.load(step)
    then = tl.load(last_step + row, mask=exists, other=0)
    stale = exists & (then < now)
    decay, drift, eps_row = debt(schedule, then, now, tl.cast(eps, tl.float32))
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (column < D)[None, :]
        at = row[:, None] * D + column[None, :]
        p = tl.load(values + at, mask=exists[:, None] & inside, other=0.0).to(tl.float32)
        if exp_avg is not None:
            m = tl.load(exp_avg + at, mask=stale[:, None] & inside, other=0.0)
            v = tl.load(exp_avg_sq + at, mask=stale[:, None] & inside, other=0.0)
            p = made_up(p, m, v, decay[:, None], drift[:, None], eps_row[:, None])
        else:
            p *= decay[:, None]
        tl.store(out + index[:, None] * D + column[None, :], p, mask=exists[:, None] & inside)


def row_tile(d: int) -> dict[str, Any]:
    """Constants and warps of a kernel that goes over whole rows of D columns."""
    most = min(TILE_ELEMENTS, next_power_of_2(d))
    padded = {c: cdiv(d, c) * c for c in (most, most // 2, most // 4) if c == most or c >= LEAST_COLUMNS}
    columns = next(c for c, width in padded.items() if 8 * width <= 9 * min(padded.values()))
    rows = min(MAX_ROWS, TILE_ELEMENTS // columns)
    return {"D": d, "ROWS": rows, "COLUMNS": columns, "num_warps": 1}


def catch_up_rows(values_ND: Tensor, lazy: LazyRows, rows_U: Tensor) -> Tensor:
    """[U,D] in float32."""
    refuse_float64(values_ND=values_ND)
    require_contiguous(values_ND=values_ND, exp_avg_ND=lazy.exp_avg_ND, exp_avg_sq_ND=lazy.exp_avg_sq_ND)
    count, d = rows_U.shape[0], values_ND.shape[1]
    out_UD = values_ND.new_empty(count, d, dtype=torch.float32)
    if out_UD.numel():
        launch = row_tile(d)
        catch_up_rows_kernel[(cdiv(count, launch["ROWS"]),)](
            values_ND, lazy.exp_avg_ND, lazy.exp_avg_sq_ND, lazy.last_step_N, lazy.schedule_S3, lazy.step,
            rows_U.contiguous(), out_UD, count, lazy.eps, **launch,
        )  # fmt: skip
    return out_UD
