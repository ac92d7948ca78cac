"""A step of an optimiser on the touched rows of a table, in place: what they missed is made up, then they move.

Shapes: N rows, D columns, U touched rows, S steps (or more) in the schedule.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ultramem.ops import _checks as checks
from ultramem.ops._registration import opaque_op
from ultramem.ops.catch_up import LazyRows, catch_up_rows, chunk_rows
from ultramem.ops.implementation import runs_native, runs_triton
from ultramem.ops.round_stochastically import round_stochastically


@opaque_op("ultramem::adamw_rows_", mutates=("values_ND", "exp_avg_ND", "exp_avg_sq_ND", "last_step_N"))
def _adamw_rows_(
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
    if runs_triton(values_ND):
        from ultramem.ops.triton import update_rows as kernels

        kernels.adamw_rows_(
            *(values_ND, exp_avg_ND, exp_avg_sq_ND, last_step_N, schedule_S3, rows_U, grads_UD),
            *(step, lr, beta1, beta2, eps, weight_decay, seed),
        )
        return
    if runs_native(values_ND):
        torch.ops.ultramem_native.adamw_rows_(
            *(values_ND, exp_avg_ND, exp_avg_sq_ND, last_step_N, schedule_S3, rows_U, grads_UD),
            *(step, lr, beta1, beta2, eps, weight_decay, seed),
        )
        return
    before = torch.full((), step - 1, device=values_ND.device)
    lazy = LazyRows(schedule_S3, before, last_step_N, exp_avg_ND, exp_avg_sq_ND, eps)
    chunk = chunk_rows(values_ND)
    for rows, grads in zip(rows_U.split(chunk), grads_UD.split(chunk), strict=True):
        values_UD = catch_up_rows(values_ND, lazy, rows)
        grads = grads.to(values_UD.dtype)
        missed = step - 1 - last_step_N.index_select(0, rows)
        exp_avg_UD = exp_avg_ND.index_select(0, rows).mul_(power(beta1, missed, values_UD.dtype))
        exp_avg_UD.lerp_(grads, 1 - beta1)
        exp_avg_sq_UD = exp_avg_sq_ND.index_select(0, rows).mul_(power(beta2, missed + 1, values_UD.dtype))
        exp_avg_sq_UD.addcmul_(grads, grads, value=1 - beta2)
        denominator_UD = exp_avg_sq_UD.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
        values_UD.mul_(1 - lr * weight_decay)
        values_UD.addcdiv_(exp_avg_UD, denominator_UD, value=-lr / (1 - beta1**step))
        write_rows_(values_ND, rows, values_UD, step=step, seed=seed)
        exp_avg_ND.index_copy_(0, rows, exp_avg_UD)
        exp_avg_sq_ND.index_copy_(0, rows, exp_avg_sq_UD)
        last_step_N.index_fill_(0, rows, step)


@opaque_op("ultramem::adagrad_rows_", mutates=("values_ND", "row_sum_N", "last_step_N"))
def _adagrad_rows_(
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
    if runs_triton(values_ND):
        from ultramem.ops.triton import update_rows as kernels

        kernels.adagrad_rows_(
            *(values_ND, row_sum_N, last_step_N, schedule_S3, rows_U, grads_UD),
            *(step, lr, eps, weight_decay, seed),
        )
        return
    if runs_native(values_ND):
        torch.ops.ultramem_native.adagrad_rows_(
            *(values_ND, row_sum_N, last_step_N, schedule_S3, rows_U, grads_UD),
            *(step, lr, eps, weight_decay, seed),
        )
        return
    before = torch.full((), step - 1, device=values_ND.device)
    lazy = LazyRows(schedule_S3, before, last_step_N, None, None, eps)
    chunk = chunk_rows(values_ND)
    for rows, grads in zip(rows_U.split(chunk), grads_UD.split(chunk), strict=True):
        values_UD = catch_up_rows(values_ND, lazy, rows)
        grads = grads.to(values_UD.dtype)
        row_sum_U = row_sum_N.index_select(0, rows) + grads.square().mean(1)
        values_UD.mul_(1 - lr * weight_decay)
        values_UD.addcdiv_(grads, row_sum_U.sqrt().add_(eps).unsqueeze(1), value=-lr)
        write_rows_(values_ND, rows, values_UD, step=step, seed=seed)
        row_sum_N.index_copy_(0, rows, row_sum_U)
        last_step_N.index_fill_(0, rows, step)


@_adamw_rows_.register_fake
def _(*state: Any) -> None:
    return None


@_adagrad_rows_.register_fake
def _(*state: Any) -> None:
    return None


def adamw_rows_(
    values_ND: Tensor,
    lazy: LazyRows,
    rows_U: Tensor,
    grads_UD: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    seed: int = 0,
) -> None:
    """Step number `step` of AdamW on the touched rows, in place, after the steps that each of them missed.

    Of a row that was last touched at step s, with `k = step - 1 - s`:

    `p <- catch_up(p)`, `m <- beta1^(k+1) m + (1 - beta1) g`, `v <- beta2^(k+1) v + (1 - beta2) g^2`,
    `p <- (1 - lr w) p - lr m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)`.

    Args:
        values_ND: the table [N,D], float32, bfloat16 (updated in float32, rounded stochastically) or float64.
        lazy: its state as of `step - 1`; `last_step_N` and the moments are written, the schedule is not.
        rows_U: touched rows, int64, each named once.
        grads_UD: their gradients, in the dtype of the table or in float32.
        step: from 1.
        lr: of this step.
        betas: of both moments.
        weight_decay: decoupled.
        seed: of the rounding.

    Raises:
        TypeError: rows are not int64.
        ValueError: a shape does not fit, or the state has no moments.
    """
    if lazy.exp_avg_ND is None or lazy.exp_avg_sq_ND is None:
        raise ValueError("lazy must have moments (exp_avg_ND, exp_avg_sq_ND), got None")
    _require_rows(values_ND, lazy, rows_U, grads_UD)
    _adamw_rows_(
        *(values_ND, lazy.exp_avg_ND, lazy.exp_avg_sq_ND, lazy.last_step_N, lazy.schedule_S3),
        *(rows_U.contiguous(), grads_UD.contiguous(), step, lr, *betas, lazy.eps, weight_decay, seed),
    )


def adagrad_rows_(
    values_ND: Tensor,
    lazy: LazyRows,
    row_sum_N: Tensor,
    rows_U: Tensor,
    grads_UD: Tensor,
    *,
    step: int,
    lr: float,
    weight_decay: float,
    seed: int = 0,
) -> None:
    """Step number `step` of row-wise Adagrad on the touched rows, in place, after the decay that each of them missed.

    `p <- catch_up(p)`, `a <- a + mean(g^2)`, `p <- (1 - lr w) p - lr g / (sqrt(a) + eps)`.

    Args:
        values_ND: the table [N,D], float32, bfloat16 (updated in float32, rounded stochastically) or float64.
        lazy: its state as of `step - 1`, without moments; `last_step_N` is written.
        row_sum_N: a, float32 (float64 for a float64 table); written.
        rows_U: touched rows, int64, each named once.
        grads_UD: their gradients, in the dtype of the table or in float32.
        step: from 1.
        lr: of this step.
        weight_decay: decoupled.
        seed: of the rounding.

    Raises:
        TypeError: rows are not int64.
        ValueError: a shape does not fit.
    """
    _require_rows(values_ND, lazy, rows_U, grads_UD)
    checks.require_shape("row_sum_N", row_sum_N, values_ND.shape[:1], "the rows of values_ND")
    _adagrad_rows_(
        *(values_ND, row_sum_N, lazy.last_step_N, lazy.schedule_S3),
        *(rows_U.contiguous(), grads_UD.contiguous(), step, lr, lazy.eps, weight_decay, seed),
    )


def _require_rows(values_ND: Tensor, lazy: LazyRows, rows_U: Tensor, grads_UD: Tensor) -> None:
    checks.require_tensor("values_ND", values_ND, ndim=2, shape="[N,D]")
    checks.require_tensor("rows_U", rows_U, ndim=1, shape="[U]")
    checks.require_int64("rows_U", rows_U)
    checks.require_shape("grads_UD", grads_UD, (rows_U.shape[0], values_ND.shape[1]), "rows_U, then D")
    checks.require_shape("lazy.last_step_N", lazy.last_step_N, values_ND.shape[:1], "the rows of values_ND")


def write_rows_(values_ND: Tensor, rows_U: Tensor, updated_UD: Tensor, *, step: int, seed: int) -> None:
    """Put rows back into their table, rounded stochastically if it is bfloat16."""
    if values_ND.dtype == torch.bfloat16:
        updated_UD = round_stochastically(updated_UD, rows_U, seed=seed, step=step)
    values_ND.index_copy_(0, rows_U, updated_UD)


def power(base: float, exponent_U: Tensor, dtype: torch.dtype) -> Tensor:
    """`base ** exponent` [U,1], computed in float64."""
    return (base ** exponent_U.double()).to(dtype).unsqueeze(1)
