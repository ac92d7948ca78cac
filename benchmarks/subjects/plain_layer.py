"""The memory layer as one writes it in plain PyTorch, with the parameters of one of ours.

Shapes: B batch, S sequence, T = B*S tokens, D hidden size, H heads, R ranks, N side of the logical grid, M slots per
head, C cores, E blocks, V value dim, K slots a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from torch import Tensor, nn

from benchmarks.subjects.lookup import gather_einsum
from ultramem.graph import UltraMemLayer
from ultramem.graph.singular import leading_singular_pair
from ultramem.ops import permute_addresses


class PlainLayer(nn.Module):
    """What `UltraMemLayer` computes, without our ops.

    Shuffled addresses are made once, and so is the singular pair in eval mode.
    """

    def __init__(self, layer: UltraMemLayer) -> None:
        super().__init__()
        config = layer.config
        self.heads, self.m, self.blocks = config.num_heads, config.top_m, config.expansion
        self.conv_D1W = nn.Parameter(layer.query.conv_DW.detach().unsqueeze(1))
        self.proj, self.query_norm = layer.query.proj, layer.query.norm
        self.keys_H2RNK, self.key_norm = layer.score.keys_H2RNK, layer.score.norm
        self.cores_HCRR = layer.select.cores_HCRR
        u_HR, t_HR = self.singular_pair()
        self.register_buffer("u_HR", u_HR)
        self.register_buffer("t_HR", t_HR)
        count = layer.lookup.num_addresses
        addresses = torch.arange(count, device=self.keys_H2RNK.device)
        self.register_buffer("permutation", permute_addresses(addresses, count, layer.lookup.seed))
        self.values_NV = layer.table.values_NV
        self.expand = layer.expand.weight

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        padded_BDS = F.pad(hidden_BSD.transpose(1, 2), (self.conv_D1W.shape[-1] - 1, 0))
        mixed_BSD = F.conv1d(padded_BDS, self.conv_D1W, groups=hidden_BSD.shape[-1]).transpose(1, 2)
        query_T2K = self.query_norm(self.proj(mixed_BSD.flatten(0, 1)).unflatten(-1, (2, -1)))
        keys_H2RNK = self.key_norm(self.keys_H2RNK)
        row_THRN = torch.einsum("tk,hrnk->thrn", query_T2K[:, 0], keys_H2RNK[:, 0])
        col_THRN = torch.einsum("tk,hrnk->thrn", query_T2K[:, 1], keys_H2RNK[:, 1])
        scores_TKC, addresses_TK = self.select(row_THRN, col_THRN)
        indices_TK = self.permutation[addresses_TK]
        pooled_TEV = gather_einsum(self.values_NV, self.blocks, indices_TK, scores_TKC)
        return F.linear(pooled_TEV.flatten(1).to(self.expand.dtype), self.expand).view(hidden_BSD.shape)

    def singular_pair(self) -> tuple[Tensor, Tensor]:
        u_HR, t_HR = leading_singular_pair(self.cores_HCRR.sum(1))
        return u_HR.to(self.cores_HCRR.dtype), t_HR.to(self.cores_HCRR.dtype)

    def select(self, row_THRN: Tensor, col_THRN: Tensor) -> tuple[Tensor, Tensor]:
        n, m = row_THRN.shape[-1], self.m
        u_HR, t_HR = self.singular_pair() if self.training else (self.u_HR, self.t_HR)
        row_THM = torch.einsum("hr,thrn->thn", u_HR, row_THRN).topk(m).indices
        col_THM = torch.einsum("hr,thrn->thn", t_HR, col_THRN).topk(m).indices
        where = (*row_THRN.shape[:3], m)
        row_THRM = row_THRN.gather(-1, row_THM.unsqueeze(2).expand(where))
        col_THRM = col_THRN.gather(-1, col_THM.unsqueeze(2).expand(where))
        by_core_THCMM = torch.einsum("thri,hcrs,thsj->thcij", row_THRM, self.cores_HCRR, col_THRM)
        best_THM = by_core_THCMM.sum(2).flatten(2).topk(m).indices
        addresses_THM = row_THM.gather(-1, best_THM // m) * n + col_THM.gather(-1, best_THM % m)
        slots = best_THM.unsqueeze(2).expand(-1, -1, by_core_THCMM.shape[2], -1)
        scores_THCM = by_core_THCMM.flatten(3).gather(-1, slots)
        return scores_THCM.transpose(2, 3).flatten(1, 2), addresses_THM.flatten(1)
