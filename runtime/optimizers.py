"""The optimisers of a run, and how the value tables are kept for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ultramem.config import TrainConfig
from ultramem.graph.value_table import ValueTable
from ultramem.optim import TableOptimizer, build_optimizers


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The optimisers that `config` names, after casting the tables to their dtype."""
    for module in model.modules():
        if isinstance(module, ValueTable):
            module.to(getattr(torch, config.table_dtype))
    return build_optimizers(
        model,
        lr=config.lr,
        value_lr_ratio=config.value_lr_ratio,
        weight_decay=config.weight_decay,
        betas=(config.beta1, config.beta2),
        tables=config.table_optimizer,
        seed=config.seed,
    )


def sync(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Let optimisers that leave untouched rows behind make up for it, before the weights are looked at."""
    for optimizer in optimizers:
        if isinstance(optimizer, TableOptimizer):
            optimizer.sync()
