"""What a row-wise optimiser owes the rows that had no gradient, made up when a row is next read or written.

Decoupled weight decay, and the steps that momentum alone would still have taken, depend on a row's own moments and on
the pair (last step of the row, current step), never on the steps between them one by one. So one number per past step
and kind settles the debt of any row.

Shapes: N rows, D columns, U touched rows, S steps (or more) in the schedule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ultramem.ops._registration import accumulation_dtype
from ultramem.ops.implementation import runs_native, runs_triton

LOG_DECAY, DRIFT, DRIFT_EPS = range(3)
"""Columns of the schedule."""

# Measured on a CPU at 2^15 rows of 64: 2^16 to 2^20 are alike, 2^14 takes half as long again, all in one twice as long.
_CHUNK_ELEMENTS_CPU = 1 << 18
_CHUNK_ELEMENTS_GPU = 1 << 24


class LazyRows(NamedTuple):
    """The optimiser state from which stale rows are made up. Row i is as it was after step `last_step_N[i]`.

    With learning rate `lr_s` and decay `w` at step s, `L_s = sum_{u<=s} log(1 - lr_u w)`, now t, and the bias
    corrections `b1_u = 1 - beta1^u`, `b2_u = 1 - beta2^u`, the columns of row s of the schedule are

    - `LOG_DECAY`: `L_s`;
    - `DRIFT`:     `sum_{s<u<=t} lr_u sqrt(b2_u)/b1_u (beta1/sqrt(beta2))^(u-s) exp(L_s - L_u)`;
    - `DRIFT_EPS`: `sum_{s<u<=t} lr_u b2_u/b1_u       (beta1/beta2)^(u-s)       exp(L_s - L_u)`.
    """

    schedule_S3: Tensor
    """float64."""
    step: Tensor
    """t, int64, a scalar."""
    last_step_N: Tensor
    """int32."""
    exp_avg_ND: Tensor | None
    """First moment as of `last_step_N`; None for an optimiser without momentum, which owes the decay alone."""
    exp_avg_sq_ND: Tensor | None
    """Second moment as of `last_step_N`."""
    eps: float


def catch_up_rows(values_ND: Tensor, lazy: LazyRows, rows_U: Tensor) -> Tensor:
    """Rows of the table [N,D], up to date: [U,D] in the dtype in which they are updated. See `catch_up_`."""
    if runs_triton(values_ND):
        from ultramem.ops.triton import catch_up as kernels

        return kernels.catch_up_rows(values_ND, lazy, rows_U)
    if runs_native(values_ND):
        caught_up_UD: Tensor = torch.ops.ultramem_native.catch_up_rows(
            *(values_ND, lazy.schedule_S3, lazy.step, lazy.last_step_N, lazy.exp_avg_ND, lazy.exp_avg_sq_ND),
            *(lazy.eps, rows_U),
        )
        return caught_up_UD
    return catch_up_(values_ND.index_select(0, rows_U).to(accumulation_dtype(values_ND.dtype)), lazy, rows_U)


def catch_up_(values_UD: Tensor, lazy: LazyRows, rows_U: Tensor) -> Tensor:
    """Bring `values_UD`, a copy of rows `rows_U` of the table, up to date in place.

    `p <- exp(L_t - L_s) (p - F m / (sqrt(v) + eps G/F))` with s the row's last step, F its drift and G its drift_eps:
    the missed steps of AdamW exactly where eps is nothing beside sqrt(v), and to first order in eps elsewhere.

    Args:
        values_UD: float32 or float64, written to.
        lazy: the state of all N rows.
        rows_U: row numbers, int64.

    Returns:
        `values_UD`.
    """
    chunk = chunk_rows(values_UD)
    for values, rows in zip(values_UD.split(chunk), rows_U.split(chunk), strict=True):
        _catch_up_chunk_(values, lazy, rows)
    return values_UD


def _catch_up_chunk_(values_UD: Tensor, lazy: LazyRows, rows_U: Tensor) -> None:
    owed_U3 = lazy.schedule_S3.index_select(0, lazy.last_step_N.index_select(0, rows_U).long())
    now_13 = lazy.schedule_S3.index_select(0, lazy.step.view(1))
    decay_U = (now_13[:, LOG_DECAY] - owed_U3[:, LOG_DECAY]).exp()
    if lazy.exp_avg_ND is not None and lazy.exp_avg_sq_ND is not None:
        drift_U, drift_eps_U = owed_U3[:, DRIFT], owed_U3[:, DRIFT_EPS]
        eps_U = lazy.eps * torch.where(drift_U > 0, drift_eps_U / drift_U, 1.0)
        dtype = values_UD.dtype
        denominator_UD = lazy.exp_avg_sq_ND.index_select(0, rows_U).sqrt_().add_(eps_U.to(dtype).unsqueeze(1))
        direction_UD = lazy.exp_avg_ND.index_select(0, rows_U).div_(denominator_UD)
        values_UD.addcmul_(direction_UD, drift_U.to(dtype).unsqueeze(1), value=-1)
    values_UD.mul_(decay_U.to(values_UD.dtype).unsqueeze(1))


def chunk_rows(table_ND: Tensor) -> int:
    """Rows to work on at a time: temporaries stay in a CPU's caches, and a GPU has more to do than to launch."""
    elements = _CHUNK_ELEMENTS_CPU if table_ND.device.type == "cpu" else _CHUNK_ELEMENTS_GPU
    return max(1, elements // max(1, table_ND.shape[1]))
