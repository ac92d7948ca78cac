"""A table in a wider type than it is stored in: rows are converted as they are read, the table is never copied.

It serves as an oracle: twice the bytes of a large table would not fit where the table does.

Shapes: T tokens, K slots a token, C cores, E blocks, V value dim, P expert dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ultramem import ops
from ultramem.graph.quantized_table import QuantizedValueTable
from ultramem.graph.sharded_table import ShardedValueTable
from ultramem.graph.shared_copy import shared_copy
from ultramem.graph.transformer import Transformer
from ultramem.graph.value_table import ValueTable


class GatheredTable(nn.Module):
    """The rows of another table in `dtype`."""

    def __init__(self, table: ValueTable | QuantizedValueTable, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.source = (table,)  # in a tuple, so that no conversion of the model reaches it
        rows = table.values_NV if isinstance(table, ValueTable) else table.rows_NB
        self.num_rows = rows.shape[0]

    def forward(
        self, indices_TK: Tensor, scores_TKC: Tensor, num_blocks: int, *, permutation_seed: int | None = None
    ) -> Tensor:
        """Pooled rows [T,E,V]."""
        if permutation_seed is not None:
            indices_TK = ops.permute_addresses(indices_TK, num_blocks * self.num_rows, permutation_seed)
        read = (indices_TK % self.num_rows).flatten()
        rows = self.source[0].gather(read).to(self.dtype)
        own = torch.arange(read.shape[0], device=read.device).view(indices_TK.shape)  # slot i reads row i of `rows`
        indices_TK = indices_TK // self.num_rows * read.shape[0] + own
        return ops.lookup_reduce(rows, indices_TK, scores_TKC.to(self.dtype), num_blocks=num_blocks)

    def expert_products(self, indices_TK: Tensor, query_TP: Tensor) -> Tensor:
        """Products [T,K] of the query with the input rows."""
        read = (indices_TK % self.num_rows).flatten()
        rows_TKP = self.source[0].gather_experts(read).to(self.dtype).view(*indices_TK.shape, -1)
        return (rows_TKP @ query_TP.to(self.dtype).unsqueeze(-1)).squeeze(-1)


def in_precision(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A model that computes in `dtype` with the weights of `model`: tables are shared, all else is copied.

    Parts of tables that several ranks hold are copied too: their rows are gathered over the ranks.
    """

    def gathered(module: nn.Module) -> nn.Module | None:
        if isinstance(module, ShardedValueTable) or not isinstance(module, ValueTable | QuantizedValueTable):
            return None
        return GatheredTable(module, dtype)

    return shared_copy(
        model, tensors=lambda each: each.to(dtype) if each.is_floating_point() else each, modules=gathered
    ).eval()


def rounded_to(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A model whose weights are those of `model` in `dtype`; quantised tables are shared as they are."""

    def kept(module: nn.Module) -> nn.Module | None:
        return module if isinstance(module, QuantizedValueTable) else None

    return shared_copy(
        model, tensors=lambda each: each.to(dtype) if each.is_floating_point() else each, modules=kept
    ).eval()
