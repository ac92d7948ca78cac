"""A step of an optimiser on touched rows in one launch: what they missed is made up, then they move.

The arithmetic is that of ultramem/ops/native/update_rows.h. A warp works on whole rows, so that nobody else reads what
it writes.

Shapes: N rows, D columns, U touched rows, S steps (or more) in the schedule.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem.ops.triton._launch import cdiv, refuse_float64, require_contiguous
from ultramem.ops.triton.catch_up import debt, made_up, root, row_tile
from ultramem.ops.triton.round_stochastically import row_word, to_element

# What changes from step to step, or may be 1 or a multiple of 16 by chance, must not compile a kernel anew.
OPEN = ("count", "step", "seed")


@triton.jit
def power(log2_base, log2_base_rest, exponent):
    """base^exponent in float64, of the logarithm as the sum of two float32."""
    log2 = tl.cast(log2_base, tl.float64) + tl.cast(log2_base_rest, tl.float64)
    return tl.exp2(exponent.to(tl.float64) * log2)


@triton.jit
def adamw_debt(schedule, then, step, log2_beta1, log2_beta1_rest, log2_beta2, log2_beta2_rest, eps):
    """Of rows as they were after step `then`: steps missed before `step`, what they owe, and factors of the moments."""
    before = tl.cast(step, tl.int32) - 1
    missed = before - then
    decay, drift, eps_row = debt(schedule, then, before, tl.cast(eps, tl.float32))
    shrink1 = power(log2_beta1, log2_beta1_rest, missed).to(tl.float32)
    shrink2 = power(log2_beta2, log2_beta2_rest, missed + 1).to(tl.float32)
    return missed, decay, drift, eps_row, shrink1, shrink2


@triton.jit
def adamw_tile(
    values, exp_avg, exp_avg_sq, at, mask, p, m, v, g, word, column,
    missed, owed_decay, drift, eps_row, shrink1, shrink2, rest1, rest2, root_scale, rate, decay, eps,
):  # fmt: skip
    """Elements `at` of the table and of its moments, in place: p, m and v as they were; g is float32."""
    p = p.to(tl.float32)
    p = tl.where(missed > 0, made_up(p, m, v, owed_decay, drift, eps_row), p)
    m *= shrink1
    m += (g - m) * rest1
    v = v * shrink2 + g * g * rest2
    p = p * decay - rate * m / (root(v) * root_scale + eps)
    tl.store(values + at, to_element(p, word, column, values.dtype.element_ty), mask=mask)
    tl.store(exp_avg + at, m, mask=mask)
    tl.store(exp_avg_sq + at, v, mask=mask)


@triton.jit
def adagrad_factors(schedule, then, step, total, lr, decay, eps):
    """Of rows as they were after step `then`, with sums of squares `total`: factors of the row and of its gradient."""
    owed_decay, _, _ = debt(schedule, then, tl.cast(step, tl.int32) - 1, tl.cast(eps, tl.float32))
    return owed_decay * decay, tl.div_rn(tl.cast(lr, tl.float32), tl.sqrt_rn(total) + eps)


@triton.jit
def adagrad_tile(values, at, mask, p, g, word, column, row_decay, rate):
    """Elements `at` of the table, in place: p as they were; g is float32."""
    p = p.to(tl.float32) * row_decay - g * rate
    tl.store(values + at, to_element(p, word, column, values.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=OPEN)
def adamw_rows_kernel(
    values,
    exp_avg,
    exp_avg_sq,
    last_step,
    schedule,
    rows,
    grads,
    count,
    step,
    seed,
    log2_beta1,
    log2_beta1_rest,
    log2_beta2,
    log2_beta2_rest,
    rest1,
    rest2,
    root_scale,
    rate,
    decay,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Step number `step` of AdamW on the rows `rows` of the table, of gradients `grads`.

    rest = 1 - beta, root_scale = (1 - beta2^step)^-1/2, rate = lr / (1 - beta1^step), decay = 1 - lr * weight_decay.
    Bytes: U * D * (16 + 2 itemsize of the table + itemsize of grads); 40 to 64 a row.
    """
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = index < count
    row = tl.load(rows + index, mask=exists, other=0)
    then = tl.load(last_step + row, mask=exists, other=0)
    missed, owed_decay, drift, eps_row, shrink1, shrink2 = adamw_debt(
        schedule, then, step, log2_beta1, log2_beta1_rest, log2_beta2, log2_beta2_rest, eps
    )
    word = row_word(row, seed, step)
    for start in range(0, D, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        mask = exists[:, None] & (column < D)
        at = row[:, None] * D + column
        p = tl.load(values + at, mask=mask, other=0.0)
        m = tl.load(exp_avg + at, mask=mask, other=0.0)
        v = tl.load(exp_avg_sq + at, mask=mask, other=0.0)
        g = tl.load(grads + index[:, None] * D + column, mask=mask, other=0.0).to(tl.float32)
        adamw_tile(
            values, exp_avg, exp_avg_sq, at, mask, p, m, v, g, word[:, None], column,
            missed[:, None], owed_decay[:, None], drift[:, None], eps_row[:, None], shrink1[:, None], shrink2[:, None],
            rest1, rest2, root_scale, rate, decay, eps,
        )  # fmt: skip
    tl.store(last_step + row, tl.cast(step, tl.int32), mask=exists)


@triton.jit(do_not_specialize=OPEN)
def adagrad_rows_kernel(
    values,
    row_sum,
    last_step,
    schedule,
    rows,
    grads,
    count,
    step,
    seed,
    lr,
    decay,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Step number `step` of row-wise Adagrad on the rows `rows` of the table, of gradients `grads`.

    decay = 1 - lr * weight_decay.
    Bytes: U * D * (2 itemsize of the table + itemsize of grads, whose second reading comes from L1); 36 to 44 a row.
    """
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = index < count
    row = tl.load(rows + index, mask=exists, other=0)
    then = tl.load(last_step + row, mask=exists, other=0)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        mask = exists[:, None] & (column < D)
        g = tl.load(grads + index[:, None] * D + column, mask=mask, other=0.0).to(tl.float32)
        squares += g * g
    total = tl.load(row_sum + row, mask=exists, other=0.0) + tl.sum(squares, axis=1) / D
    tl.store(row_sum + row, total, mask=exists)
    row_decay, rate = adagrad_factors(schedule, then, step, total, lr, decay, eps)
    word = row_word(row, seed, step)
    for start in range(0, D, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        mask = exists[:, None] & (column < D)
        at = row[:, None] * D + column
        p = tl.load(values + at, mask=mask, other=0.0)
        g = tl.load(grads + index[:, None] * D + column, mask=mask, other=0.0).to(tl.float32)
        adagrad_tile(values, at, mask, p, g, word[:, None], column, row_decay[:, None], rate[:, None])
    tl.store(last_step + row, tl.cast(step, tl.int32), mask=exists)


class Power(NamedTuple):
    """log2 of a base as the sum of two float32, in which a kernel takes its numbers."""

    log2: float
    log2_rest: float


def power_of(base: float) -> Power:
    # 2^-inf of nothing missed is not a number: a logarithm that is far enough below every exponent.
    log2 = math.log2(base) if base else -1e30
    head = torch.tensor(log2, dtype=torch.float32).item()
    return Power(head, log2 - head)


def adamw_rows_(
    values_ND: Tensor,
    exp_avg_ND: Tensor,
    exp_avg_sq_ND: Tensor,
    last_step_N: Tensor,
    schedule_S3: Tensor,
    rows_U: Tensor,
    grads_UD: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int,
) -> None:
    refuse_float64(values_ND=values_ND)
    require_contiguous(values_ND=values_ND, exp_avg_ND=exp_avg_ND, exp_avg_sq_ND=exp_avg_sq_ND)
    if not grads_UD.numel():
        return
    count, d = grads_UD.shape
    launch = row_tile(d)
    adamw_rows_kernel[(cdiv(count, launch["ROWS"]),)](
        values_ND, exp_avg_ND, exp_avg_sq_ND, last_step_N, schedule_S3, rows_U, grads_UD,
        count, step, seed, *adamw_scalars(step, lr, beta1, beta2, eps, weight_decay), **launch,
    )  # fmt: skip


def adamw_scalars(
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    """A step's numbers in the order of the kernels' arguments."""
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    rates = (1 - beta1, 1 - beta2, 1 / math.sqrt(correction2), lr / correction1, 1 - lr * weight_decay, eps)
    return (*power_of(beta1), *power_of(beta2), *rates)


def adagrad_rows_(
    values_ND: Tensor,
    row_sum_N: Tensor,
    last_step_N: Tensor,
    schedule_S3: Tensor,
    rows_U: Tensor,
    grads_UD: Tensor,
    step: int,
    lr: float,
    eps: float,
    weight_decay: float,
    seed: int,
) -> None:
    refuse_float64(values_ND=values_ND)
    require_contiguous(values_ND=values_ND)
    if not grads_UD.numel():
        return
    count, d = grads_UD.shape
    launch = row_tile(d)
    adagrad_rows_kernel[(cdiv(count, launch["ROWS"]),)](
        values_ND, row_sum_N, last_step_N, schedule_S3, rows_U, grads_UD,
        count, step, seed, lr, 1 - lr * weight_decay, eps, **launch,
    )  # fmt: skip
