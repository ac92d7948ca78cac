"""Memory layers in plain PyTorch: UltraMem, UltraMemV2, PKM, Memory+ and PEER. It stands beside the weights.

A layer is five stages: query -> score -> select -> lookup -> expand.

Shapes: B batch, S sequence, T = B*S tokens, D hidden size, H heads, R ranks, N side of the grid of addresses, M slots
per head, K = H*M slots, C cores, E blocks, V value dim, P expert dim, W convolution width.
"""

import hashlib
import math

import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from torch import Tensor, nn

from .configuration_ultramem import MemoryLayerConfig
from .selection_ultramem import Select
from .table_ultramem import QuantizedTable, ValueTable, make_table


def _norm(config: MemoryLayerConfig) -> nn.Module:
    if config.qk_norm == "none":
        return nn.Identity()
    if config.qk_norm == "rms":
        return nn.RMSNorm(config.rank_key_dim, eps=config.qk_norm_eps)
    return nn.LayerNorm(config.rank_key_dim, eps=config.qk_norm_eps, bias=False)


class Query(nn.Module):
    """Causal depthwise convolution over time, projection, norm per side (and per rank, if split)."""

    def __init__(self, config: MemoryLayerConfig) -> None:
        super().__init__()
        heads = () if config.shared_query else (config.num_heads,)
        ranks = (config.rank,) if config.rank_layout == "split" else ()
        self.shape = (2, *heads, *ranks, config.rank_key_dim)
        self.width = config.conv_width
        self.conv_DW = nn.Parameter(torch.empty(config.hidden_size, self.width)) if self.width > 1 else None
        out_features = 2 * config.key_dim * (1 if config.shared_query else config.num_heads)
        self.proj = nn.Linear(config.hidden_size, out_features, bias=False)
        self.norm = _norm(config)

    def forward(self, inputs_BSD: Tensor) -> Tensor:
        """Query [T,2,(H),(R),key]; the inputs begin with the W-1 before the sequence."""
        length = inputs_BSD.shape[1] - (self.width - 1)
        hidden_BSD = inputs_BSD
        if self.conv_DW is not None:
            taps = [inputs_BSD[:, tap : tap + length] * self.conv_DW[:, tap] for tap in range(self.width)]
            hidden_BSD = sum(taps[1:], taps[0])
        query: Tensor = self.norm(self.proj(hidden_BSD.flatten(0, 1)).unflatten(-1, self.shape))
        return query


class Score(nn.Module):
    """Normed keys times query: row and column scores [T,H,R,N]."""

    def __init__(self, config: MemoryLayerConfig) -> None:
        super().__init__()
        shape = (config.num_heads, 2, config.rank, config.grid_side, config.rank_key_dim)
        self.keys_H2RNK = nn.Parameter(torch.empty(shape))
        self.norm = _norm(config)
        query = "t" + ("" if config.shared_query else "h") + ("r" if config.rank_layout == "split" else "") + "k"
        self.equation = f"{query},hrnk->thrn"

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        row_query, col_query = query.unbind(1)
        row_keys, col_keys = self.norm(self.keys_H2RNK).unbind(1)
        return torch.einsum(self.equation, row_query, row_keys), torch.einsum(self.equation, col_query, col_keys)


class Lookup(nn.Module):
    """Shuffles addresses, reads their rows in the table, and pools them per block.

    Where slots are experts (PEER, UltraMemV2), the product of the input with a slot's input row multiplies its scores.
    """

    address_table: Tensor

    def __init__(self, config: MemoryLayerConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.first_row = index * config.knum**2 if config.table == "windows" else 0
        self.expert_query = (
            nn.Linear(config.hidden_size, config.expert_dim, bias=False) if config.expert_project else nn.Identity()
        )
        if config.permutation == "stored":
            table = torch.empty(config.expansion * config.num_values, dtype=torch.int64)
            self.register_buffer("address_table", table)

    def forward(
        self, scores_THMC: Tensor, addresses_THM: Tensor, hidden_TD: Tensor, table: ValueTable | QuantizedTable
    ) -> tuple[Tensor, Tensor | None]:
        """Pooled rows [T,E,V], and the sum of the scores in each block [T,E] where the projection has biases."""
        config = self.config
        scores_TKC, indices_TK = scores_THMC.flatten(1, 2), self.virtual_indices(addresses_THM.flatten(1))
        if config.expert_dim:
            product_TK = table.expert_products(indices_TK, self.expert_query(hidden_TD))
            activation_TK = F.gelu(product_TK) if config.expert_activation == "gelu" else product_TK
            scores_TKC = scores_TKC * activation_TK.unsqueeze(-1)
        rows_TEV = table(indices_TK, scores_TKC, config.expansion)
        if not config.project_bias:
            return rows_TEV, None
        block_E = torch.arange(config.expansion, device=indices_TK.device)
        member_TEK = (indices_TK // config.table_rows).unsqueeze(1) == block_E.view(1, -1, 1)
        return rows_TEV, (member_TEK * scores_TKC.sum(-1).unsqueeze(1)).sum(-1)

    def virtual_indices(self, addresses_TK: Tensor) -> Tensor:
        """`block * rows of the table + row` of logical addresses."""
        config = self.config
        if config.permutation == "computed":
            addresses_TK = permute_addresses(
                addresses_TK, config.expansion * config.num_values, config.permutation_seed
            )
        elif config.permutation == "stored":
            addresses_TK = self.address_table[addresses_TK]
        row_TK = (addresses_TK % config.num_values + self.first_row) % config.table_rows
        return addresses_TK // config.num_values * config.table_rows + row_TK


def permute_addresses(addresses: Tensor, size: int, seed: int) -> Tensor:
    """A keyed bijection of [0, size): two passes of a Feistel network on (address // b, address % b).

    It covers the first a*b addresses, with a = isqrt(size) and b = size // a; a rotation between the passes mixes in
    those behind them. Trained rows mean nothing under another permutation, so nothing here may change.
    """
    a = math.isqrt(size)
    b = size // a
    for first_round, rotation in ((0, 0), (4, size // 2)):
        addresses = (addresses + rotation) % size
        high, low = addresses // b, addresses % b
        for index in range(4):
            digest = hashlib.blake2b(f"{seed}/{first_round + index}".encode(), digest_size=16).digest()
            m1, c1, m2, c2 = (int.from_bytes(digest[i : i + 4], "little") % 2**31 for i in (0, 4, 8, 12))
            half, side = (low, a) if index % 2 == 0 else (high, b)
            mixed = (half * (m1 // 2 + 2**30 | 1) + c1) % 2**31
            mixed = mixed * mixed // 2**16 % 2**31
            mixed = (mixed * (m2 // 2 + 2**30 | 1) + c2) // 2**16 % 2**31
            added = mixed * side // 2**31
            high, low = ((high + added) % a, low) if index % 2 == 0 else (high, (low + added) % b)
        addresses = torch.where(addresses < a * b, high * b + low, addresses)
    return addresses


class Project(nn.Module):
    """Blocks to the residual stream, `sum_p W_p pooled_p`, with a bias per block weighted by its score sum."""

    def __init__(self, config: MemoryLayerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.expansion * config.value_dim))
        shape = (config.expansion, config.hidden_size)
        self.block_bias_ED = nn.Parameter(torch.empty(shape)) if config.project_bias else None

    def forward(self, rows_TEV: Tensor, score_sums_TE: Tensor | None, hidden_TD: Tensor) -> Tensor:
        output_TD = F.linear(rows_TEV.flatten(1), self.weight)
        if self.block_bias_ED is None:
            return output_TD
        assert score_sums_TE is not None
        return output_TD + score_sums_TE @ self.block_bias_ED


class GatedOutput(nn.Module):
    """Memory+: `W2(pooled * silu(W1 x))`, both with bias."""

    def __init__(self, config: MemoryLayerConfig) -> None:
        super().__init__()
        width = config.expansion * config.value_dim
        self.gate = nn.Linear(config.hidden_size, width)
        self.out = nn.Linear(width, config.hidden_size)

    def forward(self, rows_TEV: Tensor, score_sums_TE: Tensor | None, hidden_TD: Tensor) -> Tensor:
        output_TD: Tensor = self.out(rows_TEV.flatten(1) * F.silu(self.gate(hidden_TD)))
        return output_TD


class NoOutput(nn.Module):
    """The pooled rows themselves (PKM, PEER)."""

    def forward(self, rows_TEV: Tensor, score_sums_TE: Tensor | None, hidden_TD: Tensor) -> Tensor:
        return rows_TEV.flatten(1)


class MemoryLayer(nn.Module):
    """One memory layer; `index` is its place among those that share a table."""

    def __init__(self, config: MemoryLayerConfig, index: int) -> None:
        super().__init__()
        self.query = Query(config)
        self.score = Score(config)
        self.select = Select(config)
        self.lookup = Lookup(config, index)
        self.table = make_table(config) if config.table == "own" else None
        outputs = {"project": Project, "gated": GatedOutput}
        self.expand = outputs[config.output](config) if config.output in outputs else NoOutput()

    def forward(self, inputs_BSD: Tensor, length: int, shared_table: "ValueTable | QuantizedTable | None") -> Tensor:
        """Output [B,S,D] for the last `length` inputs; those before are what the convolution looks back on."""
        table = shared_table if self.table is None else self.table
        hidden_BSD = inputs_BSD[:, inputs_BSD.shape[1] - length :]
        hidden_TD = hidden_BSD.flatten(0, 1)
        scores, addresses = self.select(*self.score(self.query(inputs_BSD)))
        rows_TEV, score_sums_TE = self.lookup(scores, addresses, hidden_TD, table)
        output_BSD: Tensor = self.expand(rows_TEV, score_sums_TE, hidden_TD).view(hidden_BSD.shape)
        return output_BSD
