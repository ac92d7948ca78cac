"""Tables in the middle of a training with a lazy optimiser, and what a dense one would have made of them."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ultramem.ops import Implementation, LazyRows, adagrad_rows_, adamw_rows_
from ultramem.optim.schedule import advance_, new_schedule

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
NAMES = {"adamw": ("values", "exp_avg", "exp_avg_sq"), "adagrad": ("values", "row_sum")}
STEPS, BETAS, DECAY, EPS = 12, (0.9, 0.95), 0.1, 1e-18
SEED = (7 << 32) + 5
CPU = torch.device("cpu")


def lr(step: int) -> float:
    return 1e-2 * (1 + step % 3)


class Table(NamedTuple):
    """A table [N,D] whose rows were last touched at steps of their own, and its optimiser's state, after STEPS."""

    values: Tensor
    lazy: LazyRows
    row_sum: Tensor
    rows: Tensor
    grads: Tensor

    def state(self) -> list[Tensor]:
        moments = [m for m in (self.lazy.exp_avg_ND, self.lazy.exp_avg_sq_ND) if m is not None]
        return [self.values, self.lazy.last_step_N, self.row_sum, *moments]

    def to(self, device: torch.device) -> Table:
        lazy = LazyRows(*(x.to(device) if isinstance(x, Tensor) else x for x in self.lazy))
        return Table(self.values.to(device), lazy, *(x.to(device) for x in (self.row_sum, self.rows, self.grads)))

    def updated(self, rule: str) -> Table:
        """After step STEPS + 1; this one stays as it is."""
        moments = (m if m is None else m.clone() for m in (self.lazy.exp_avg_ND, self.lazy.exp_avg_sq_ND))
        lazy = LazyRows(self.lazy.schedule_S3, self.lazy.step, self.lazy.last_step_N.clone(), *moments, EPS)
        table = Table(self.values.clone(), lazy, self.row_sum.clone(), self.rows, self.grads)
        step = {"step": STEPS + 1, "lr": lr(STEPS + 1), "weight_decay": DECAY, "seed": SEED}
        if rule == "adamw":
            adamw_rows_(table.values, lazy, table.rows, table.grads, betas=BETAS, **step)
        else:
            adagrad_rows_(table.values, lazy, table.row_sum, table.rows, table.grads, **step)
        return table


def make_table(
    n: int, d: int, touched: int, dtype: torch.dtype, rule: str = "adamw", device: torch.device = CPU
) -> Table:
    torch.manual_seed(0)
    schedule = new_schedule(torch.device("cpu"))
    for step in range(1, STEPS + 1):
        advance_(schedule, step, lr=lr(step), weight_decay=DECAY, betas=BETAS if rule == "adamw" else None)
    wide = torch.promote_types(dtype, F32)
    last_step = torch.randint(0, STEPS + 1, (n,), dtype=torch.int32)
    values, moment, square, grads = (
        torch.randn(n, d),
        torch.randn(n, d),
        torch.rand(n, d) + 0.1,
        torch.randn(touched, d),
    )
    moments = (moment.to(wide), square.to(wide)) if rule == "adamw" else (None, None)
    lazy = LazyRows(schedule, torch.tensor(STEPS), last_step, *moments, EPS)
    rows = torch.randperm(n)[:touched].sort().values
    return Table(values.to(dtype), lazy, torch.rand(n).to(wide), rows, grads.to(dtype)).to(device)


def in_dtype(table: Table, dtype: torch.dtype) -> Table:
    moments = (m if m is None else m.to(dtype) for m in (table.lazy.exp_avg_ND, table.lazy.exp_avg_sq_ND))
    lazy = LazyRows(*table.lazy[:3], *moments, EPS)
    return Table(table.values.to(dtype), lazy, table.row_sum.to(dtype), table.rows, table.grads.to(dtype))


def with_coarse_gradients(table: Table) -> Table:
    """Gradients whose squares add up to the same in any order."""
    return table._replace(grads=(4 * table.grads).round() / 4)


def oracle(table: Table, rule: str, *, read: bool = False) -> list[Tensor]:
    """The touched rows in float64, step by step from the last that touched them: values and what the rule keeps."""
    rows = in_dtype(table, F64)
    values = rows.values[table.rows]
    if rule == "adamw":
        m, v = rows.lazy.exp_avg_ND[table.rows], rows.lazy.exp_avg_sq_ND[table.rows]
    sums = rows.row_sum[table.rows]
    last = table.lazy.last_step_N[table.rows].unsqueeze(1)
    for step in range(1, STEPS + 1 if read else STEPS + 2):
        due = last < step
        grads = rows.grads if step == STEPS + 1 else torch.zeros_like(values)
        moved = values * (1 - lr(step) * DECAY)
        if rule == "adamw":
            m = torch.where(due, m * BETAS[0] + (1 - BETAS[0]) * grads, m)
            v = torch.where(due, v * BETAS[1] + (1 - BETAS[1]) * grads**2, v)
            m_hat, v_hat = m / (1 - BETAS[0] ** step), v / (1 - BETAS[1] ** step)
            moved = moved - lr(step) * m_hat / (v_hat.sqrt() + EPS)
        elif step == STEPS + 1:
            sums = sums + grads.square().mean(1)
            moved = moved - lr(step) * grads / (sums.sqrt().unsqueeze(1) + EPS)
        values = torch.where(due, moved, values)
    return [values, m, v] if rule == "adamw" else [values, sums]


def kept(table: Table, rule: str) -> list[Tensor]:
    lazy = table.lazy
    tensors = [table.values, lazy.exp_avg_ND, lazy.exp_avg_sq_ND] if rule == "adamw" else [table.values, table.row_sum]
    return [tensor[table.rows] for tensor in tensors]


def skip_refused(implementation: Implementation, dtype: torch.dtype) -> None:
    if dtype == F64 and implementation is Implementation.TRITON:
        pytest.skip("the kernels refuse float64")
