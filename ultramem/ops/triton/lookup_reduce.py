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

from ultramem.ops.triton._launch import cdiv, refuse_float64
from ultramem.ops.triton._slots import locate, permutation_launch, permute_slots, place_of
from ultramem.ops.triton.dispatch import Lookup, PoolTile, capability_of, pool_tile, takes_products
from ultramem.ops.triton.lookup_product import lookup_product

# The first GPUs that convert float8 e4m3.
FP8_CAPABILITY = 89


@triton.jit
def lookup_reduce_kernel(
    values,
    scales,
    indices,
    scores,
    permuted,
    out,
    N,
    K,
    D: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PIECE: tl.constexpr,
    PERMUTATION: tl.constexpr,
):
    """out[t,e,x] = sum over slots k of token t in block e of scores[t,k,core(x)] * values[row(k),x].

    A program pools COLUMNS columns of one core of one token into a group of blocks, with an accumulator for each: no
    slot waits for its block's turn. A tile is SLOTS rows; AT_ONCE of them are one load of the program's lanes, and only
    those stay apart in the accumulators. With PERMUTATION, `permuted` [T,K] is memory for the addresses that it gives.
    With `scales` [N], rows are bytes of float8 e4m3 and the scale of each multiplies its weights.
    Bytes: K * D * itemsize of rows a token, each once; 8 K of indices a program, mostly from L1 and L2;
    E * D * itemsize written.
    """
    X: tl.constexpr = D // C
    token, core, first_column = place_of(X, C, COLUMNS)
    lane = first_column + tl.arange(0, COLUMNS)
    column = core * X + lane
    inside = lane < X
    group = tl.program_id(1)
    rows_N = tl.cast(N, tl.int64)
    indices += token * K
    scores += token * K * C + core
    if PERMUTATION is not None:
        permuted += token * K
        permute_slots(indices, permuted, K, PIECE, PERMUTATION)
        indices = permuted
    acc = ()
    for _ in tl.static_range(GROUP):
        acc = acc + (tl.zeros([AT_ONCE, COLUMNS], tl.float32),)
    for k0 in range(0, K, SLOTS):
        loaded = ()
        weights = ()
        blocks = ()
        for i in tl.static_range(SLOTS // AT_ONCE):
            slot = k0 + i * AT_ONCE + tl.arange(0, AT_ONCE)
            index = tl.load(indices + slot, mask=slot < K, other=0)
            row, block, mine = locate(index, slot < K, group * GROUP, rows_N, GROUP)
            weight = tl.load(scores + slot * C, mask=mine, other=0.0).to(tl.float32)
            if scales is not None:
                weight *= tl.load(scales + row, mask=mine, other=0.0)
            mask = mine[:, None] & inside[None, :]
            value = tl.load(values + row[:, None] * D + column[None, :], mask=mask, other=0)
            if scales is not None:
                value = value.to(tl.float8e4nv, bitcast=True)
            loaded = loaded + (value,)
            weights = weights + (weight,)
            blocks = blocks + (block,)
        for i in tl.static_range(SLOTS // AT_ONCE):
            value = loaded[i].to(tl.float32)
            added = ()
            for e in tl.static_range(GROUP):
                added = added + (acc[e] + tl.where(blocks[i] == e, weights[i], 0.0)[:, None] * value,)
            acc = added
    for e in tl.static_range(GROUP):
        block = group * GROUP + e
        pooled = tl.sum(acc[e], axis=0).to(out.dtype.element_ty)
        tl.store(out + (token * E + block) * D + column, pooled, mask=inside & (lane * 0 + block < E))


def pool_launch(
    tile: PoolTile, k: int, d: int, c: int, num_blocks: int, *, size: int = 0, permutation_seed: int | None = None
) -> dict[str, Any]:
    """Constants and warps of the kernel, for K slots a token of a virtual table of `size` rows."""
    constants = {"D": d, "C": c, "E": num_blocks, **tile.constants, **permutation_launch(k, size, permutation_seed)}
    return {**constants, "num_warps": tile.warps}


def lookup_reduce(
    values_ND: Tensor, indices_TK: Tensor, scores_TKC: Tensor, num_blocks: int, permutation_seed: int | None
) -> Tensor:
    """Pooled rows [T,E,D]."""
    refuse_float64(values_ND=values_ND, scores_TKC=scores_TKC)
    t, k, c = scores_TKC.shape
    lookup = Lookup(
        slots=int(k),
        columns=int(values_ND.shape[1]) // int(c),
        itemsize=values_ND.element_size(),
        cores=int(c),
        blocks=num_blocks,
    )
    if lookup.itemsize == 2 and values_ND.dtype == scores_TKC.dtype and takes_products(t):
        return lookup_product(values_ND, indices_TK, scores_TKC, num_blocks, permutation_seed)
    return _pool(values_ND, None, indices_TK, scores_TKC, lookup, permutation_seed, values_ND.dtype)


def lookup_reduce_fp8(
    values_ND: Tensor,
    scales_N: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    num_blocks: int,
    permutation_seed: int | None,
) -> Tensor:
    """Pooled rows [T,E,D] in the dtype of the scores, of float8 e4m3 values with a scale a row."""
    capability = capability_of(values_ND.device)
    if capability < FP8_CAPABILITY:
        least, here = (f"{each // 10}.{each % 10}" for each in (FP8_CAPABILITY, capability))
        raise ValueError(f"values of {values_ND.dtype} need a GPU of compute capability {least} or more, got {here}")
    k, c = map(int, scores_TKC.shape[1:])
    lookup = Lookup(slots=k, columns=int(values_ND.shape[1]) // c, itemsize=1, cores=c, blocks=num_blocks)
    values_NB = values_ND.view(torch.uint8)
    return _pool(values_NB, scales_N, indices_TK, scores_TKC, lookup, permutation_seed, scores_TKC.dtype)


def _pool(
    values_ND: Tensor,
    scales_N: Tensor | None,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    lookup: Lookup,
    permutation_seed: int | None,
    dtype: torch.dtype,
) -> Tensor:
    n, d = map(int, values_ND.shape)
    t, k, c, e = scores_TKC.shape[0], lookup.slots, lookup.cores, lookup.blocks
    out_TED = values_ND.new_empty(t, e, d, dtype=dtype)
    if t == 0:
        return out_TED
    tile = pool_tile(t, lookup)
    launch = pool_launch(tile, k, d, c, e, size=n * e, permutation_seed=permutation_seed)
    permuted_TK = None if permutation_seed is None else indices_TK.new_empty(t, k)
    grid = (t * c * cdiv(lookup.columns, tile.columns), cdiv(e, tile.group))
    wrap_triton(lookup_reduce_kernel)[grid](
        values_ND, scales_N, indices_TK, scores_TKC, permuted_TK, out_TED, n, k, **launch
    )
    return out_TED
