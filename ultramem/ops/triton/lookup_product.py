"""Forward of lookup_reduce on tensor cores: a token's weights, spread over blocks, times its rows.

Shapes: N rows, D value dim, T tokens, K slots a token, C cores, E blocks, X = D/C columns a core.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ultramem.ops.triton._launch import cdiv, is_interpreted, next_power_of_2
from ultramem.ops.triton._slots import locate, place_of
from ultramem.ops.triton.permute_addresses import permutation_constants, permute

# Rows of the left factor: the least that a tensor core takes, and blocks of a program.
GROUP = 16
# Rows of a tile, all under way at once; a token with more slots takes several.
MAX_SLOTS = 128
# Columns of a program: 128 bytes of a row.
COLUMNS = 64
LEAST = 16  # slots and columns that a tensor core takes


@triton.jit
def lookup_product_kernel(
    values,
    indices,
    scores,
    out,
    N,
    K,
    D: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PERMUTATION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[t,e,x] = sum over slots k of token t in block e of scores[t,k,core(x)] * values[row(k),x].

    A program pools COLUMNS columns of one core of one token: its left factor [GROUP,SLOTS] has the weight of a slot in
    the row of its block and 0 elsewhere. BLOCKS of the GROUP rows are blocks of the table. Products of 16-bit numbers
    are exact in float32, in which they are added up.
    Bytes: K * D * itemsize of rows a token, each once, all of a tile asked for before the first is used; 8 K of indices
    a program, mostly from L1 and L2; E * D * itemsize written.
    """
    X: tl.constexpr = D // C
    token, core, first_column = place_of(X, C, COLUMNS)
    lane = first_column + tl.arange(0, COLUMNS)
    column = core * X + lane
    inside = lane < X
    first_block = tl.program_id(1) * GROUP
    rows_N = tl.cast(N, tl.int64)
    which = tl.arange(0, GROUP)
    pooled = tl.zeros([GROUP, COLUMNS], tl.float32)
    for piece in range(PIECES):
        slot = piece * SLOTS + tl.arange(0, SLOTS)
        index = tl.load(indices + token * K + slot, mask=slot < K, other=0)
        weight = tl.load(scores + (token * K + slot) * C + core, mask=slot < K, other=0.0)
        if PERMUTATION is not None:
            # The gather gives each element back. Without it every lane that reads a row would permute its address.
            index = tl.gather(permute(index, PERMUTATION, False), tl.arange(0, SLOTS), 0)
        row, block, mine = locate(index, slot < K, first_block, rows_N, BLOCKS)
        mask = mine[:, None] & inside[None, :]
        value = tl.load(values + row[:, None] * D + column[None, :], mask=mask, other=0.0)
        spread = tl.where((block[None, :] == which[:, None]) & mine[None, :], weight[None, :], 0.0)
        if WIDE:
            pooled = tl.dot(spread.to(tl.float32), value.to(tl.float32), pooled)
        else:
            pooled = tl.dot(spread.to(value.dtype), value, pooled)
    at = out + (token * E + first_block + which)[:, None] * D + column[None, :]
    written = (which < BLOCKS) & (first_block + which < E)
    tl.store(at, pooled.to(out.dtype.element_ty), mask=written[:, None] & inside[None, :])


def tile_width(most: int, columns: int) -> int:
    """Columns of a program: `most`, or what there is."""
    return max(LEAST, min(most, next_power_of_2(columns)))


def tile_constants(
    k: int, d: int, c: int, num_blocks: int, *, group: int, size: int, permutation_seed: int | None
) -> dict[str, Any]:
    """What the launches of both kernels share, for K slots a token of a virtual table of `size` rows."""
    slots = min(MAX_SLOTS, max(LEAST, next_power_of_2(k)))
    return {
        "D": d,
        "C": c,
        "E": num_blocks,
        "GROUP": group,
        "BLOCKS": min(group, num_blocks),
        "SLOTS": slots,
        "PIECES": cdiv(k, slots),
        "PERMUTATION": None if permutation_seed is None else permutation_constants(size, permutation_seed),
        "WIDE": is_interpreted(),  # the interpreter multiplies the bits of bfloat16 as integers
        "num_warps": 4,
        "num_stages": 1,  # a tile is all that a program has under way, and others cover its wait
    }


def product_launch(
    k: int, d: int, c: int, num_blocks: int, *, size: int, permutation_seed: int | None
) -> dict[str, Any]:
    """Constants and warps of the kernel."""
    shared = tile_constants(k, d, c, num_blocks, group=GROUP, size=size, permutation_seed=permutation_seed)
    return {**shared, "COLUMNS": tile_width(COLUMNS, d // c)}


def lookup_product(
    values_ND: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    num_blocks: int,
    permutation_seed: int | None,
) -> Tensor:
    """Pooled rows [T,E,D]; values and scores of one 16-bit dtype."""
    n, d = map(int, values_ND.shape)
    t, k, c = scores_TKC.shape
    k, c = int(k), int(c)
    out_TED = values_ND.new_empty(t, num_blocks, d)
    if t == 0:
        return out_TED
    launch = product_launch(k, d, c, num_blocks, size=n * num_blocks, permutation_seed=permutation_seed)
    grid = (t * c * cdiv(d // c, launch["COLUMNS"]), cdiv(num_blocks, GROUP))
    wrap_triton(lookup_product_kernel)[grid](values_ND, indices_TK, scores_TKC, out_TED, n, k, **launch)
    return out_TED
