"""Pooling of int8 or int4 rows on tensor cores, as lookup_product does it with rows of 16 bits.

Shapes: N rows, D value dim, T tokens, K slots a token, C cores, E blocks, W words a core, X = D/C columns a core.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ultramem.ops.triton._launch import cdiv
from ultramem.ops.triton._slots import locate, place_of
from ultramem.ops.triton._words import flipped, fraction, row_order, word_bits
from ultramem.ops.triton.lookup_product import tile_constants, tile_width
from ultramem.ops.triton.permute_addresses import permute

# Blocks of a program: half of the rows of the left factor, as a weight takes two of them.
GROUP = 8
# Words of a program's columns.
COLUMNS = 32


@triton.jit
def lookup_product_quantized_kernel(
    words,
    scales,
    indices,
    scores,
    out,
    N,
    K,
    D: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    BITS: tl.constexpr,
    WORD: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PERMUTATION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[t,e,x] = sum over slots k of token t in block e of scores[t,k,core(x)] * scales[row(k)] * values[row(k),x].

    As lookup_product_kernel, with COLUMNS in words of WORD bits and a product for each place in a word. An integer of 8
    bits is exact in bfloat16; a weight, score times scale, is the sum of two, one in each half of the left factor, and
    loses what is below 2^-17 of it.
    Bytes: K * D * BITS / 8 of rows a token, each once; the scales of its rows, 32 each where a sector is not in L2.
    """
    COUNT: tl.constexpr = WORD // BITS
    W: tl.constexpr = D // C // COUNT
    token, core, first_word = place_of(W, C, COLUMNS)
    lane = first_word + tl.arange(0, COLUMNS)
    inside = lane < W
    first_block = tl.program_id(1) * GROUP
    rows_N = tl.cast(N, tl.int64)
    which = tl.arange(0, 2 * GROUP)
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([2 * GROUP, COLUMNS], tl.float32),)
    for piece in range(PIECES):
        slot = piece * SLOTS + tl.arange(0, SLOTS)
        index = tl.load(indices + token * K + slot, mask=slot < K, other=0)
        weight = tl.load(scores + (token * K + slot) * C + core, mask=slot < K, other=0.0).to(tl.float32)
        if PERMUTATION is not None:
            index = tl.gather(permute(index, PERMUTATION, False), tl.arange(0, SLOTS), 0)  # see lookup_product_kernel
        row, block, mine = locate(index, slot < K, first_block, rows_N, BLOCKS)
        weight *= tl.load(scales + row, mask=mine, other=0.0)
        high = weight.to(tl.bfloat16)
        rest = (weight - high.to(tl.float32)).to(tl.bfloat16)
        mask = mine[:, None] & inside[None, :]
        word = tl.load(words + row[:, None] * (W * C) + (core * W + lane)[None, :], mask=mask, other=0)
        half = tl.where((which < GROUP)[:, None], high[None, :], rest[None, :])
        spread = tl.where((block[None, :] == (which % GROUP)[:, None]) & mine[None, :], half, 0.0)
        biased = flipped(word, BITS)
        added = ()
        for at in tl.static_range(COUNT):
            value = (fraction(biased, at, BITS) - 1.5).to(tl.bfloat16)
            if WIDE:
                added = added + (tl.dot(spread.to(tl.float32), value.to(tl.float32), sums[at]),)
            else:
                added = added + (tl.dot(spread.to(tl.bfloat16), value, sums[at]),)
        sums = added
    pooled = ()
    for at in tl.static_range(COUNT):
        whole = tl.sum(tl.reshape(sums[at], [2, GROUP, COLUMNS]), axis=0) * (1 << BITS)
        pooled = pooled + (whole.to(out.dtype.element_ty),)
    e = tl.arange(0, GROUP)
    x = first_word * COUNT + tl.arange(0, COLUMNS * COUNT)
    at_block = out + (token * E + first_block + e)[:, None] * D + (core * (W * COUNT) + x)[None, :]
    written = (e < BLOCKS) & (first_block + e < E)
    tl.store(at_block, row_order(pooled, COUNT), mask=written[:, None] & (x < W * COUNT)[None, :])


def product_launch(
    k: int, d: int, c: int, num_blocks: int, *, bits: int, size: int, permutation_seed: int | None
) -> dict[str, Any]:
    """Constants and warps of the kernel, for K slots a token of a virtual table of `size` rows."""
    word = word_bits(d // c, bits)
    columns = tile_width(COLUMNS, d // c * bits // word)
    shared = tile_constants(k, d, c, num_blocks, group=GROUP, size=size, permutation_seed=permutation_seed)
    return {**shared, "BITS": bits, "WORD": word, "COLUMNS": columns}


def lookup_product_quantized(
    words_NW: Tensor,
    scales_N: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    num_blocks: int,
    permutation_seed: int | None,
    *,
    d: int,
    bits: int,
) -> Tensor:
    """Pooled rows [T,E,D] in the dtype of the scores, which is a 16-bit one."""
    n = int(words_NW.shape[0])
    t, k, c = scores_TKC.shape
    k, c = int(k), int(c)
    out_TED = scores_TKC.new_empty(t, num_blocks, d)
    launch = product_launch(k, d, c, num_blocks, bits=bits, size=n * num_blocks, permutation_seed=permutation_seed)
    chunks = cdiv(d // c * bits // launch["WORD"], launch["COLUMNS"])
    wrap_triton(lookup_product_quantized_kernel)[(t * c * chunks, cdiv(num_blocks, GROUP))](
        words_NW, scales_N, indices_TK, scores_TKC, out_TED, n, k, **launch
    )
    return out_TED
