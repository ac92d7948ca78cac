"""Tables of rows that memory layers read, in plain PyTorch. It stands beside the weights.

Shapes: N rows, V value dim, P expert dim, B bytes a row, T tokens, K slots a token, C cores, E blocks, X = V/C.
"""

import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from torch import Tensor, nn

from .configuration_ultramem import MemoryLayerConfig


class ValueTable(nn.Module):
    """The rows that one memory layer reads, or that several share."""

    experts_NP: nn.Parameter | None

    def __init__(self, config: MemoryLayerConfig) -> None:
        super().__init__()
        self.values_NV = nn.Parameter(torch.empty(config.table_rows, config.value_dim))
        experts = nn.Parameter(torch.empty(config.table_rows, config.expert_dim)) if config.expert_dim else None
        self.register_parameter("experts_NP", experts)

    def forward(self, indices_TK: Tensor, scores_TKC: Tensor, num_blocks: int) -> Tensor:
        """Pooled rows [T,E,V] of virtual indices, `block * rows + row`; core c weights its own columns of a row."""
        n, v = self.values_NV.shape
        t, k, c = scores_TKC.shape
        block_TK, order_TK = (indices_TK // n).sort(dim=1, stable=True)
        core_C1 = torch.arange(c, device=indices_TK.device).unsqueeze(1)
        rows_TCK = (indices_TK % n).gather(1, order_TK).unsqueeze(1) * c + core_C1
        scores_TCK = scores_TKC.to(self.values_NV.dtype).gather(1, order_TK.unsqueeze(-1).expand(t, k, c)).mT
        # A bag for each token, core and block, over the table seen as [N*C, V/C].
        block_E = torch.arange(num_blocks, device=indices_TK.device)
        first_TE = (block_TK.unsqueeze(1) < block_E.view(1, -1, 1)).sum(-1)
        first_TCE = first_TE.unsqueeze(1) + torch.arange(t * c, device=indices_TK.device).view(t, c, 1) * k
        pooled = F.embedding_bag(
            rows_TCK.reshape(-1),
            self.values_NV.view(n * c, v // c),
            first_TCE.reshape(-1),
            mode="sum",
            per_sample_weights=scores_TCK.reshape(-1),
        )
        return pooled.view(t, c, num_blocks, v // c).transpose(1, 2).reshape(t, num_blocks, v).to(scores_TKC.dtype)

    def expert_products(self, indices_TK: Tensor, query_TP: Tensor) -> Tensor:
        """Products [T,K] of a query with the input rows of virtual indices."""
        assert self.experts_NP is not None
        wide = torch.promote_types(query_TP.dtype, torch.float32)
        rows_TKP = self.experts_NP[indices_TK % self.experts_NP.shape[0]].to(wide)
        return (rows_TKP * query_TP.to(wide).unsqueeze(1)).sum(-1).to(query_TP.dtype)


class QuantizedTable(nn.Module):
    """A table of int8 rows, or of uint8 rows that pack two numbers of 4 bits, with a float32 scale each."""

    rows_NB: Tensor
    scales_N: Tensor
    expert_rows_NB: Tensor
    expert_scales_N: Tensor

    def __init__(self, config: MemoryLayerConfig) -> None:
        super().__init__()
        kind = torch.int8 if config.table_bits == 8 else torch.uint8
        for prefix, width in (("", config.value_dim), ("expert_", config.expert_dim)):
            if width:
                rows = torch.zeros(config.table_rows, width * config.table_bits // 8, dtype=kind)
                self.register_buffer(f"{prefix}rows_NB", rows)
                self.register_buffer(f"{prefix}scales_N", torch.ones(config.table_rows))

    def forward(self, indices_TK: Tensor, scores_TKC: Tensor, num_blocks: int) -> Tensor:
        """As `ValueTable`, added in float32, some tokens at a time: rows take four to eight times their space."""
        n = self.rows_NB.shape[0]
        wide = torch.promote_types(scores_TKC.dtype, torch.float32)
        block_E1 = torch.arange(num_blocks, device=indices_TK.device).unsqueeze(1)
        parts = []
        for index_TK, score_TKC in zip(indices_TK.split(64), scores_TKC.to(wide).split(64), strict=True):
            row_TK = index_TK % n
            rows_TKV = _unpacked(self.rows_NB[row_TK]).to(wide)
            weights_TC1K = (score_TKC * self.scales_N[row_TK].to(wide).unsqueeze(-1)).mT.unsqueeze(2)
            member_T1EK = ((index_TK // n).unsqueeze(1) == block_E1).unsqueeze(1)
            columns_TCKX = rows_TKV.unflatten(2, (score_TKC.shape[2], -1)).transpose(1, 2)
            pooled_TCEX = member_T1EK * weights_TC1K @ columns_TCKX
            parts.append(pooled_TCEX.transpose(1, 2).flatten(2))
        return torch.cat(parts).to(scores_TKC.dtype)

    def expert_products(self, indices_TK: Tensor, query_TP: Tensor) -> Tensor:
        """As `ValueTable.expert_products`."""
        wide = torch.promote_types(query_TP.dtype, torch.float32)
        row_TK = indices_TK % self.expert_rows_NB.shape[0]
        rows_TKP = _unpacked(self.expert_rows_NB[row_TK]).to(wide)
        product_TK = (rows_TKP * query_TP.to(wide).unsqueeze(1)).sum(-1) * self.expert_scales_N[row_TK]
        return product_TK.to(query_TP.dtype)


def _unpacked(rows: Tensor) -> Tensor:
    """int8 rows as they are; of packed ones the low four bits before the high four, in two's complement."""
    if rows.dtype == torch.int8:
        return rows
    return ((torch.stack([rows & 15, rows >> 4], -1).to(torch.int8) ^ 8) - 8).flatten(-2)


def make_table(config: MemoryLayerConfig) -> "ValueTable | QuantizedTable":
    """The table that `config.table_bits` names."""
    return QuantizedTable(config) if config.table_bits else ValueTable(config)
