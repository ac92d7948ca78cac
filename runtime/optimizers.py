"""The optimisers of a run, and what they have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ultramem.config import TrainConfig
from ultramem.graph import param_groups
from ultramem.graph.value_table import ValueTable


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The optimisers of `model`; their groups carry `name`: "values", "weights" or "scales".

    Raises:
        ValueError: there is no optimiser for the value tables of that name.
    """
    if config.table_optimizer != "adamw":
        raise ValueError(f"table_optimizer must be adamw, got {config.table_optimizer!r}")
    groups = param_groups(model, lr=config.lr, value_lr_ratio=config.value_lr_ratio, weight_decay=config.weight_decay)
    return [torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)]


def cast_tables(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the value tables in `dtype`; call it before the optimisers are made."""
    for module in model.modules():
        if isinstance(module, ValueTable):
            module.values_NV.data = module.values_NV.data.to(dtype)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients down to a global norm of `max_norm` (0: leave them); returns the norm before."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)


def sync(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Let optimisers that leave untouched rows behind make up for it, before the weights are looked at."""
    for optimizer in optimizers:
        if hasattr(optimizer, "sync"):
            optimizer.sync()
