"""A table in parts, where all ranks have the same tokens: each looks up in its own part, and one collective joins them.

By rows a rank pools those of its rows that the tokens read, and the sums add up. By columns it pools its columns of all
slots, and these are laid side by side. What is asked for does not travel.

Shapes: T tokens that all ranks have, K slots a token, C cores, E blocks, V value dim, P expert dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultramem import ops
from ultramem.graph.sharded_table import Departed, ShardedValueTable
from ultramem.graph.value_table import pool_rows
from ultramem.ops.exchange import ALL_GATHER, ALL_REDUCE, exchange, start


class SameTokensTable(ShardedValueTable):
    """The part of a `TableShard` whose `tokens` are the same on all ranks. It takes no gradients.

    All shapes are known before the data is, so that a graph with it can be exported.
    """

    def begin(
        self, indices_TK: Tensor, scores_TKC: Tensor, num_blocks: int, *, permutation_seed: int | None = None
    ) -> Departed:
        """Pool this rank's part [T,E,V], or [T,E,V / ranks] by columns, and send it."""
        self._refuse_gradients(scores_TKC)
        if permutation_seed is not None:
            indices_TK = ops.permute_addresses(indices_TK, num_blocks * self.rows, permutation_seed)
        if self.shard.placement == "columns":
            pieces = torch.tensor(self.cores_of_pieces, device=scores_TKC.device)
            part = pool_rows(self.values_NV, indices_TK, scores_TKC.index_select(2, pieces), num_blocks)
            way = self._way(ALL_GATHER)
        else:
            here_TK, is_here_TK = self._here(indices_TK)
            part = pool_rows(self.values_NV, here_TK, scores_TKC * is_here_TK.unsqueeze(-1), num_blocks)
            way = self._way(ALL_REDUCE)
        return Departed(start(self._payload(part), way), None, scores_TKC, num_blocks)

    def expert_products(self, indices_TK: Tensor, query_TP: Tensor) -> Tensor:
        """Products [T,K] of the query with the input rows of virtual indices: every rank has a summand."""
        assert self.experts_NP is not None
        self._refuse_gradients(query_TP)
        query_TP = query_TP.to(self.experts_NP.dtype)
        if self.shard.placement == "columns":
            mine = self.shard.slices(self.rows, self.expert_dim)[1]
            part_TK = ops.lookup_dot(self.experts_NP, indices_TK % self.rows, query_TP[:, mine])
        else:
            here_TK, is_here_TK = self._here(indices_TK % self.rows)
            part_TK = ops.lookup_dot(self.experts_NP, here_TK, query_TP) * is_here_TK
        return exchange(part_TK, self._way(ALL_REDUCE)).to(query_TP.dtype)

    def _here(self, indices_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Virtual indices into this rank's rows, and which of them are: the others read the first row, for nothing."""
        kept = self.shard.slices(self.rows, self.value_dim)[0]
        rows_TK = indices_TK % self.rows - kept.start
        is_here_TK = (rows_TK >= 0) & (rows_TK < kept.stop - kept.start)
        blocks_TK = indices_TK // self.rows
        return torch.where(is_here_TK, rows_TK, 0) + blocks_TK * (kept.stop - kept.start), is_here_TK

    def _refuse_gradients(self, tensor: Tensor) -> None:
        if torch.is_grad_enabled() and (tensor.requires_grad or self.values_NV.requires_grad):
            raise ValueError(
                "tokens must be own for a sharded table that takes gradients, got same: call it under torch.no_grad()"
            )
