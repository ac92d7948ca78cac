"""Which slots of a memory layer a token reads, in plain PyTorch. It stands beside the weights.

Shapes: T tokens, H heads, R ranks, N side of the grid of addresses, S candidates of a side, M slots per head, C cores.
"""

import math

import torch
from torch import Tensor, nn

from .configuration_ultramem import MemoryLayerConfig


class Select(nn.Module):
    """The best slots of the grid: `row^T core col` for rank 2 and above (TDQKR), `row + col` for rank 1 (PKM).

    Tucker scores choose rows by `u^T row` and columns by `t^T col`, with (u, t) the leading singular pair of the summed
    core, and rescore the cells where these cross. Of equal scores the lower address wins.
    """

    def __init__(self, config: MemoryLayerConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.num_heads, config.num_cores, config.rank, config.rank)
        self.cores_HCRR = nn.Parameter(torch.empty(shape)) if config.rank > 1 else None

    def forward(self, row_THRN: Tensor, col_THRN: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [T,H,M,C] and addresses [T,H,M], `row * N + col`, best first."""
        dtype = row_THRN.dtype
        wide = torch.promote_types(dtype, torch.float32)
        row_THRN, col_THRN = row_THRN.to(wide), col_THRN.to(wide)
        if self.cores_HCRR is None:
            scores, addresses = self._additive(row_THRN, col_THRN)
        else:
            scores, addresses = self._tucker(row_THRN, col_THRN, self.cores_HCRR)
        scores = scores.to(dtype)
        if self.config.score_function == "softmax":
            scores = scores.softmax(dim=2, dtype=wide).to(dtype)
        return scores, addresses

    def _additive(self, row_TH1N: Tensor, col_TH1N: Tensor) -> tuple[Tensor, Tensor]:
        row_THN, col_THN, m, n = row_TH1N[:, :, 0], col_TH1N[:, :, 0], self.config.top_m, self.config.grid_side
        rows, cols = _top_positions(row_THN, m), _top_positions(col_THN, m)
        cell = row_THN.gather(-1, rows).unsqueeze(-1) + col_THN.gather(-1, cols).unsqueeze(-2)
        addresses = _top_addresses(cell, rows, cols, n, m)
        scores = row_THN.gather(-1, addresses // n) + col_THN.gather(-1, addresses % n)
        return scores.unsqueeze(-1), addresses

    def _tucker(self, row_THRN: Tensor, col_THRN: Tensor, cores_HCRR: Tensor) -> tuple[Tensor, Tensor]:
        config, n = self.config, self.config.grid_side
        u_HR, t_HR = leading_singular_pair(cores_HCRR.sum(1))
        cores_HCRR = cores_HCRR.to(row_THRN.dtype)
        core_HRR = cores_HCRR.sum(1)
        a_THN = (row_THRN * u_HR.to(row_THRN).unsqueeze(-1)).sum(2)
        b_THN = (col_THRN * t_HR.to(col_THRN).unsqueeze(-1)).sum(2)
        keep = config.num_candidates

        def cells(rows: Tensor, cols: Tensor) -> Tensor:
            left = torch.einsum("hrs,thri->thsi", core_HRR, _gather(row_THRN, rows))
            return torch.einsum("thsi,thsj->thij", left, _gather(col_THRN, cols))

        if config.candidates == "one_tailed":
            rows, cols = _top_positions(a_THN, keep), _top_positions(b_THN, keep)
            addresses = _top_addresses(cells(rows, cols), rows, cols, n, config.top_m)
        else:
            tail = math.ceil(0.71 * keep)
            high = _top_positions(a_THN, tail), _top_positions(b_THN, tail)
            low = _top_positions(-a_THN, tail), _top_positions(-b_THN, tail)
            # With few rows the two ends overlap; a cell that both grids hold counts once.
            row_twice, col_twice = (
                (x.unsqueeze(-1) == y.unsqueeze(-2)).any(-1) for x, y in zip(low, high, strict=True)
            )
            twice = row_twice.unsqueeze(-1) & col_twice.unsqueeze(-2)
            cell = torch.cat([cells(*high).flatten(2), cells(*low).masked_fill(twice, -torch.inf).flatten(2)], -1)
            address = torch.cat([_cross(*high, n), _cross(*low, n)], -1)
            addresses = _best(cell, address, config.top_m)
        rows, cols = _gather(row_THRN, addresses // n), _gather(col_THRN, addresses % n)
        return torch.einsum("thrm,hcrs,thsm->thmc", rows, cores_HCRR, cols), addresses


def _gather(scores_THRN: Tensor, positions_THS: Tensor) -> Tensor:
    return scores_THRN.gather(-1, positions_THS.unsqueeze(2).expand(-1, -1, scores_THRN.shape[2], -1))


def _top_positions(scores_THN: Tensor, count: int) -> Tensor:
    """Positions of the largest scores, in ascending order."""
    position = torch.arange(scores_THN.shape[-1], device=scores_THN.device)
    return _best(scores_THN, position.expand_as(scores_THN), count).sort(-1).values


def _top_addresses(cell_THSS: Tensor, rows_THS: Tensor, cols_THS: Tensor, n: int, count: int) -> Tensor:
    return _best(cell_THSS.flatten(2), _cross(rows_THS, cols_THS, n), count)


def _cross(rows_THS: Tensor, cols_THS: Tensor, n: int) -> Tensor:
    return (rows_THS.unsqueeze(-1) * n + cols_THS.unsqueeze(-2)).flatten(2)


def _best(scores: Tensor, addresses: Tensor, count: int) -> Tensor:
    """Addresses of the largest scores along the last axis, best first; of equal scores the lower address first."""
    if scores.dtype == torch.float64:
        addresses, order = addresses.sort(-1)
        order = scores.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices[..., :count]
        return addresses.gather(-1, order)
    # Score and address in one integer: torch.topk leaves ties to chance.
    bits = torch.where(scores == 0, 0.0, scores).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    packed = ordered * 2**32 + (2**32 - 1 - addresses)
    return 2**32 - 1 - (packed.topk(count, dim=-1).values & (2**32 - 1))


@torch.no_grad()
def leading_singular_pair(core_HRR: Tensor) -> tuple[Tensor, Tensor]:
    """Leading left and right singular vectors [H,R] in float32; their common sign makes `sum(u) + sum(t) >= 0`."""
    core = core_HRR.float()
    gram = (core.transpose(1, 2).unsqueeze(3) * core.unsqueeze(1)).sum(2)
    if gram.shape[-1] == 2:  # the rotation that makes a 2 x 2 matrix diagonal
        angle_H = 0.5 * torch.atan2(2 * gram[:, 0, 1], gram[:, 0, 0] - gram[:, 1, 1])
        t_HR = torch.stack([angle_H.cos(), angle_H.sin()], dim=1)
    else:  # 2^10 power iterations by squaring; the trace keeps the numbers in range
        for _ in range(2):
            trace_H = gram.diagonal(dim1=1, dim2=2).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
            gram = gram / trace_H.view(-1, 1, 1)
            for _ in range(5):
                gram = (gram.unsqueeze(3) * gram.unsqueeze(1)).sum(2)
        largest = gram.diagonal(dim1=1, dim2=2).argmax(dim=1)
        t_HR = _unit(gram[torch.arange(gram.shape[0], device=gram.device), largest])
    u_HR = _unit((core * t_HR.unsqueeze(1)).sum(2))
    sign_H1 = torch.where(u_HR.sum(1) + t_HR.sum(1) < 0, -1.0, 1.0).unsqueeze(1)
    return u_HR * sign_H1, t_HR * sign_H1


def _unit(vector_HR: Tensor) -> Tensor:
    tiny = torch.finfo(vector_HR.dtype).tiny
    scaled = vector_HR / vector_HR.abs().amax(1, keepdim=True).clamp_min(tiny)
    return scaled / scaled.square().sum(1, keepdim=True).sqrt().clamp_min(tiny)
