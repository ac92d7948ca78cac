"""Forward of lookup_reduce on rows of int8 or int4 with a scale each: dequantised in registers, 16 bytes a lane.

The scale of a row multiplies its weights, once a slot. Rows of float8 are served by `lookup_reduce` itself.

Shapes: N rows, D value dim, T tokens, K slots a token, C cores, E blocks, G groups of blocks, X = D/C columns a core,
W words a core.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ultramem.ops.triton._launch import cdiv
from ultramem.ops.triton._slots import locate, permute_slots, place_of
from ultramem.ops.triton._words import WORD, flipped, fraction, row_order, word_bits
from ultramem.ops.triton.dispatch import Lookup, pool_tile, takes_products
from ultramem.ops.triton.lookup_product_quantized import lookup_product_quantized
from ultramem.ops.triton.lookup_reduce import lookup_reduce_fp8, pool_launch

# Loads of rows that a lane has in its tile: unpacked, 4 are as many registers as 8 of bfloat16.
ROW_LOADS = 4
# Blocks of a program: each has an accumulator for every element of a loaded word.
GROUP = {8: 4, 4: 2}


@triton.jit
def lookup_reduce_quantized_kernel(
    words,
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
    BITS: tl.constexpr,
    WORD: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PIECE: tl.constexpr,
    PERMUTATION: tl.constexpr,
):
    """out[t,e,x] = sum over slots k of token t in block e of scores[t,k,core(x)] * scales[row(k)] * values[row(k),x].

    As lookup_reduce_kernel, with COLUMNS in words of WORD bits. Their elements, in two's complement, are taken as
    1.5 + value / 2^BITS; the 1.5 of each slot comes off the sum at the end, three bits of float32's 24.
    Bytes: K * D * BITS / 8 of rows a token, each once; the scales of its rows, 32 each where a sector is not in L2.
    """
    COUNT: tl.constexpr = WORD // BITS
    W: tl.constexpr = D // C // COUNT
    token, core, first_word = place_of(W, C, COLUMNS)
    lane = first_word + tl.arange(0, COLUMNS)
    column = core * W + lane
    inside = lane < W
    group = tl.program_id(1)
    rows_N = tl.cast(N, tl.int64)
    indices += token * K
    scores += token * K * C + core
    if PERMUTATION is not None:
        permuted += token * K
        permute_slots(indices, permuted, K, PIECE, PERMUTATION)
        indices = permuted
    acc = ()
    totals = ()
    for _ in tl.static_range(GROUP):
        totals = totals + (tl.zeros([AT_ONCE], tl.float32),)
        for _ in tl.static_range(COUNT):
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
            weights = weights + (weight * tl.load(scales + row, mask=mine, other=0.0),)
            mask = mine[:, None] & inside[None, :]
            loaded = loaded + (tl.load(words + row[:, None] * (W * C) + column[None, :], mask=mask, other=0),)
            blocks = blocks + (block,)
        for i in tl.static_range(SLOTS // AT_ONCE):
            biased = flipped(loaded[i], BITS)
            added = ()
            summed = ()
            for e in tl.static_range(GROUP):
                weight = tl.where(blocks[i] == e, weights[i], 0.0)
                summed = summed + (totals[e] + weight,)
                for at in tl.static_range(COUNT):
                    added = added + (acc[e * COUNT + at] + weight[:, None] * fraction(biased, at, BITS),)
            acc = added
            totals = summed
    x = first_word * COUNT + tl.arange(0, COLUMNS * COUNT)
    for e in tl.static_range(GROUP):
        excess = 1.5 * tl.sum(totals[e], axis=0)
        pooled = ()
        for at in tl.static_range(COUNT):
            part = (tl.sum(acc[e * COUNT + at], axis=0) - excess) * (1 << BITS)
            pooled = pooled + (part.to(out.dtype.element_ty),)
        block = group * GROUP + e
        where = out + (token * E + block) * D + core * (W * COUNT) + x
        tl.store(where, row_order(pooled, COUNT), mask=(x < W * COUNT) & (x * 0 + block < E))


def quantized_lookup(k: int, d: int, c: int, num_blocks: int, *, bits: int) -> Lookup:
    """The lookup as dispatch sees it, in words or bytes."""
    core_bits, word = d // c * bits, word_bits(d // c, bits)
    return Lookup(
        slots=k,
        columns=core_bits // word,
        itemsize=word // 8,
        cores=c,
        blocks=num_blocks,
        group=GROUP[bits],
        row_loads=ROW_LOADS,
    )


def lookup_reduce_quantized(
    values_NB: Tensor,
    scales_N: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    num_blocks: int,
    permutation_seed: int | None,
) -> Tensor:
    """Pooled rows [T,E,D] in the dtype of the scores."""
    if values_NB.dtype == torch.float8_e4m3fn:
        return lookup_reduce_fp8(values_NB, scales_N, indices_TK, scores_TKC, num_blocks, permutation_seed)
    bits = 8 if values_NB.dtype == torch.int8 else 4
    n, row_bytes = map(int, values_NB.shape)
    t, k, c = scores_TKC.shape
    k, c, d = int(k), int(c), row_bytes * 8 // bits
    if t == 0:
        return scores_TKC.new_empty(t, num_blocks, d)
    lookup = quantized_lookup(k, d, c, num_blocks, bits=bits)
    word = 8 * lookup.itemsize
    words_NW = values_NB.view(torch.int32 if word == WORD else torch.int8)
    if scores_TKC.element_size() == 2 and takes_products(t):
        return lookup_product_quantized(
            words_NW, scales_N, indices_TK, scores_TKC, num_blocks, permutation_seed, d=d, bits=bits
        )
    out_TED = scores_TKC.new_empty(t, num_blocks, d)
    tile = pool_tile(t, lookup)
    launch = pool_launch(tile, k, d, c, num_blocks, size=n * num_blocks, permutation_seed=permutation_seed)
    permuted_TK = None if permutation_seed is None else indices_TK.new_empty(t, k)
    grid = (t * c * cdiv(lookup.columns, tile.columns), cdiv(num_blocks, tile.group))
    wrap_triton(lookup_reduce_quantized_kernel)[grid](
        words_NW,
        scales_N,
        indices_TK,
        scores_TKC,
        permuted_TK,
        out_TED,
        n,
        k,
        BITS=bits,
        WORD=word,
        **launch,
    )
    return out_TED
