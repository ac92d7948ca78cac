"""Stochastic rounding: unbiased, exact where bfloat16 is exact, and a function of its arguments alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ultramem.ops import round_stochastically

ROUNDINGS = 4096


def many_roundings(values_D: Tensor, steps: int = ROUNDINGS) -> Tensor:
    """[steps, D], one row number, many steps."""
    row = torch.tensor([17], device=values_D.device)
    return torch.cat([round_stochastically(values_D.unsqueeze(0), row, seed=5, step=s) for s in range(steps)]).double()


def test_each_number_goes_to_its_neighbours_and_the_mean_stays(device: torch.device) -> None:
    values = torch.cat([torch.randn(200), torch.tensor([1.0 + 2**-9, -3.0 - 2**-12, 1e-30, -1e-39, 1e38])]).to(device)
    rounded = many_roundings(values)
    # Of 2^16 steps between neighbours, truncation keeps the lower in magnitude.
    lower = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
    upper = ((values.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    assert ((rounded == lower.double()) | (rounded == upper.double())).all()
    gap = (upper - lower).double().abs()
    error = (rounded.mean(0) - values.double()).abs()
    assert (error <= 4.5 * 0.5 * gap / math.sqrt(ROUNDINGS)).all()  # 4.5 standard errors of the widest coin
    assert (error / gap).mean() < 0.5 / math.sqrt(ROUNDINGS)


def test_neighbouring_elements_are_drawn_independently(device: torch.device) -> None:
    """Across columns, rows, steps and seeds alike."""
    half = torch.full((256, 256), 1.0 + 2**-8, device=device)  # midway between neighbours
    rows = torch.arange(256, device=device) * 3
    up = torch.stack(
        [
            round_stochastically(half, rows, seed=seed, step=step).float() > 1.005
            for seed, step in ((0, 1), (0, 2), (1, 1))
        ]
    ).double()
    bound = 5 / math.sqrt(up[0].numel())
    signs = 2 * up - 1
    assert signs.mean((1, 2)).abs().max() < bound
    pairs = [(signs[:, :, 1:], signs[:, :, :-1]), (signs[:, 1:], signs[:, :-1]), (signs[1:], signs[:-1])]
    pairs += [(signs[0], signs[2]), (signs[:, ::2, ::2], signs[:, 1::2, 1::2])]
    for a, b in pairs:
        assert (a * b).mean().abs() < bound
    assert signs.mean(2).abs().max() < 5 / 16  # no row and no column leans
    assert signs.mean(1).abs().max() < 5 / 16


def test_what_bfloat16_holds_stays(device: torch.device) -> None:
    exact = torch.cat([torch.randn(100).bfloat16().float(), torch.tensor([0.0, -0.0, math.inf, -math.inf])]).to(device)
    rounded = many_roundings(exact, steps=64)
    assert torch.equal(rounded, exact.double().expand_as(rounded))
    nan = torch.tensor([[math.nan, -1]], dtype=torch.float32, device=device)
    nan.view(torch.int32)[0, 1] = 0x7FFFFFFF  # a NaN to whose bits nothing may be added
    assert round_stochastically(nan, torch.zeros(1, dtype=torch.int64, device=device), seed=0, step=1).isnan().all()


def test_a_row_rounds_alike_in_whatever_company(device: torch.device) -> None:
    values, rows = (
        torch.randn(9, 33, device=device),
        torch.tensor([0, 3, 4, 8, 9, 2**33, 2**33 + 1, 2**40, 5]).to(device),
    )
    together = round_stochastically(values, rows, seed=2**40 + 1, step=7)
    order = torch.randperm(9)
    assert torch.equal(round_stochastically(values[order], rows[order], seed=2**40 + 1, step=7), together[order])
    one = round_stochastically(values[4:5].contiguous(), rows[4:5], seed=2**40 + 1, step=7)
    assert torch.equal(one, together[4:5])
    assert not torch.equal(round_stochastically(values, rows, seed=1, step=7), together)  # the high word counts
    same = values[:1].expand(9, -1).contiguous()
    distinct = round_stochastically(same, rows, seed=0, step=7)
    assert len(distinct.unique(dim=0)) == 9  # so does that of the row


def test_nothing_to_round(device: torch.device) -> None:
    empty = round_stochastically(
        torch.zeros(0, 4, device=device), torch.zeros(0, dtype=torch.int64, device=device), seed=0, step=1
    )
    assert empty.shape == (0, 4)
    assert empty.dtype == torch.bfloat16


def test_refuses_other_dtypes_and_shapes() -> None:
    rows = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"values_UD must have dtype torch.float32, got torch.float64"):
        round_stochastically(torch.zeros(2, 3).double(), rows, seed=0, step=1)
    with pytest.raises(ValueError, match=r"rows_U must have shape \(3,\)"):
        round_stochastically(torch.zeros(3, 3), rows, seed=0, step=1)
