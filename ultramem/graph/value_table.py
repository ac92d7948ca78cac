"""The table of a memory layer: the one tensor whose size has nothing to do with what a token costs."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from ultramem import ops
from ultramem.config import MemoryConfig
from ultramem.graph.table_shard import TableShard
from ultramem.ops.huge_pages import LARGE_BYTES, advise_huge_pages


def _empty_rows(n: int, d: int) -> nn.Parameter:
    """[N,D], not filled yet, in huge pages where there are any."""
    rows_ND = torch.empty(n, d)
    advise_huge_pages(rows_ND, at_least_bytes=LARGE_BYTES)
    return nn.Parameter(rows_ND)


def _part(name: str, rows: int, columns: int, shard: TableShard | None) -> tuple[int, int]:
    """Rows and columns of a table that are held here."""
    if shard is None:
        return rows, columns
    shard.require_fits(name, rows, columns)
    kept = shard.slices(rows, columns)
    return kept[0].stop - kept[0].start, kept[1].stop - kept[1].start


def pool_rows(
    values_NV: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    num_blocks: int,
    *,
    lazy: ops.LazyRows | None = None,
    sparse_grad: bool = False,
    permutation_seed: int | None = None,
) -> Tensor:
    """Pooled rows [T,E,V] in the wider type of rows and scores: a narrow table does not narrow the model."""
    dtype = max(scores_TKC.dtype, values_NV.dtype, key=lambda each: each.itemsize)
    if scores_TKC.dtype != torch.float32:
        scores_TKC = scores_TKC.to(values_NV.dtype)
    if lazy is not None:
        pooled_TEV = ops.lookup_reduce_lazy(values_NV, lazy, indices_TK, scores_TKC, num_blocks=num_blocks)
    else:
        pooled_TEV = ops.lookup_reduce(
            values_NV,
            indices_TK,
            scores_TKC,
            num_blocks=num_blocks,
            sparse_grad=sparse_grad,
            permutation_seed=permutation_seed,
        )
    return pooled_TEV.to(dtype)


class ValueTable(nn.Module):
    """The rows that one memory layer reads, or that several share.

    Attributes:
        values_NV: value rows.
        experts_NP: input rows, where each slot is a one-neuron expert; else None.
        sparse_grad: gradients of the rows are sparse COO tensors of the touched rows instead of dense [N,V] ones.
            Optimisers that work on touched rows set it.
        lazy_rows: what such an optimiser owes the rows that it has not written of late; they are made up as they are
            read. None: `values_NV` is up to date.
        lazy_experts: the same of the input rows.
        row_use_N: how often each row was read in training since it was last set to zero, int64; None unless
            `count_row_use` was called. Not part of the state dict.
        is_mapped: the rows are pages of a file, which a layer asks for as soon as it knows which it will read.
        expert_dim: width of the input rows; 0 without any.

    Args:
        config: of the layers that read the table.
        shard: the part of the rows that this process holds (see `ShardedValueTable`); None: all of them.
    """

    experts_NP: nn.Parameter | None
    row_use_N: Tensor | None

    def __init__(self, config: MemoryConfig, shard: TableShard | None = None) -> None:
        super().__init__()
        self.values_NV = _empty_rows(*_part("value_dim", config.table_rows, config.value_dim, shard))
        self.expert_dim = config.expert_dim
        experts = None
        if config.expert_dim:
            experts = _empty_rows(*_part("expert_dim", config.table_rows, config.expert_dim, shard))
        self.register_parameter("experts_NP", experts)
        self.sparse_grad = False
        self.lazy_rows: ops.LazyRows | None = None
        self.lazy_experts: ops.LazyRows | None = None
        self.is_mapped = False
        self.register_buffer("row_use_N", None, persistent=False)

    def count_row_use(self) -> None:
        """Count from now on how often each row is read in training mode."""
        values = self.values_NV
        self.row_use_N = torch.zeros(values.shape[0], dtype=torch.int64, device=values.device)

    def forward(
        self, indices_TK: Tensor, scores_TKC: Tensor, num_blocks: int, *, permutation_seed: int | None = None
    ) -> Tensor:
        """Pooled rows [T,E,V] of virtual indices, or with a seed of addresses (see `ultramem.ops.lookup_reduce`)."""
        values_NV = self.values_NV
        counts = self.row_use_N is not None and self.training
        if permutation_seed is not None and (counts or self.lazy_rows is not None):
            indices_TK = ops.permute_addresses(indices_TK, num_blocks * values_NV.shape[0], permutation_seed)
            permutation_seed = None
        if self.row_use_N is not None and self.training:
            rows = (indices_TK % values_NV.shape[0]).flatten()
            self.row_use_N.index_add_(0, rows, torch.ones_like(rows))
        return pool_rows(
            values_NV,
            indices_TK,
            scores_TKC,
            num_blocks,
            lazy=self.lazy_rows,
            sparse_grad=self.sparse_grad,
            permutation_seed=permutation_seed,
        )

    def expert_products(self, indices_TK: Tensor, query_TP: Tensor) -> Tensor:
        """Products [T,K] of the query with the input rows of virtual indices (see `ultramem.ops.lookup_dot`)."""
        assert self.experts_NP is not None
        query = query_TP.to(self.experts_NP.dtype)
        if self.lazy_experts is not None:
            product_TK = ops.lookup_dot_lazy(self.experts_NP, self.lazy_experts, indices_TK, query)
        else:
            product_TK = ops.lookup_dot(self.experts_NP, indices_TK, query, sparse_grad=self.sparse_grad)
        return product_TK.to(query_TP.dtype)

    def draw_(self, *, values_std: float, experts_std: float) -> None:
        """Fill the rows with normal numbers."""
        nn.init.normal_(self.values_NV, std=values_std)
        if self.experts_NP is not None:
            nn.init.normal_(self.experts_NP, std=experts_std)

    def ask_for(self, indices_TK: Tensor) -> None:
        """Have the system read the rows of virtual indices from their file, all at once."""
        rows = indices_TK % self.values_NV.shape[0]
        ops.ask_for_rows(self.values_NV, rows)
        if self.experts_NP is not None:
            ops.ask_for_rows(self.experts_NP, rows)

    def gather(self, rows_R: Tensor) -> Tensor:
        """Value rows [R,V]."""
        return self.values_NV[rows_R]

    def gather_experts(self, rows_R: Tensor) -> Tensor:
        """Input rows [R,P]."""
        assert self.experts_NP is not None
        return self.experts_NP[rows_R]


def asks_for_rows(table: nn.Module | None) -> TypeGuard[ValueTable]:
    """Whether rows are asked for before they are read: those of a mapped table, where no compiler is tracing."""
    return isinstance(table, ValueTable) and table.is_mapped and not torch.compiler.is_compiling()
