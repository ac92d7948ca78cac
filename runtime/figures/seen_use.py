"""How many different experts and rows a call touches, counted with hooks in a forward that is not timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ultramem import ops
from ultramem.graph.memory_layer import UltraMemLayer
from ultramem.graph.moe import MoE


@torch.no_grad()
def used_by(module: nn.Module, calls: list[Callable[[], object]]) -> float:
    """Different experts, or value rows, that a layer touches in one of `calls`: the mean over layers and calls.

    0 where the module has neither.
    """
    counts: list[int] = []
    handles = []
    for layer in module.modules():
        if isinstance(layer, MoE):
            handles.append(layer.router.register_forward_hook(_count_experts(layer, counts)))
        elif isinstance(layer, UltraMemLayer):
            handles.append(layer.select.register_forward_hook(_count_rows(layer, counts)))
    try:
        for call in calls:
            call()
    finally:
        for handle in handles:
            handle.remove()
    return sum(counts) / len(counts) if counts else 0.0


def _count_experts(layer: MoE, counts: list[int]) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, args: Any, logits_TE: Tensor) -> None:
        counts.append(logits_TE.topk(layer.config.experts_per_token, dim=1).indices.unique().numel())

    return hook


def _count_rows(layer: UltraMemLayer, counts: list[int]) -> Callable[[nn.Module, Any, ops.TopK], None]:
    def hook(module: nn.Module, args: Any, kept: ops.TopK) -> None:
        indices_TK = layer.lookup.virtual_indices(kept.addresses.flatten(1))
        counts.append((indices_TK % layer.config.table_rows).unique().numel())

    return hook
