"""Projected values: rows that are multiplied with the projector once, instead of their sum for every token.

The output of a layer without virtual blocks is `W sum_k s_k v_k = sum_k s_k (W v_k)`. With cores, each of which weights
columns of its own, a row becomes one of the model's width for each core. Where that is no wider than the row was, the
projector is no more read, and neither is more of the table.

Shapes: N rows, V value dim, D hidden size, C cores, T tokens, R rows at a time.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ultramem.config import MemoryConfig
from ultramem.graph.memory_output import Pooled, Project
from ultramem.graph.value_table import ValueTable
from ultramem.ops.huge_pages import LARGE_BYTES, advise_huge_pages

_ROWS_AT_ONCE = 1 << 14


def has_foldable_values(config: MemoryConfig) -> bool:
    """Whether a layer's values can be projected once without a wider table.

    With E virtual blocks a row would have to be projected E ways; a table that layers share, in as many.
    """
    return (
        config.output == "project"
        and config.expansion == 1
        and config.table == "own"
        and config.num_cores * config.hidden_size <= config.value_dim
    )


class ProjectedOutput(nn.Module):
    """In the place of `Project`: the cores' shares of rows that are projected already, added up."""

    def __init__(self, config: MemoryConfig, project: Project) -> None:
        super().__init__()
        self.num_cores = config.num_cores
        self.block_bias_ED = project.block_bias_ED

    def forward(self, pooled: Pooled, hidden_TD: Tensor) -> Tensor:
        output_TD: Tensor = pooled.rows_TEV.flatten(1).unflatten(1, (self.num_cores, -1)).sum(1)
        if self.block_bias_ED is None:
            return output_TD
        assert pooled.score_sums_TE is not None
        return output_TD + pooled.score_sums_TE.to(output_TD.dtype) @ self.block_bias_ED.to(output_TD.dtype)


def fold_values(layer: nn.Module, config: MemoryConfig) -> None:
    """Give a layer a table of projected rows and an output without a projector, in place; its input rows are shared.

    Args:
        layer: a copied `UltraMemLayer` whose config `has_foldable_values`, its table a `ValueTable`.
        config: of the layer.
    """
    table, project = layer.table, layer.expand
    assert isinstance(table, ValueTable)
    assert isinstance(project, Project)
    cores, width = config.num_cores, config.value_dim // config.num_cores
    with torch.device("meta"):
        folded = ValueTable(replace(config, value_dim=cores * config.hidden_size))
    rows_ND = torch.empty(folded.values_NV.shape, dtype=table.values_NV.dtype, device=table.values_NV.device)
    advise_huge_pages(rows_ND, at_least_bytes=LARGE_BYTES)
    weight_CVD = project.weight.view(config.hidden_size, cores, width).permute(1, 2, 0)
    for rows_RV, out_RD in zip(table.values_NV.split(_ROWS_AT_ONCE), rows_ND.split(_ROWS_AT_ONCE), strict=True):
        projected_CRD = rows_RV.unflatten(1, (cores, width)).transpose(0, 1) @ weight_CVD
        out_RD.copy_(projected_CRD.transpose(0, 1).flatten(1))
    folded.values_NV = nn.Parameter(rows_ND, requires_grad=False)
    folded.experts_NP = table.experts_NP
    layer.register_module("table", folded.eval())
    layer.register_module("expand", ProjectedOutput(config, project).eval())
