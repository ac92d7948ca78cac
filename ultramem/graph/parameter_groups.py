"""Parameters grouped for an optimiser: value tables learn faster, scales and small cores do not decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from ultramem.graph.memory_layer import Query, Select
from ultramem.graph.memory_output import Project
from ultramem.graph.value_table import ValueTable


def param_groups(
    model: nn.Module, *, lr: float, value_lr_ratio: float = 10.0, weight_decay: float = 0.1
) -> list[dict[str, Any]]:
    """Groups for `torch.optim.AdamW(groups)` and the like; each also holds `name` and `initial_lr`.

    "values": the tables of every memory layer in `model`, at `lr * value_lr_ratio`, decayed.
    "weights": the other matrices, decayed. "scales": norms, biases, convolutions and cores, not decayed.
    The paper lowers the ratio linearly to 1 over training; scale the group's `lr` by your schedule.

    Args:
        model: any module; memory layers are found wherever they are.
        lr: of all but the value tables.
        value_lr_ratio: of the value tables, over `lr`.
        weight_decay: of matrices, key sets and value tables.

    Raises:
        ValueError: lr, value_lr_ratio or weight_decay is negative.
    """
    for name, number in (("lr", lr), ("value_lr_ratio", value_lr_ratio), ("weight_decay", weight_decay)):
        if not number >= 0:
            raise ValueError(f"{name} must be at least 0, got {number}")
    values, small = set(), set()
    for module in model.modules():
        if isinstance(module, ValueTable):
            values |= {id(parameter) for parameter in module.parameters()}
        elif isinstance(module, Query):
            small.add(id(module.conv_DW))
        elif isinstance(module, Select):
            small.add(id(module.cores_HCRR))
        elif isinstance(module, Project):
            small.add(id(module.block_bias_ED))
    groups: dict[str, list[nn.Parameter]] = {"values": [], "weights": [], "scales": []}
    for parameter in model.parameters():
        if id(parameter) in values:
            groups["values"].append(parameter)
        elif id(parameter) in small or parameter.ndim < 2:
            groups["scales"].append(parameter)
        else:
            groups["weights"].append(parameter)
    rates = {"values": lr * value_lr_ratio, "weights": lr, "scales": lr}
    decays = {"values": weight_decay, "weights": weight_decay, "scales": 0.0}
    return [
        {"name": name, "params": params, "lr": rates[name], "initial_lr": rates[name], "weight_decay": decays[name]}
        for name, params in groups.items()
        if params
    ]
