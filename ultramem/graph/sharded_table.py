"""A table of which every process holds a part: rows, or what was pooled of them, travel to the tokens.

Shapes: T tokens of this rank, K slots a token, C cores, E blocks, V value dim, P ranks, U distinct rows that this rank
reads, R rows that all ranks ask of this one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ultramem import ops
from ultramem.config import MemoryConfig
from ultramem.graph.sharded_module import draw_part_, keep_state_whole
from ultramem.graph.table_shard import TableShard
from ultramem.graph.value_table import ValueTable, pool_rows
from ultramem.ops.exchange import ALL_GATHER, ALL_TO_ALL, REDUCE_SCATTER, Flight, Way, arrive, exchange, start

_INT32_ROWS = 2**31


class Departed(NamedTuple):
    """What a layer has asked for, and what is left to do when it arrives."""

    flight: Flight
    indices_TK: Tensor | None
    """Into the rows that arrive; None where what arrives is pooled already."""
    scores_TKC: Tensor
    num_blocks: int


class _Request(NamedTuple):
    """Rows that other ranks ask of this one, and the way on which they go."""

    rows_R: Tensor
    way: Way
    route: ops.Route


class ShardedValueTable(ValueTable):
    """What `ValueTable` does, together with the other ranks of a `TableShard`.

    `values_NV` and `experts_NP` are this process's part; `state_dict` has them as DTensors of the whole table, and
    `load_state_dict` takes such. All ranks must call it the same number of times, with the same number of tokens.
    Gradients add up over ranks: where the loss is a mean over all tokens, divide each rank's loss by the ranks.

    `forward` is `arrive(begin(...))`; what stands between the two runs while rows travel.
    """

    def __init__(self, config: MemoryConfig, shard: TableShard) -> None:
        super().__init__(config, shard)
        self.shard = shard
        self.rows, self.value_dim = config.table_rows, config.value_dim
        self.is_narrow = self.rows <= _INT32_ROWS
        self.is_narrow_virtual = self.rows * config.expansion <= _INT32_ROWS
        # Columns of a rank, cut where a core ends: each piece is weighted by the scores of one core.
        core, width = config.value_dim // config.num_cores, config.value_dim // shard.ranks
        self.cores_of_pieces = [
            (shard.rank * width + start) // core for start in range(0, width, math.gcd(core, width))
        ]
        keep_state_whole(self)

    @property
    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole tables, by parameter."""
        shapes: dict[str, tuple[int, ...]] = {"values_NV": (self.rows, self.value_dim)}
        if self.expert_dim:
            shapes["experts_NP"] = (self.rows, self.expert_dim)
        return shapes

    def forward(
        self, indices_TK: Tensor, scores_TKC: Tensor, num_blocks: int, *, permutation_seed: int | None = None
    ) -> Tensor:
        """Pooled rows [T,E,V]."""
        return self.arrive(self.begin(indices_TK, scores_TKC, num_blocks, permutation_seed=permutation_seed))

    def begin(
        self, indices_TK: Tensor, scores_TKC: Tensor, num_blocks: int, *, permutation_seed: int | None = None
    ) -> Departed:
        """Ask for the rows."""
        if permutation_seed is not None:
            indices_TK = ops.permute_addresses(indices_TK, num_blocks * self.rows, permutation_seed)
        if self.shard.placement == "columns":
            return self._begin_columns(indices_TK, scores_TKC, num_blocks)
        if self.shard.pool == "owner":
            return self._begin_at_owner(indices_TK, scores_TKC, num_blocks)
        request = self._request(indices_TK % self.rows)
        self._count_reads(request)
        flight = start(self._payload(self._own_rows(request.rows_R)), request.way)
        here_TK = request.route.position_TK + indices_TK // self.rows * request.route.rows_U.shape[0]
        return Departed(flight, here_TK, scores_TKC, num_blocks)

    def arrive(self, departed: Departed) -> Tensor:
        """Pooled rows [T,E,V] of what `begin` asked for."""
        flight, indices_TK, scores_TKC, num_blocks = departed
        arrived = arrive(flight).to(self.values_NV.dtype)
        if indices_TK is not None:
            return pool_rows(arrived, indices_TK, scores_TKC, num_blocks)
        dtype = max(scores_TKC.dtype, self.values_NV.dtype, key=lambda each: each.itemsize)
        if self.shard.placement == "columns":
            arrived = arrived.unflatten(0, (self.shard.ranks, -1)).permute(1, 2, 0, 3).flatten(2)
        return arrived.to(dtype)

    def expert_products(self, indices_TK: Tensor, query_TP: Tensor) -> Tensor:
        """Products [T,K] of the query with the input rows of virtual indices (see `ultramem.ops.lookup_dot`)."""
        assert self.experts_NP is not None
        rows_TK, shard = indices_TK % self.rows, self.shard
        if shard.placement == "columns":
            # Every rank multiplies its columns of all tokens' queries; the sums go to the tokens.
            query_PTX = query_TP.unflatten(1, (shard.ranks, -1)).transpose(0, 1)
            columns_SX = exchange(self._payload(query_PTX.flatten(0, 1)), self._way(ALL_TO_ALL)).to(query_TP.dtype)
            products_SK = super().expert_products(self._gathered(rows_TK, narrow=self.is_narrow), columns_SX)
            return exchange(products_SK, self._way(REDUCE_SCATTER))
        request = self._request(rows_TK)
        ones_R11 = self.experts_NP.new_ones(request.rows_R.shape[0], 1, 1)
        own_R1P = pool_rows(
            self.experts_NP, request.rows_R.unsqueeze(1), ones_R11, 1,
            lazy=self.lazy_experts, sparse_grad=self.sparse_grad,
        )  # fmt: skip
        arrived_UP = exchange(self._payload(own_R1P.squeeze(1)), request.way).to(self.experts_NP.dtype)
        return ops.lookup_dot(arrived_UP, request.route.position_TK, query_TP.to(arrived_UP.dtype)).to(query_TP.dtype)

    @torch.no_grad()
    def draw_(self, *, values_std: float, experts_std: float) -> None:
        """Fill the rows with the normal numbers that the whole table would have, of which only this part is kept."""
        for name, std in (("values_NV", values_std), ("experts_NP", experts_std)):
            if name in self.whole_shapes:
                draw_part_(getattr(self, name), self.whole_shapes[name], self.shard, std=std)

    def ask_for(self, indices_TK: Tensor) -> None:
        raise NotImplementedError("rows of a sharded table are not mapped from a file")

    def _begin_columns(self, indices_TK: Tensor, scores_TKC: Tensor, num_blocks: int) -> Departed:
        """All ranks' tokens are pooled here, in the columns of this rank."""
        indices_SK = self._gathered(indices_TK, narrow=self.is_narrow_virtual)
        scores_SKC = exchange(self._payload(scores_TKC), self._way(ALL_GATHER)).to(scores_TKC.dtype)
        pieces = torch.tensor(self.cores_of_pieces, device=scores_SKC.device)
        pooled_SEX = super().forward(indices_SK, scores_SKC.index_select(2, pieces), num_blocks)
        return Departed(start(self._payload(pooled_SEX), self._way(ALL_TO_ALL)), None, scores_TKC, num_blocks)

    def _begin_at_owner(self, indices_TK: Tensor, scores_TKC: Tensor, num_blocks: int) -> Departed:
        """All ranks' tokens are pooled here, over the rows of this rank; the sums go to the tokens."""
        indices_SK = self._gathered(indices_TK, narrow=self.is_narrow_virtual)
        scores_SKC = exchange(self._payload(scores_TKC), self._way(ALL_GATHER)).to(scores_TKC.dtype)
        own = self.shard.slices(self.rows, self.value_dim)[0]
        rows_U, position_SM, slot_SM = ops.route_own(indices_SK % self.rows, first=own.start, end=own.stop)
        u = rows_U.shape[0]
        self._count(rows_U, position_SM.flatten(), u)
        rows_UV = self._own_rows(rows_U)
        padded_WV = torch.cat([rows_UV, rows_UV.new_zeros(1, rows_UV.shape[1])])
        slot_SMC = slot_SM.unsqueeze(-1).expand(-1, -1, scores_SKC.shape[-1])
        scores_SMC = scores_SKC.gather(1, slot_SMC) * (position_SM < u).unsqueeze(-1)
        block_SM = indices_SK.gather(1, slot_SM) // self.rows
        pooled_SEV = pool_rows(padded_WV, position_SM + block_SM * (u + 1), scores_SMC, num_blocks)
        flight = start(self._payload(pooled_SEV), self._way(REDUCE_SCATTER))
        return Departed(flight, None, scores_TKC, num_blocks)

    def _request(self, rows_TK: Tensor) -> _Request:
        """Tell every rank which of its rows are read here, and hear which of ours are read there."""
        shard = self.shard
        step = shard.rows_per_rank(self.rows)
        route = ops.route_rows(rows_TK, rows_per_rank=step, num_ranks=shard.ranks, deduplicate=shard.deduplicate)
        received_P = exchange(route.counts_P, self._way(ALL_TO_ALL))
        send, receive = route.counts_P.tolist(), received_P.tolist()
        if torch.compiler.is_compiling():
            for count in send + receive:
                torch._check(count >= 0)
            torch._check(sum(send) == route.rows_U.shape[0])
        dtype = torch.int32 if self.is_narrow else torch.int64
        there = Way(ALL_TO_ALL, shard.group, shard.ranks, receive, send)
        asked_R = exchange(route.rows_U.to(dtype), there).long()
        return _Request(asked_R - shard.rank * step, there.back(), route)

    def _own_rows(self, rows_R: Tensor) -> Tensor:
        """Rows [R,V] of this rank, brought up to date: a lookup of one slot each, so that gradients are a lookup's."""
        ones_R11 = self.values_NV.new_ones(rows_R.shape[0], 1, 1)
        return pool_rows(
            self.values_NV, rows_R.unsqueeze(1), ones_R11, 1, lazy=self.lazy_rows, sparse_grad=self.sparse_grad
        ).squeeze(1)

    def _gathered(self, indices_TK: Tensor, *, narrow: bool) -> Tensor:
        """The indices of all ranks' tokens."""
        return exchange(indices_TK.to(torch.int32 if narrow else torch.int64), self._way(ALL_GATHER)).long()

    def _payload(self, tensor: Tensor) -> Tensor:
        return tensor if self.shard.exchange_dtype is None else tensor.to(self.shard.exchange_dtype)

    def _way(self, kind: str) -> Way:
        return Way(kind, self.shard.group, self.shard.ranks)

    def _count_reads(self, request: _Request) -> None:
        """Where the use of rows is counted: ask how many slots read each row that is asked for."""
        if self.row_use_N is None or not self.training:
            return
        position, u = request.route.position_TK.flatten(), request.route.rows_U.shape[0]
        reads_U = torch.zeros(u, dtype=torch.int32, device=position.device)
        reads_U = reads_U.index_add(0, position, torch.ones_like(position, dtype=torch.int32))
        reads_R = exchange(reads_U, request.way.back())
        self.row_use_N.index_add_(0, request.rows_R, reads_R.long())

    def _count(self, rows_U: Tensor, position: Tensor, padding: int) -> None:
        if self.row_use_N is None or not self.training:
            return
        reads = torch.zeros(padding + 1, dtype=torch.int64, device=position.device)
        reads = reads.index_add(0, position, torch.ones_like(position))
        self.row_use_N.index_add_(0, rows_U, reads[:padding])


def make_table(config: MemoryConfig, shard: TableShard | None) -> ValueTable:
    """A table, or this process's part of one."""
    if shard is None:
        return ValueTable(config)
    if shard.tokens == "own":
        return ShardedValueTable(config, shard)
    from ultramem.graph.same_tokens_table import SameTokensTable  # which is made of this one

    return SameTokensTable(config, shard)


def shard_of(model: nn.Module) -> TableShard | None:
    """How a model's tables are spread over ranks; None: they are whole."""
    return next((each.shard for each in model.modules() if isinstance(each, ShardedValueTable)), None)
