"""Adagrad with one accumulator a row: the state of a table is a column.

Shapes: N rows, D columns, U touched rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ultramem import ops
from ultramem.optim.table_optimizer import Group, State, TableOptimizer, _update_dtype


class RowAdagrad(TableOptimizer):
    """Adagrad for tables [N,D] whose learning rates are per row, with decoupled weight decay.

    With the gradient g of a row: `a += mean(g^2)`, `p <- (1 - lr w) p - lr g / (sqrt(a) + eps)`. A row without a
    gradient only decays, and that is made up when it is read (by an `attach`ed reader) or touched; without
    `weight_decay` it owes nothing.

    State: `row_sum` [N] in float32 (float64 for a float64 table), `last_step` [N] and the schedule: 8 bytes a row.

    Args:
        params: tables, or groups of them.
        lr: below 1 / weight_decay.
        eps: keeps the first steps of rows with tiny gradients small.
        weight_decay: decoupled.
        seed: of the stochastic rounding of bfloat16 tables.

    Raises:
        ValueError: a number is out of range, or a parameter is no table.
        TypeError: a table's dtype is not float32, bfloat16 or float64.
    """

    betas: None = None

    def __init__(
        self, params: Any, *, lr: float = 1e-2, eps: float = 1e-8, weight_decay: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, eps=eps, seed=seed)

    def _new_state(self, parameter: Tensor) -> State:
        sums = torch.zeros(parameter.shape[0], dtype=_update_dtype(parameter), device=parameter.device)
        return super()._new_state(parameter) | {"row_sum": sums}

    def _update(
        self, parameter: Tensor, state: State, group: Group, rows_U: Tensor, grads_UD: Tensor, now: int
    ) -> None:
        ops.adagrad_rows_(
            parameter,
            self.lazy_rows(parameter),
            state["row_sum"],
            rows_U,
            grads_UD,
            step=now,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            seed=self.seed,
        )
