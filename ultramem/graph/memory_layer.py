"""The memory layer: five stages, each a module of that name, so that every lowering can be read stage by stage.

query -> score -> select -> lookup -> expand

Shapes: B batch, S sequence, T = B*S tokens, D hidden size, H heads, R ranks, N side of the logical grid,
M slots per head, C cores, E blocks, V value dim, P expert dim, K key width of one rank, W convolution width. In the
lookup K is the number of slots, H*M.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from torch import Tensor, nn

from ultramem import ops
from ultramem.config import MemoryConfig
from ultramem.graph.memory_output import Pooled, make_output
from ultramem.graph.sharded_table import Departed, ShardedValueTable, make_table
from ultramem.graph.singular import leading_singular_pair, singular_values
from ultramem.graph.table_shard import TableShard
from ultramem.graph.value_table import ValueTable, asks_for_rows


def _norm(config: MemoryConfig) -> nn.Module:
    """The norm of queries or keys: one weight per column, no bias."""
    if config.qk_norm == "none":
        return nn.Identity()
    if config.qk_norm == "rms":
        return nn.RMSNorm(config.rank_key_dim, eps=config.qk_norm_eps)
    return nn.LayerNorm(config.rank_key_dim, eps=config.qk_norm_eps, bias=False)


class Begun(NamedTuple):
    """A lookup whose rows are on their way, and the sum of the scores in each block [T,E], if these are wanted."""

    departed: Departed
    score_sums_TE: Tensor | None


class Query(nn.Module):
    """Causal depthwise convolution over time, projection without bias, LayerNorm per side (and per rank, if split)."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        heads = () if config.shared_query else (config.num_heads,)
        ranks = (config.rank,) if config.rank_layout == "split" else ()
        self.shape = (2, *heads, *ranks, config.rank_key_dim)
        self.width = config.conv_width
        self.conv_DW = nn.Parameter(torch.empty(config.hidden_size, self.width)) if self.width > 1 else None
        out_features = 2 * config.key_dim * (1 if config.shared_query else config.num_heads)
        self.proj = nn.Linear(config.hidden_size, out_features, bias=False)
        self.norm = _norm(config)

    def forward(self, hidden_BSD: Tensor, past_conv_BDW: Tensor | None = None) -> Tensor:
        """Query [T,2,(H),(R),K]; `past_conv_BDW` holds the W-1 inputs before this sequence (zeros if None)."""
        if self.conv_DW is not None:
            before_BWD = _before(hidden_BSD, past_conv_BDW, self.width)
            padded_BSD = torch.cat([before_BWD, hidden_BSD], dim=1)
            length = hidden_BSD.shape[1]
            hidden_BSD = sum(
                (padded_BSD[:, tap : tap + length] * self.conv_DW[:, tap] for tap in range(1, self.width)),
                padded_BSD[:, :length] * self.conv_DW[:, 0],
            )
        query: Tensor = self.norm(self.proj(hidden_BSD.flatten(0, 1)).unflatten(-1, self.shape))
        return query


def _before(hidden_BSD: Tensor, past_conv_BDW: Tensor | None, width: int) -> Tensor:
    """The W-1 inputs before the sequence, time-major."""
    if past_conv_BDW is None:
        return hidden_BSD.new_zeros(hidden_BSD.shape[0], width - 1, hidden_BSD.shape[2])
    return past_conv_BDW.transpose(1, 2).to(hidden_BSD.dtype)


class Score(nn.Module):
    """`S[side] = K[side] q[side]` with LayerNormed keys: row and column scores [T,H,R,N] each (paper, eq 4)."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        shape = (config.num_heads, 2, config.rank, config.grid_side, config.rank_key_dim)
        self.keys_H2RNK = nn.Parameter(torch.empty(shape))
        self.norm = _norm(config)
        query = "t" + ("" if config.shared_query else "h") + ("r" if config.rank_layout == "split" else "") + "k"
        self.equation = f"{query},hrnk->thrn"

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        keys_H2RNK = self.norm(self.keys_H2RNK)
        row_query, col_query = query.unbind(1)
        row_keys, col_keys = keys_H2RNK.unbind(1)
        return torch.einsum(self.equation, row_query, row_keys), torch.einsum(self.equation, col_query, col_keys)


class Select(nn.Module):
    """Top-m of the grid: Tucker scores for rank >= 2 (TDQKR, eq 4-10), additive ones for rank 1 (PKM, eq 2-3)."""

    singular_pair_2HR: Tensor | None

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.top_m, self.num_candidates = config.top_m, config.num_candidates
        self.candidates = config.candidates
        self.softmax = config.score_function == "softmax"
        h, c, r = config.num_heads, config.num_cores, config.rank
        self.cores_HCRR = nn.Parameter(torch.empty(h, c, r, r)) if r > 1 else None
        self.register_buffer("singular_pair_2HR", None, persistent=False)

    def fold_singular_pair(self) -> None:
        """Compute the singular vectors once instead of in every forward: for weights that do not change any more."""
        if self.cores_HCRR is not None:
            self.singular_pair_2HR = torch.stack(leading_singular_pair(self.cores_HCRR.sum(1)))

    def forward(self, row_scores_THRN: Tensor, col_scores_THRN: Tensor) -> ops.TopK:
        """Scores [T,H,M,C] and logical addresses [T,H,M]."""
        scores_THMC, addresses_THM = self._top_m(row_scores_THRN, col_scores_THRN)
        if self.softmax:
            wide = torch.float64 if scores_THMC.dtype == torch.float64 else torch.float32
            scores_THMC = scores_THMC.softmax(dim=2, dtype=wide).to(scores_THMC.dtype)
        return ops.TopK(scores_THMC, addresses_THM)

    def _top_m(self, row_scores_THRN: Tensor, col_scores_THRN: Tensor) -> ops.TopK:
        if self.cores_HCRR is None:
            scores_THM, addresses_THM = ops.product_topk(
                row_scores_THRN.squeeze(2), col_scores_THRN.squeeze(2), self.top_m
            )
            return ops.TopK(scores_THM.unsqueeze(-1), addresses_THM)
        if self.singular_pair_2HR is None:
            u_HR, t_HR = leading_singular_pair(self.cores_HCRR.sum(1))
        else:
            u_HR, t_HR = self.singular_pair_2HR.unbind(0)
        kept = ops.tucker_topk(
            row_scores_THRN, col_scores_THRN, self.cores_HCRR, u_HR, t_HR, self.num_candidates,
            candidates=self.candidates,
        )  # fmt: skip
        if self.num_candidates == self.top_m:
            return kept
        return ops.TopK(kept.scores[:, :, : self.top_m], kept.addresses[:, :, : self.top_m])  # best first


class Lookup(nn.Module):
    """Logical addresses are shuffled to virtual ones, whose rows in the value table are pooled per block (eq 14-17).

    Where slots are experts (PEER; UltraMemV2), the product of the input with a slot's input row multiplies its scores.
    """

    address_table: Tensor

    def __init__(self, config: MemoryConfig, index: int = 0) -> None:
        super().__init__()
        self.num_blocks = config.expansion
        self.num_values, self.table_rows = config.num_values, config.table_rows
        self.num_addresses = config.expansion * config.num_values
        self.first_row = index * config.knum**2 if config.table == "windows" else None
        self.permutation = config.permutation
        self.seed = config.permutation_seed
        self.sums_scores = config.project_bias
        self.has_experts = config.expert_dim > 0
        self.gelu = config.expert_activation == "gelu"
        self.expert_query = (
            nn.Linear(config.hidden_size, config.expert_dim, bias=False) if config.expert_project else nn.Identity()
        )
        if config.permutation == "stored":
            self.register_buffer("address_table", torch.empty(self.num_addresses, dtype=torch.int64))

        # Where nobody else asks for virtual indices, the op that reads rows permutes the addresses on the way.
        self.permutes_in_table = config.permutation == "computed" and not (
            self.has_experts or self.sums_scores or self.first_row is not None
        )

    def forward(
        self,
        scores_THMC: Tensor,
        addresses_THM: Tensor,
        hidden_TD: Tensor,
        table: ValueTable,
        *,
        begins: bool = False,
    ) -> Pooled | Begun:
        """Pooled rows; or, where it only `begins`, what a sharded table was asked for, while it is on its way."""
        indices_TK, scores_TKC, seed = self.slots(scores_THMC, addresses_THM, hidden_TD, table)
        sums_TE = self._score_sums(indices_TK, scores_TKC) if self.sums_scores else None
        if begins:
            assert isinstance(table, ShardedValueTable)
            return Begun(table.begin(indices_TK, scores_TKC, self.num_blocks, permutation_seed=seed), sums_TE)
        return Pooled(table(indices_TK, scores_TKC, self.num_blocks, permutation_seed=seed), sums_TE)

    def slots(
        self, scores_THMC: Tensor, addresses_THM: Tensor, hidden_TD: Tensor, table: ValueTable
    ) -> tuple[Tensor, Tensor, int | None]:
        """What is looked up: virtual indices [T,K], or addresses and the seed of their permutation; scores [T,K,C]."""
        scores_TKC = scores_THMC.flatten(1, 2)
        if self.permutes_in_table:
            return addresses_THM.flatten(1), scores_TKC, self.seed
        indices_TK = self.virtual_indices(addresses_THM.flatten(1))
        if self.has_experts:
            product_TK = table.expert_products(indices_TK, self.expert_query(hidden_TD))
            activation_TK = F.gelu(product_TK) if self.gelu else product_TK
            scores_TKC = scores_TKC * activation_TK.unsqueeze(-1)
        return indices_TK, scores_TKC, None

    def virtual_indices(self, addresses_TK: Tensor) -> Tensor:
        """`block * rows of the table + row`, as `ops.lookup_reduce` reads it, of logical addresses."""
        if self.permutation == "computed":
            addresses_TK = ops.permute_addresses(addresses_TK, self.num_addresses, self.seed)
        elif self.permutation == "stored":
            addresses_TK = self.address_table[addresses_TK]
        if self.first_row is None:
            return addresses_TK
        row_TK = (addresses_TK % self.num_values + self.first_row) % self.table_rows
        return addresses_TK // self.num_values * self.table_rows + row_TK

    def _score_sums(self, indices_TK: Tensor, scores_TKC: Tensor) -> Tensor:
        block_E = torch.arange(self.num_blocks, device=indices_TK.device)
        member_TEK = (indices_TK // self.table_rows).unsqueeze(1) == block_E.view(1, -1, 1)
        return (member_TEK * scores_TKC.sum(-1).unsqueeze(1)).sum(-1)


class Exchange(nn.Module):
    """The wait for what a sharded table was asked for: a module of its own, for those who ask where time goes."""

    def forward(self, departed: Departed, table: ShardedValueTable) -> Tensor:
        """Pooled rows [T,E,V]."""
        return table.arrive(departed)


class UltraMemLayer(nn.Module):
    """One memory layer, [B,S,D] -> [B,S,D], for anybody's model; initialised and trainable as it stands.

    Add `aux_loss()` to the training loss, and give `table.values_NV` its own learning rate (`ultramem.param_groups`
    does). For cached decoding, pass the state that `next_conv` returned and keep the new one.

    Args:
        config: UltraMem's by default; its switches give PKM, Memory+, PEER and UltraMemV2 (`ultramem.presets()`).
        index: of this layer among those that share a table.
        own_table: False where the table is somebody else's, who passes it to `forward`.
        shard: the part of its own table that this process holds; None: all of it.
    """

    def __init__(
        self, config: MemoryConfig, *, index: int = 0, own_table: bool = True, shard: TableShard | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.query = Query(config)
        self.score = Score(config)
        self.select = Select(config)
        self.lookup = Lookup(config, index)
        self.table = make_table(config, shard) if own_table else None
        self.exchange = None if shard is None else Exchange()
        self.expand = make_output(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew (Appendix A; see `ultramem.graph.init`). Does nothing on the meta device."""
        from ultramem.graph.init import init_memory_layer

        init_memory_layer(self)

    def forward(
        self, hidden_BSD: Tensor, past_conv_BDW: Tensor | None = None, *, table: ValueTable | None = None
    ) -> Tensor:
        table = self.table if table is None else table
        assert table is not None, "a layer without a table of its own is given one"
        scores, addresses = self._selected(hidden_BSD, past_conv_BDW)
        if asks_for_rows(table):
            table.ask_for(self.lookup.virtual_indices(addresses.flatten(1)))
        hidden_TD = hidden_BSD.flatten(0, 1)
        pooled = self.lookup(scores, addresses, hidden_TD, table)
        output_BSD: Tensor = self.expand(pooled, hidden_TD).view(hidden_BSD.shape)
        return output_BSD

    def begin(self, hidden_BSD: Tensor, past_conv_BDW: Tensor | None, table: ShardedValueTable) -> Begun:
        """The part of `forward` before the rows of a sharded table are needed; they travel until `finish`."""
        scores, addresses = self._selected(hidden_BSD, past_conv_BDW)
        begun: Begun = self.lookup(scores, addresses, hidden_BSD.flatten(0, 1), table, begins=True)
        return begun

    def finish(self, begun: Begun, hidden_BSD: Tensor, table: ShardedValueTable) -> Tensor:
        """The output of `forward`, after `begin` of the same input."""
        assert self.exchange is not None, "a layer of a sharded table knows of it"
        pooled = Pooled(self.exchange(begun.departed, table), begun.score_sums_TE)
        output_BSD: Tensor = self.expand(pooled, hidden_BSD.flatten(0, 1)).view(hidden_BSD.shape)
        return output_BSD

    def _selected(self, hidden_BSD: Tensor, past_conv_BDW: Tensor | None) -> ops.TopK:
        row_scores, col_scores = self.score(self.query(hidden_BSD, past_conv_BDW))
        selected: ops.TopK = self.select(row_scores, col_scores)
        return selected

    def next_conv(self, hidden_BSD: Tensor, past_conv_BDW: Tensor | None = None) -> Tensor:
        """The last W-1 inputs [B,D,W-1], to pass with the sequence that follows; zeros where there were none."""
        width = self.config.conv_width
        inputs_BSD = torch.cat([_before(hidden_BSD, past_conv_BDW, width), hidden_BSD], dim=1)
        return inputs_BSD[:, inputs_BSD.shape[1] - (width - 1) :].transpose(1, 2)

    def aux_loss(self) -> Tensor:
        """`alpha/(r-1) * sum_{i>=2} max(0, lambda_i - tau)^2` of the summed core, over heads (eq 11-12).

        A scalar with gradient; 0 for r = 1.
        """
        cores = self.select.cores_HCRR
        if cores is None or self.config.aux_loss_weight == 0:
            return self.score.keys_H2RNK.new_zeros(())
        trailing = singular_values(cores.sum(1))[:, 1:]
        excess = (trailing - self.config.aux_loss_margin).clamp_min(0).square()
        return self.config.aux_loss_weight / (self.config.rank - 1) * excess.sum()
