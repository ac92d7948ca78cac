"""Stochastic rounding inside of a kernel."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton import language as tl

from ultramem.ops import round_stochastically
from ultramem.ops.triton.round_stochastically import row_word, to_element


@triton.jit(do_not_specialize=("seed", "step"))
def rounding_kernel(values, rows, out, seed, step, D: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0) + tl.arange(0, 1)
    word = row_word(tl.load(rows + index), seed, step)[:, None]
    column = tl.arange(0, D)[None, :]
    at = index[:, None] * D + column
    tl.store(out + at, to_element(tl.load(values + at), word, column, tl.bfloat16))


@pytest.mark.parametrize(("seed", "step"), [(0, 1), (5, 16), ((7 << 32) + 5, 123456), (-3, 2**31 - 1)])
def test_the_bits_are_those_of_plain_pytorch(device: torch.device, seed: int, step: int) -> None:
    """Of seeds and rows that take more than 32 bits too."""
    values = torch.randn(6, 64, device=device)
    values[1, :3] = torch.tensor([math.inf, -math.inf, math.nan])
    rows = torch.tensor([0, 1, 2**31 + 3, 2**32 + 1, 2**32 + 2, 2**40 + 7], device=device)
    out = torch.full_like(values, math.nan, dtype=torch.bfloat16)
    rounding_kernel[(6,)](values, rows, out, seed, step, D=64)
    expected = round_stochastically(values, rows, seed=seed, step=step)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
