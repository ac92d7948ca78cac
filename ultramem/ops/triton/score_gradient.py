"""Gradient of the scores alone, and the dot products of lookup_dot, which are the same thing with one block.

Shapes: N rows, D value dim, T tokens, K slots a token, C cores, E blocks, X = D/C columns a core.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.library import wrap_triton

from ultramem.ops.triton._launch import cdiv, next_power_of_2, refuse_float64
from ultramem.ops.triton.permute_addresses import permute_addresses

# Columns of a tile: a core's share of a row at the paper's sizes, in one warp, so that a dot product needs no other.
MAX_COLUMNS = 512
# Bytes of rows in a tile: 8 loads of 16 bytes a lane, and 20 resident warps keep 80 KB in flight a processor.
TILE_BYTES = 4096
MAX_SLOTS = 32
# Tiles that a program goes through, where tokens make enough programs: the indices of the next are loaded on the way.
TILES = 4
FEW_TOKENS = 64


@triton.jit
def _load_slots(indices, token, slot, N, K, E: tl.constexpr):
    index = tl.load(indices + token * K + slot, mask=slot < K, other=0)
    block = tl.zeros_like(index)
    for e in tl.static_range(1, E):
        block += (index >= e * N).to(tl.int64)
    return index - block * N, block


@triton.jit
def score_gradient_kernel(
    grad,
    values,
    indices,
    grad_scores,
    N,
    K,
    D: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """grad_scores[t,k,c] = values[row,c] . grad[t,block,c]: the backward of a frozen table, in one pass over the rows.

    A program serves TILES * SLOTS slots of one token and one core.
    Bytes: K * D * itemsize of rows a token; the E * D of grad come from L1 after the first slot of each block.
    """
    X: tl.constexpr = D // C
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * SLOTS * TILES
    core = tl.program_id(2)
    rows_N = tl.cast(N, tl.int64)
    slot = first + tl.arange(0, SLOTS)
    row, block = _load_slots(indices, token, slot, rows_N, K, E)
    for tile in range(TILES):
        slot = first + tile * SLOTS + tl.arange(0, SLOTS)
        acc = tl.zeros([SLOTS, COLUMNS], tl.float32)
        for x0 in tl.static_range(0, X, COLUMNS):
            lane = x0 + tl.arange(0, COLUMNS)
            column = core * X + lane
            mask = (slot < K)[:, None] & (lane < X)[None, :]
            value = tl.load(values + row[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
            g = tl.load(grad + (token * E + block)[:, None] * D + column[None, :], mask=mask, other=0.0)
            acc += value * g.to(tl.float32)
        if tile < TILES - 1:
            row, block = _load_slots(indices, token, slot + SLOTS, rows_N, K, E)
        summed = tl.sum(acc, axis=1).to(grad_scores.dtype.element_ty)
        tl.store(grad_scores + (token * K + slot) * C + core, summed, mask=slot < K)


def score_gradient_launch(t: Any, k: int, d: int, c: int, num_blocks: int, *, itemsize: int) -> dict[str, Any]:
    """Constants and warps of the kernel for T tokens (an int, or a size that a compiler leaves open)."""
    columns = min(MAX_COLUMNS * 2 // itemsize, next_power_of_2(d // c))
    slots = max(1, min(MAX_SLOTS, TILE_BYTES // (columns * itemsize), next_power_of_2(k)))
    tiles = 1 if statically_known_true(t <= FEW_TOKENS) else min(TILES, cdiv(k, slots))
    constants = {"D": d, "C": c, "E": num_blocks, "SLOTS": slots, "TILES": tiles, "COLUMNS": columns}
    return {**constants, "num_warps": 1}


def score_gradient(
    grad_TED: Tensor,
    values_ND: Tensor,
    indices_TK: Tensor,
    like_TKC: Tensor,
    *,
    permutation_seed: int | None = None,
) -> Tensor:
    """Gradient of the scores [T,K,C] in the dtype of `like_TKC`."""
    refuse_float64(values_ND=values_ND, like_TKC=like_TKC)
    n, d = map(int, values_ND.shape)
    t, k, c = like_TKC.shape
    num_blocks, k, c = int(grad_TED.shape[1]), int(k), int(c)
    grad_scores = like_TKC.new_empty(t, k, c)
    if k == 0 or t == 0:
        return grad_scores
    if permutation_seed is not None:  # by every lane that reads a row it would cost more than the row
        indices_TK = permute_addresses(indices_TK, n * num_blocks, permutation_seed, False)
    launch = score_gradient_launch(t, k, d, c, num_blocks, itemsize=values_ND.element_size())
    wrap_triton(score_gradient_kernel)[(t, cdiv(k, launch["SLOTS"] * launch["TILES"]), c)](
        grad_TED, values_ND, indices_TK, grad_scores, n, k, **launch
    )
    return grad_scores
