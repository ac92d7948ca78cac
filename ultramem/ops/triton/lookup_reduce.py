"""Forward of lookup_reduce: every row is read once, 16 bytes a lane, several rows in flight, no atomics, one launch.

Shapes: N rows, D value dim, T tokens, K slots a token, C cores, E blocks, G groups of blocks, X = D/C columns a core.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ultramem.ops.triton._launch import refuse_float64
from ultramem.ops.triton.dispatch import Lookup, PoolTile, capability_of, pool_tile
from ultramem.ops.triton.slot_order import count_of, new_slot_order, order_constants, order_slots

# The first GPUs that convert float8 e4m3.
FP8_CAPABILITY = 89


@triton.jit
def lookup_reduce_kernel(
    values,
    scales,
    indices,
    scores,
    rows,
    weights,
    out,
    N,
    K,
    T,
    D: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    PERMUTATION: tl.constexpr,
):
    """out[t,e,x] = sum over slots k of token t in block e of scores[t,k,core(x)] * values[row(k),x].

    A program pools COLUMNS columns of one core of one token into a group of blocks, one block after the other. A tile
    is SLOTS rows; AT_ONCE of them are one load of the program's lanes, and only those stay apart in the accumulator.
    With one block and no permutation the indices are the rows; else `rows` and `weights` are memory to order them in.
    With `scales` [N], rows are bytes of float8 e4m3 and the scale of each multiplies its weights.
    Bytes: K * D * itemsize of rows a token, each once; 8 K of indices and 2 * (8 to 12) K of ordered slots a program,
    mostly from L1 and L2; E * D * itemsize written.
    """
    X: tl.constexpr = D // C
    CHUNKS: tl.constexpr = (X + COLUMNS - 1) // COLUMNS
    ORDERED: tl.constexpr = E > 1 or PERMUTATION is not None or scales is not None
    # Programs of a token are neighbours: together they read whole rows, and its indices from L2.
    program = tl.program_id(0)
    token = (program // (C * CHUNKS)).to(tl.int64)
    core = program // CHUNKS % C
    lane = program % CHUNKS * COLUMNS + tl.arange(0, COLUMNS)
    column = core * X + lane
    inside = lane < X
    group = tl.program_id(1)
    if ORDERED:
        first_slot = (group.to(tl.int64) * T + token) * K
        rows += first_slot
        weights += (first_slot * C) + core * tl.cast(K, tl.int64)
        sizes, begins = order_slots(
            indices, scores, scales, rows, weights, token, core, group * GROUP, N, K,
            C, GROUP, PIECE, PIECES, PERMUTATION,
        )  # fmt: skip
    else:
        rows = indices + token * K
        weights = scores + token * K * C + core
    for e in range(GROUP):
        if ORDERED:
            begin = count_of(begins, e)
            end = begin + count_of(sizes, e)
        else:
            begin = 0
            end = K
        acc = tl.zeros([AT_ONCE, COLUMNS], tl.float32)
        for k0 in range(begin, end, SLOTS):
            loaded = ()
            weight = ()
            for i in tl.static_range(SLOTS // AT_ONCE):
                slot = k0 + i * AT_ONCE + tl.arange(0, AT_ONCE)
                row = tl.load(rows + slot, mask=slot < end, other=0).to(tl.int64)
                weight = weight + (tl.load(weights + slot * (1 if ORDERED else C), mask=slot < end, other=0.0),)
                mask = (slot < end)[:, None] & inside[None, :]
                value = tl.load(values + row[:, None] * D + column[None, :], mask=mask, other=0)
                if scales is not None:
                    value = value.to(tl.float8e4nv, bitcast=True)
                loaded = loaded + (value,)
            for i in tl.static_range(SLOTS // AT_ONCE):
                acc += weight[i].to(tl.float32)[:, None] * loaded[i].to(tl.float32)
        block = group * GROUP + e
        pooled = tl.sum(acc, axis=0).to(out.dtype.element_ty)
        tl.store(out + (token * E + block) * D + column, pooled, mask=inside & (lane * 0 + block < E))


def pool_launch(
    tile: PoolTile, k: int, d: int, c: int, num_blocks: int, *, size: int = 0, permutation_seed: int | None = None
) -> dict[str, Any]:
    """Constants and warps of the kernel, for K slots a token of a virtual table of `size` rows."""
    constants = {"D": d, "C": c, "E": num_blocks, **tile.constants, **order_constants(k, size, permutation_seed)}
    return {**constants, "num_warps": tile.warps}


def lookup_reduce(
    values_ND: Tensor, indices_TK: Tensor, scores_TKC: Tensor, num_blocks: int, permutation_seed: int | None
) -> Tensor:
    """Pooled rows [T,E,D]."""
    refuse_float64(values_ND=values_ND, scores_TKC=scores_TKC)
    return _pool(values_ND, None, indices_TK, scores_TKC, num_blocks, permutation_seed, values_ND.dtype)


def lookup_reduce_fp8(
    values_ND: Tensor,
    scales_N: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    num_blocks: int,
    permutation_seed: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """Pooled rows [T,E,D] in `dtype`, of float8 e4m3 values with a scale a row."""
    capability = capability_of(values_ND.device)
    if capability < FP8_CAPABILITY:
        least, here = (f"{each // 10}.{each % 10}" for each in (FP8_CAPABILITY, capability))
        raise ValueError(f"values of {values_ND.dtype} need a GPU of compute capability {least} or more, got {here}")
    values_NB = values_ND.view(torch.uint8)
    return _pool(values_NB, scales_N, indices_TK, scores_TKC, num_blocks, permutation_seed, dtype)


def _pool(
    values_ND: Tensor,
    scales_N: Tensor | None,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    num_blocks: int,
    permutation_seed: int | None,
    dtype: torch.dtype,
) -> Tensor:
    n, d = map(int, values_ND.shape)
    t, k, c = scores_TKC.shape
    k, c = int(k), int(c)
    out_TED = values_ND.new_empty(t, num_blocks, d, dtype=dtype)
    if t == 0:
        return out_TED
    lookup = Lookup(slots=k, columns=d // c, itemsize=values_ND.element_size(), cores=c, blocks=num_blocks)
    tile = pool_tile(t, lookup, capability_of(values_ND.device))
    launch = pool_launch(tile, k, d, c, num_blocks, size=n * num_blocks, permutation_seed=permutation_seed)
    groups = triton.cdiv(num_blocks, tile.group)
    if num_blocks == 1 and permutation_seed is None and scales_N is None:
        rows, weights = indices_TK, scores_TKC
    else:
        rows, weights = new_slot_order(indices_TK, n, c, groups)
    chunks = triton.cdiv(d // c, tile.columns)
    wrap_triton(lookup_reduce_kernel)[(t * c * chunks, groups)](
        values_ND, scales_N, indices_TK, scores_TKC, rows, weights, out_TED, n, k, t, **launch
    )
    return out_TED
