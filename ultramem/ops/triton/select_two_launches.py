"""Kernels of product_topk and tucker_topk in two launches, for the sizes that `select` does not serve in one.

Shapes: T tokens, H heads, P = T*H pairs, R ranks, N the side of the grid, C cores, K kept slots, S rows (and columns)
a tail, 1 tail a side or, for two-tailed candidates, 2.

Selection finds the k-th largest key by bit search (32 counts) instead of sorting: a few instructions a key, and keys
stay where they were loaded. Kept slots come out best first, equal scores by the lower address, as in the aten path.

What decides where a kernel stores is loaded in its own body, not in a helper: else torch.compile takes the arguments of
that helper for outputs of the kernel and copies them before each launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ultramem.ops.triton._launch import next_power_of_2
from ultramem.ops.triton._order import ordered_key, packed_address, packed_key
from ultramem.ops.tucker_topk import tail_length

# Keys a thread holds in the side kernel: 16 registers beside about 40 of the search; more warps than that only wait at
# the barriers of the 32 counts. N = 2200..3584 pads to 4096 keys, so 8 warps.
SIDE_KEYS_PER_THREAD = 16
SIDE_MAX_WARPS = 16
# Cells a thread holds in the grid kernel. A cell costs a key, an address and its offsets: 8 cells take about 60
# registers for k = 42 (1764 cells, padded to 2048).
CELLS_PER_THREAD = 8
GRID_MAX_WARPS = 16
# The largest tensor of Triton has 2^20 elements, and selection holds the k * k candidates in one.
MAX_K = 1024


@triton.jit
def _threshold(key, m):
    """The m-th largest key: the largest value that at least m keys reach."""
    threshold = tl.zeros([], tl.uint32)
    one = tl.full([], 1, tl.uint32)
    for bit in range(32):
        candidate = threshold | (one << (31 - bit))
        threshold = tl.where(tl.sum((key >= candidate).to(tl.int32)) >= m, candidate, threshold)
    return threshold


@triton.jit
def _keep(key, address, m):
    """True for the m largest keys; of equal keys, for the lower uint32 addresses."""
    threshold = _threshold(key, m)
    above = key > threshold
    equal = key == threshold
    spare = m - tl.sum(above.to(tl.int32))
    if tl.sum(equal.to(tl.int32)) > spare:
        priority = ~address
        equal = equal & (priority >= _threshold(tl.where(equal, priority, 0), spare))
    return above | equal


@triton.jit
def side_topk_kernel(
    row,
    col,
    u,
    t,
    positions,
    H,
    N: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    TAILS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """positions[p, side, tail] = the S largest (tail 1: smallest) of a side's scores, as ascending positions.

    A program serves one tail of one side of one pair: sides and tails run beside each other, not in turn.
    Bytes: R * N * itemsize read, 4 S written. Registers: 54 to 64, 16 of them keys.
    """
    pair = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    head = tl.program_id(0) % H
    i = tl.arange(0, WIDTH)
    x = tl.zeros([WIDTH], tl.float32)
    for r in tl.static_range(R):
        at = (pair * R + r) * N + i
        if part < TAILS:
            score = tl.load(row + at, mask=i < N, other=0.0).to(tl.float32)
        else:
            score = tl.load(col + at, mask=i < N, other=0.0).to(tl.float32)
        if WEIGHTED:
            if part < TAILS:
                score *= tl.load(u + head * R + r).to(tl.float32)
            else:
                score *= tl.load(t + head * R + r).to(tl.float32)
        x += score
    if part % TAILS == 1:
        x = -x
    key = tl.where(i < N, ordered_key(x), 0)
    keep = _keep(key, i.to(tl.uint32), S) & (i < N)
    slot = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(positions + (pair * (2 * TAILS) + part) * S + slot, i, mask=keep)


@triton.jit
def grid_topk_kernel(
    row,
    col,
    cores,
    positions,
    found,
    scores,
    addresses,
    H,
    N: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    TAILS: tl.constexpr,
    ADDITIVE: tl.constexpr,
    OVERLAP: tl.constexpr,
    CELLS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """The K best of a pair's TAILS * S * S candidate cells: kept by bit search, compacted through `found`, ranked.

    `found` [P,K] int64 holds (key, complement of the address), so that one comparison orders score and address.
    Bytes: the candidates' scores (2 R S TAILS elements, from L2), 8 K of found each way, K (8 + C * itemsize) written.
    Registers: 36 to 60 at the paper's k = 16, 35, 42; 117 at 64, 250 at 100; a k of 128 spills: right, but slow.
    """
    pair = tl.program_id(0).to(tl.int64)
    row += pair * (R * N)
    col += pair * (R * N)
    cores += (tl.program_id(0) % H) * (C * R * R)
    positions += pair * (2 * TAILS * S)
    found += pair * K
    f = tl.arange(0, CELLS)
    valid = f < TAILS * S * S
    tail = f // (S * S)
    cell = f % (S * S)
    i = tl.load(positions + tail * S + cell // S, mask=valid, other=0)
    j = tl.load(positions + (TAILS + tail) * S + cell % S, mask=valid, other=0)
    if OVERLAP:  # a cell of both tails counts once
        row_twice = f < 0
        col_twice = f < 0
        for s in range(S):
            row_twice = row_twice | (i == tl.load(positions + s))
            col_twice = col_twice | (j == tl.load(positions + TAILS * S + s))
        valid = valid & ((tail == 0) | ~(row_twice & col_twice))
    if ADDITIVE:
        score = tl.load(row + i, mask=valid, other=0.0).to(tl.float32)
        score += tl.load(col + j, mask=valid, other=0.0).to(tl.float32)
    else:
        score = tl.zeros([CELLS], tl.float32)
        for r in tl.static_range(R):
            x = tl.load(row + r * N + i, mask=valid, other=0.0).to(tl.float32)
            for s in tl.static_range(R):
                weight = tl.load(cores + r * R + s).to(tl.float32)
                for c in tl.static_range(1, C):
                    weight += tl.load(cores + (c * R + r) * R + s).to(tl.float32)
                score += weight * x * tl.load(col + s * N + j, mask=valid, other=0.0).to(tl.float32)
    key = tl.where(valid, ordered_key(score), 0)
    address = (i.to(tl.int64) * N + j).to(tl.uint32)
    keep = _keep(key, address, K) & valid
    slot = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(found + slot, packed_key(key, address), mask=keep)
    tl.debug_barrier()  # slots were written by other threads

    a = tl.arange(0, SLOTS)
    mine = tl.load(found + a, mask=a < K, other=0).to(tl.uint64)
    better = mine[None, :] > mine[:, None]
    rank = tl.sum(better.to(tl.int32), axis=1)
    kept = packed_address(mine)
    i_kept = kept // N
    j_kept = kept % N
    out = pair * K + rank
    tl.store(addresses + out, kept, mask=a < K)
    for c in tl.static_range(C):
        if ADDITIVE:
            kept_score = tl.load(row + i_kept, mask=a < K, other=0.0).to(tl.float32)
            kept_score += tl.load(col + j_kept, mask=a < K, other=0.0).to(tl.float32)
        else:
            kept_score = tl.zeros([SLOTS], tl.float32)
            for r in tl.static_range(R):
                x = tl.load(row + r * N + i_kept, mask=a < K, other=0.0).to(tl.float32)
                for s in tl.static_range(R):
                    y = tl.load(col + s * N + j_kept, mask=a < K, other=0.0).to(tl.float32)
                    kept_score += tl.load(cores + (c * R + r) * R + s).to(tl.float32) * x * y
        tl.store(scores + out * C + c, kept_score.to(scores.dtype.element_ty), mask=a < K)


def side_launch(n: int, r: int, k: int, *, candidates: str, weighted: bool) -> dict[str, Any]:
    """Constants and warps of the side kernel."""
    width = next_power_of_2(n)
    constants = {"N": n, "R": r, "S": tail_size(k, candidates), "TAILS": num_tails(candidates), "WEIGHTED": weighted}
    warps = min(SIDE_MAX_WARPS, max(1, width // (32 * SIDE_KEYS_PER_THREAD)))
    return {**constants, "WIDTH": width, "num_warps": warps}


def grid_launch(n: int, r: int, c: int, k: int, *, candidates: str, additive: bool) -> dict[str, Any]:
    """Constants and warps of the grid kernel."""
    size, tails = tail_size(k, candidates), num_tails(candidates)
    cells = next_power_of_2(tails * size * size)
    constants = {"N": n, "R": r, "C": c, "K": k, "S": size, "TAILS": tails, "ADDITIVE": additive}
    warps = min(GRID_MAX_WARPS, max(1, cells // (32 * CELLS_PER_THREAD)))
    overlap = tails == 2 and 2 * size > n
    return {**constants, "OVERLAP": overlap, "CELLS": cells, "SLOTS": next_power_of_2(k), "num_warps": warps}


def num_tails(candidates: str) -> int:
    return 2 if candidates == "two_tailed" else 1


def tail_size(k: int, candidates: str) -> int:
    if k > MAX_K:
        raise ValueError(
            f"k must be at most {MAX_K} for the Triton kernels, got {k}; "
            "use ultramem.ops.use_implementation(Implementation.ATEN)"
        )
    return tail_length(k) if candidates == "two_tailed" else k


def launch(
    row: Tensor,
    col: Tensor,
    cores: Tensor,
    u: Tensor,
    t: Tensor,
    scores: Tensor,
    addresses: Tensor,
    candidates: str,
) -> None:
    """Write `scores` [T,H,K(,C)] and `addresses` [T,H,K]; no C: the scores of a cell are added, not multiplied."""
    additive = scores.ndim == 3
    heads, n, k = int(row.shape[1]), int(row.shape[-1]), int(addresses.shape[-1])
    r, c = (1, 1) if additive else (int(row.shape[2]), int(scores.shape[-1]))
    side = side_launch(n, r, k, candidates=candidates, weighted=not additive)
    grid = grid_launch(n, r, c, k, candidates=candidates, additive=additive)
    pairs = row.shape[0] * heads
    if pairs == 0:
        return
    positions = row.new_empty(pairs, 2 * side["TAILS"], side["S"], dtype=torch.int32)
    found = row.new_empty(pairs, k, dtype=torch.int64)
    wrap_triton(side_topk_kernel)[(pairs, 2 * side["TAILS"])](row, col, u, t, positions, heads, **side)
    wrap_triton(grid_topk_kernel)[(pairs,)](row, col, cores, positions, found, scores, addresses, heads, **grid)
