"""AdamW on touched rows, with the steps that a row missed made up.

Shapes: N rows, D columns, U touched rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ultramem import ops
from ultramem.ops.huge_pages import LARGE_BYTES, advise_huge_pages
from ultramem.ops.update_rows import power
from ultramem.optim.schedule import require_decaying_drift
from ultramem.optim.table_optimizer import Group, State, TableOptimizer, _update_dtype


class LazyAdamW(TableOptimizer):
    """AdamW for tables [N,D] at a cost that follows the touched rows, with the results of AdamW on every row.

    A row that had no gradient since step s owes the decay of its weights and moments and the drift by its dying
    momentum; `ultramem.ops.LazyRows` has the formula. Where its reader is `attach`ed, the model sees in each forward
    the rows that dense AdamW would have, up to rounding and second order in eps / sqrt(v). Without one, it sees rows
    as of their last gradient, and differs from dense AdamW by that.

    State: `exp_avg`, `exp_avg_sq` [N,D] in float32 (float64 for a float64 table), `last_step` [N] and the schedule.

    Args:
        params: tables, or groups of them.
        lr: below 1 / weight_decay.
        betas: beta1 < beta2.
        eps: as in AdamW.
        weight_decay: decoupled.
        seed: of the stochastic rounding of bfloat16 tables.

    Raises:
        ValueError: a number is out of range, or a parameter is no table.
        TypeError: a table's dtype is not float32, bfloat16 or float64.
    """

    betas: tuple[float, float]

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        seed: int = 0,
    ) -> None:
        require_decaying_drift(betas)
        self.betas = betas
        super().__init__(params, lr=lr, weight_decay=weight_decay, eps=eps, seed=seed)

    def _new_state(self, parameter: Tensor) -> State:
        def zeros() -> Tensor:
            moment = torch.zeros_like(parameter, dtype=_update_dtype(parameter), requires_grad=False)
            advise_huge_pages(moment, at_least_bytes=LARGE_BYTES)
            return moment

        return super()._new_state(parameter) | {"exp_avg": zeros(), "exp_avg_sq": zeros()}

    def _catch_up_moments(self, state: State, rows_U: Tensor, now: int) -> None:
        missed_U = now - state["last_step"].index_select(0, rows_U)
        for name, beta in zip(("exp_avg", "exp_avg_sq"), self.betas, strict=True):
            moment_UD = state[name].index_select(0, rows_U)
            state[name].index_copy_(0, rows_U, moment_UD.mul_(power(beta, missed_U, moment_UD.dtype)))

    def _update(
        self, parameter: Tensor, state: State, group: Group, rows_U: Tensor, grads_UD: Tensor, now: int
    ) -> None:
        ops.adamw_rows_(
            parameter,
            self.lazy_rows(parameter),
            rows_U,
            grads_UD,
            step=now,
            lr=group["lr"],
            betas=self.betas,
            weight_decay=group["weight_decay"],
            seed=self.seed,
        )
