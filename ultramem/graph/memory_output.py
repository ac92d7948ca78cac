"""The last stage of a memory layer: from pooled rows to the residual stream, in the way of each family.

Shapes: T tokens, D hidden size, E blocks, V value dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from torch import Tensor, nn

from ultramem.config import MemoryConfig


class Pooled(NamedTuple):
    """What the lookup found: rows pooled per block [T,E,V], and the sum of the scores in each block [T,E]."""

    rows_TEV: Tensor
    score_sums_TE: Tensor | None
    """None unless the projection has a bias."""


class Project(nn.Module):
    """Virtual blocks to the residual stream: `sum_p W_p pooled_p`, with a bias per block `+ b_p * score sum_p`."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.expansion * config.value_dim))
        shape = (config.expansion, config.hidden_size)
        self.block_bias_ED = nn.Parameter(torch.empty(shape)) if config.project_bias else None

    def forward(self, pooled: Pooled, hidden_TD: Tensor) -> Tensor:
        output_TD = F.linear(pooled.rows_TEV.flatten(1), self.weight)
        if self.block_bias_ED is None:
            return output_TD
        assert pooled.score_sums_TE is not None
        return output_TD + pooled.score_sums_TE.to(output_TD.dtype) @ self.block_bias_ED.to(output_TD.dtype)


class GatedOutput(nn.Module):
    """Memory+: `W2(pooled * silu(W1 x))`, both with bias (arXiv 2412.09764, section 3.1)."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        width = config.expansion * config.value_dim
        self.gate = nn.Linear(config.hidden_size, width)
        self.out = nn.Linear(width, config.hidden_size)

    def forward(self, pooled: Pooled, hidden_TD: Tensor) -> Tensor:
        output_TD: Tensor = self.out(pooled.rows_TEV.flatten(1) * F.silu(self.gate(hidden_TD)))
        return output_TD


class NoOutput(nn.Module):
    """The pooled rows themselves (PKM, PEER)."""

    def forward(self, pooled: Pooled, hidden_TD: Tensor) -> Tensor:
        return pooled.rows_TEV.flatten(1)


def make_output(config: MemoryConfig) -> nn.Module:
    """The stage of `config.output`."""
    if config.output == "project":
        return Project(config)
    return GatedOutput(config) if config.output == "gated" else NoOutput()
