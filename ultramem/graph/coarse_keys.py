"""Coarse keys: selection reads one key set a side, and of the keys of every rank only those of the candidates.

The coarse score of a row, `a_n = sum_r u_r <K_rn, q>`, is `<sum_r u_r K_rn, q>` where the ranks have a query in common,
and so is that of a column with `t`. These sums of keys are constants. Scores by rank are then wanted of the candidates
alone. A token reads `N + R * S` keys a side and head instead of `R * N`.

Shapes: T tokens, H heads, R ranks, N side of the logical grid, K key width, S candidates of a side, C cores, M slots of
a head; B is 2 * H * R * N, all keys of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ultramem import ops
from ultramem.config import MemoryConfig
from ultramem.graph.memory_layer import Select
from ultramem.ops._registration import accumulation_dtype

LARGE_KEYS_BYTES = 1 << 24
"""Less fits a cache, and is read in the time of a few operators (docs/inference.md)."""


def has_coarse_keys(config: MemoryConfig) -> bool:
    """Whether a layer's selection can read coarse keys and be the same.

    Ranks that have queries of their own would need coarse keys as wide as all ranks together, so nothing would be
    saved; and two tails take their candidates from both ends.
    """
    return config.rank > 1 and config.rank_layout == "full" and config.candidates == "one_tailed"


def are_quicker_coarse(keys_2HRNK: Tensor) -> bool:
    """Whether decoding gains by coarse keys: where reading the keys is what scores cost. Measured on CPUs alone."""
    return keys_2HRNK.is_cpu and keys_2HRNK.nbytes >= LARGE_KEYS_BYTES


class CoarseScore(nn.Module):
    """In the place of `Score`: coarse scores of all rows and columns.

    Args:
        keys_2HRNK: normalised keys.
        singular_pair_2HR: u and t, leading singular vectors of the summed cores.
    """

    coarse_keys_2HNK: Tensor

    def __init__(self, keys_2HRNK: Tensor, singular_pair_2HR: Tensor) -> None:
        super().__init__()
        wide = accumulation_dtype(keys_2HRNK.dtype)
        weights_2HR11 = singular_pair_2HR.to(wide)[..., None, None]
        coarse_2HNK = (weights_2HR11 * keys_2HRNK.to(wide)).sum(2).to(keys_2HRNK.dtype)
        self.register_buffer("coarse_keys_2HNK", coarse_2HNK)

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Coarse scores [2,T,H,N] of a query [T,2,(H),K], and the query, side by side [2,T,(H),K]."""
        query = query.transpose(0, 1).contiguous()
        equation = "sthk,shnk->sthn" if query.ndim == 4 else "stk,shnk->sthn"
        return torch.einsum(equation, query, self.coarse_keys_2HNK), query


class CoarseSelect(Select):
    """In the place of `Select`: candidates by their coarse scores, and the best of them by their scores of every rank.

    Args:
        config: of the layer.
        select: whose cores and singular vectors it shares.
        keys_2HRNK: normalised keys.
    """

    keys_BK: Tensor
    first_key_2HR: Tensor
    first_alone_N: Tensor

    def __init__(self, config: MemoryConfig, select: Select, keys_2HRNK: Tensor) -> None:
        super().__init__(config)
        self.cores_HCRR, self.singular_pair_2HR = select.cores_HCRR, select.singular_pair_2HR
        self.register_buffer("keys_BK", keys_2HRNK.reshape(-1, keys_2HRNK.shape[-1]), persistent=False)
        *sides, n, _ = keys_2HRNK.shape
        count = keys_2HRNK[..., 0, 0].numel()
        self.register_buffer(
            "first_key_2HR", n * torch.arange(count, device=keys_2HRNK.device).view(sides), persistent=False
        )
        # Below any score, and different, since ties take the longer way through selection.
        position_N = torch.arange(n, device=keys_2HRNK.device, dtype=accumulation_dtype(keys_2HRNK.dtype))
        first_alone_N = torch.where(position_N == 0, 0, -1e30 * (1 + position_N / n))
        self.register_buffer("first_alone_N", first_alone_N, persistent=False)

    def _top_m(self, coarse_2THN: Tensor, query: Tensor) -> ops.TopK:
        assert self.cores_HCRR is not None
        assert self.singular_pair_2HR is not None
        n, s = coarse_2THN.shape[-1], self.num_candidates
        side_THN = coarse_2THN.flatten(0, 1).to(self.first_alone_N.dtype)
        # Crossed with a side of one score that counts, the best cells are the best scores.
        cells_THS = ops.product_topk(side_THN, self.first_alone_N.expand(side_THN.shape), s).addresses
        # In ascending order, so that of equal scores the lower address stays the one that is kept.
        candidates_2THS = (cells_THS // n).sort(-1).values.view(*coarse_2THN.shape[:-1], s)
        rows_THRS, cols_THRS = self._scores_by_rank(candidates_2THS, query).unbind(0)
        u_HR, t_HR = self.singular_pair_2HR.unbind(0)
        scores_THMC, cells_THM = ops.tucker_topk(rows_THRS, cols_THRS, self.cores_HCRR, u_HR, t_HR, s)
        row_THM = candidates_2THS[0].gather(-1, cells_THM // s)
        col_THM = candidates_2THS[1].gather(-1, cells_THM % s)
        return ops.TopK(scores_THMC[:, :, : self.top_m], (row_THM * n + col_THM)[:, :, : self.top_m])  # best first

    def _scores_by_rank(self, candidates_2THS: Tensor, query: Tensor) -> Tensor:
        """Scores [2,T,H,R,S] of the candidates."""
        index_2THRS = self.first_key_2HR[:, None, :, :, None] + candidates_2THS.unsqueeze(3)
        queries_QK = query.flatten(0, -2)  # a query for all heads, or one for each
        scores = ops.lookup_dot(self.keys_BK, index_2THRS.reshape(queries_QK.shape[0], -1), queries_QK)
        return scores.view(index_2THRS.shape)


def fold_coarse_keys(layer: nn.Module, config: MemoryConfig, keys_2HRNK: Tensor) -> None:
    """Make the stages `score` and `select` of a layer read coarse keys, in place.

    Args:
        layer: a folded `UltraMemLayer` whose config `has_coarse_keys`.
        config: of the layer.
        keys_2HRNK: its normalised keys, which are shared.
    """
    select = layer.select
    assert isinstance(select, Select)
    assert select.singular_pair_2HR is not None
    layer.register_module("score", CoarseScore(keys_2HRNK, select.singular_pair_2HR).eval())
    layer.register_module("select", CoarseSelect(config, select, keys_2HRNK).eval())
