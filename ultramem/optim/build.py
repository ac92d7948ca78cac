"""The optimisers of a model: dense AdamW for what every step touches, and a choice for the tables."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from ultramem.graph import param_groups
from ultramem.graph.value_table import ValueTable
from ultramem.ops.parts import is_dtensor
from ultramem.optim.lazy_adamw import LazyAdamW
from ultramem.optim.row_adagrad import RowAdagrad
from ultramem.optim.table_optimizer import TableOptimizer

Tables = Literal["adamw", "lazy_adamw", "row_adagrad"]


def build_optimizers(
    model: nn.Module,
    *,
    lr: float,
    value_lr_ratio: float = 10.0,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    tables: Tables = "adamw",
    seed: int = 0,
) -> list[torch.optim.Optimizer]:
    """The optimisers of `model`: AdamW first, then that of the value tables, if it is another and there are any.

    Sets each table's `sparse_grad`, and its `lazy_rows` and `lazy_experts` where the optimiser leaves rows stale. The
    groups are those of `ultramem.param_groups`, each with its `name`: set `group["lr"]` every step.

    Args:
        model: any module; memory layers are found wherever they are.
        lr: of all but the value tables.
        value_lr_ratio: of the value tables, over `lr`.
        weight_decay: of matrices, key sets and value tables.
        betas: of AdamW, dense and lazy.
        eps: of every optimiser.
        tables: "adamw" is dense, as in the paper; its cost follows the size of the table. "lazy_adamw" does the same
            on touched rows. "row_adagrad" keeps 8 bytes of state a row.
        seed: of the stochastic rounding of bfloat16 tables.

    Raises:
        ValueError: a number is out of range, or `tables` is none of the three.
    """
    if tables not in get_args(Tables):
        raise ValueError(f"tables must be one of {', '.join(get_args(Tables))}, got {tables!r}")
    groups = param_groups(model, lr=lr, value_lr_ratio=value_lr_ratio, weight_decay=weight_decay)
    found = [module for module in model.modules() if isinstance(module, ValueTable)]
    for table in found:
        table.sparse_grad = tables != "adamw"
        table.lazy_rows = table.lazy_experts = None
    groups = [part for group in groups for part in _without_mixture(group)]
    dense = [group for group in groups if tables == "adamw" or group["name"] != "values"]
    sparse = [group for group in groups if tables != "adamw" and group["name"] == "values"]
    optimizers: list[torch.optim.Optimizer] = []
    if dense:
        optimizers.append(torch.optim.AdamW(dense, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True))
    if sparse:
        optimizer: TableOptimizer
        if tables == "lazy_adamw":
            optimizer = LazyAdamW(sparse, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, seed=seed)
        else:
            optimizer = RowAdagrad(sparse, lr=lr, eps=eps, weight_decay=weight_decay, seed=seed)
        if tables == "lazy_adamw" or weight_decay > 0:
            for table in found:
                optimizer.attach(table.values_NV, partial(setattr, table, "lazy_rows"))
                if table.experts_NP is not None:
                    optimizer.attach(table.experts_NP, partial(setattr, table, "lazy_experts"))
        optimizers.append(optimizer)
    return optimizers


def _without_mixture(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The group, or two of its name: a fused update takes DTensors or plain tensors, and not both at once."""
    parts = [[each for each in group["params"] if is_dtensor(each) == cut] for cut in (False, True)]
    return [{**group, "params": params} for params in parts if params]
