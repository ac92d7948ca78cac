"""The forward kernels with their arguments as an engine passes them: inputs, then numbers, then outputs.

Each is the kernel of its op, whole; an engine that launches compiled code has no say in the order. Addresses come
permuted from `permute_addresses`, so that no lookup needs memory of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ultramem.ops.triton.lookup_product import lookup_product_kernel
from ultramem.ops.triton.lookup_product_quantized import lookup_product_quantized_kernel
from ultramem.ops.triton.lookup_reduce import lookup_reduce_kernel
from ultramem.ops.triton.lookup_reduce_quantized import lookup_reduce_quantized_kernel
from ultramem.ops.triton.permute_addresses import permute_addresses_kernel
from ultramem.ops.triton.select import topk_kernel


@triton.jit
def lookup_reduce_rows(
    values,
    indices,
    scores,
    N,
    K,
    out,
    D: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """`lookup_reduce_kernel` without a permutation or scales."""
    lookup_reduce_kernel(
        values, None, indices, scores, None, out, N, K, D, C, E, GROUP, SLOTS, COLUMNS, AT_ONCE, PIECE, None
    )


@triton.jit
def lookup_reduce_product(
    values,
    indices,
    scores,
    N,
    K,
    out,
    D: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`lookup_product_kernel` without a permutation."""
    lookup_product_kernel(
        values, indices, scores, out, N, K, D, C, E, GROUP, BLOCKS, SLOTS, PIECES, COLUMNS, None, False
    )


@triton.jit
def lookup_reduce_quantized_rows(
    words,
    scales,
    indices,
    scores,
    N,
    K,
    out,
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
):
    """`lookup_reduce_quantized_kernel` without a permutation."""
    lookup_reduce_quantized_kernel(
        words,
        scales,
        indices,
        scores,
        None,
        out,
        N,
        K,
        D,
        C,
        E,
        BITS,
        WORD,
        GROUP,
        SLOTS,
        COLUMNS,
        AT_ONCE,
        PIECE,
        None,
    )


@triton.jit
def lookup_reduce_quantized_product(
    words,
    scales,
    indices,
    scores,
    N,
    K,
    out,
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
):
    """`lookup_product_quantized_kernel` without a permutation."""
    lookup_product_quantized_kernel(
        words,
        scales,
        indices,
        scores,
        out,
        N,
        K,
        D,
        C,
        E,
        BITS,
        WORD,
        GROUP,
        BLOCKS,
        SLOTS,
        PIECES,
        COLUMNS,
        None,
        False,
    )


@triton.jit
def permute_addresses(addresses, count, out, PERMUTATION: tl.constexpr, BLOCK: tl.constexpr):
    """`permute_addresses_kernel`, forwards."""
    permute_addresses_kernel(addresses, out, count, PERMUTATION, False, BLOCK)


@triton.jit
def tucker_topk(
    row,
    col,
    cores,
    u,
    t,
    H,
    scores,
    addresses,
    found,
    chosen,
    N: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    TAILS: tl.constexpr,
    ADDITIVE: tl.constexpr,
    OVERLAP: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNROLL: tl.constexpr,
    SLOTS: tl.constexpr,
    RIVALS: tl.constexpr,
    FLOOR_BITS: tl.constexpr,
    SIDE_BITS: tl.constexpr,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ROW_SHIFT: tl.constexpr,
    COLUMN_SHIFT: tl.constexpr,
):
    """`topk_kernel`, whose scratch memory is two more outputs."""
    topk_kernel(
        row, col, u, t, cores, found, chosen, scores, addresses, H, N, R, C, K, S, TAILS, ADDITIVE, OVERLAP, GROUPS,
        VECTOR, CHUNKS, UNROLL, SLOTS, RIVALS, FLOOR_BITS, SIDE_BITS, DOWN, RIGHT, BLOCK_COLUMNS,
        ROW_SHIFT, COLUMN_SHIFT,
    )  # fmt: skip


@triton.jit
def product_topk(
    row,
    col,
    H,
    scores,
    addresses,
    found,
    chosen,
    N: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    TAILS: tl.constexpr,
    ADDITIVE: tl.constexpr,
    OVERLAP: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNROLL: tl.constexpr,
    SLOTS: tl.constexpr,
    RIVALS: tl.constexpr,
    FLOOR_BITS: tl.constexpr,
    SIDE_BITS: tl.constexpr,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ROW_SHIFT: tl.constexpr,
    COLUMN_SHIFT: tl.constexpr,
):
    """`topk_kernel` of sums of two scores, which reads neither cores nor singular vectors."""
    topk_kernel(
        row, col, row, row, row, found, chosen, scores, addresses, H, N, R, C, K, S, TAILS, ADDITIVE, OVERLAP, GROUPS,
        VECTOR, CHUNKS, UNROLL, SLOTS, RIVALS, FLOOR_BITS, SIDE_BITS, DOWN, RIGHT, BLOCK_COLUMNS,
        ROW_SHIFT, COLUMN_SHIFT,
    )  # fmt: skip
