"""Kernel of product_topk and tucker_topk: candidates of both sides, their rescoring and the final top-k in one launch.

Shapes: P = T*H pairs of token and head, R ranks, N the side of the grid, C cores, K kept slots, S rows (and columns) a
tail, L lists (a list is one tail of one side: 2 or 4), G groups.

All three selections (rows, columns, cells) are one procedure. Keys are split into G groups; the K-th largest of the
groups' maxima is a floor that K keys reach, and of keys in no particular order hardly more do (51 on average for
K = 42 of N = 3584, 44 for the cells). Those few go through scratch memory, where each counts the better ones: its rank.
So all keys are looked at twice, not 32 times as by a search for the threshold, which is left for what the shortlist
cannot hold: many equal keys, or all large keys in one place.

What decides where a kernel stores is loaded in its own body, not in a helper: else torch.compile takes the arguments of
that helper for outputs of the kernel and copies them before each launch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ultramem.ops.triton import select_two_launches as two_launches
from ultramem.ops.triton._launch import next_power_of_2, refuse_float64
from ultramem.ops.triton._order import ordered_key, packed_address, packed_key
from ultramem.ops.triton.select_two_launches import num_tails, tail_size

# One launch serves what fits: the comparison of all maxima is quadratic in K, and keys stay in registers.
MAX_K = 64
MAX_N = 8192
LOAD_BYTES = 16
MIN_GROUPS = 64
# Columns of a block of cells; a block has one cell of each group.
BLOCK_COLUMNS = {64: 8, 128: 16}
# Shifts between blocks. Good cells lie along the first rows and columns, K / i of them in the i-th best row, so equal
# places in neighbouring blocks would fall into one group. Of the shifts up to 7 these let the fewest cells through.
ROW_SHIFT, COLUMN_SHIFT = 3, 7
# The shortlist holds this many times the keys that are expected to reach the floor: 4 to 6 standard deviations more.
SHORTLIST_ROOM = 1.2
# Maxima span about 2^24 ordered integers, a few octaves of floats: 12 bits tell them apart to a thousandth.
FLOOR_BITS = 12


@triton.jit
def _count(keep):
    """[L]: how many of [A,L,G] are True."""
    return tl.sum(tl.sum(keep.to(tl.int32), 0), 1)


@triton.jit
def _threshold(key, m):
    """[L]: the m[L]-th largest uint32 key of each list of [A,L,G]."""
    found = tl.zeros_like(m).to(tl.uint32)
    one = tl.full([], 1, tl.uint32)
    for bit in range(32):
        candidate = found | (one << (31 - bit))
        found = tl.where(_count(key >= candidate[None, :, None]) >= m, candidate, found)
    return found


@triton.jit
def _without(key, address, threshold, M: tl.constexpr):
    """The keys of [A,L,G] with those that equal the threshold set to 0, but for the lowest addresses: M are left."""
    equal = key == threshold[None, :, None]
    priority = tl.where(equal, ~address, 0)
    last = _threshold(priority, M - _count(key > threshold[None, :, None]))
    return tl.where(equal & (priority < last[None, :, None]), 0, key)


@triton.jit
def _floor(key, M: tl.constexpr, BITS: tl.constexpr):
    """[L]: what at least M keys of each list of [A,L,G] reach, and of keys in no particular order few more.

    That is the M-th largest of the groups' maxima, rounded down to one of 2^BITS steps between the lowest and the
    highest of them. Two bits a round: three counts of at most 128 travel in one word.
    """
    best = tl.max(key, 0)
    lowest = tl.min(best, 1)
    above = best - lowest[:, None]
    length = (tl.max(above, 1).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    shift = tl.maximum(length - BITS, 0).to(tl.uint32)
    above = (above >> shift[:, None]).to(tl.int32)
    steps = tl.zeros_like(length)
    for bit in range(0, BITS, 2):
        unit = (1 << (BITS - 2)) >> bit
        reach = (above >= (steps + unit)[:, None]).to(tl.int32)
        reach += (above >= (steps + 2 * unit)[:, None]).to(tl.int32) << 8
        reach += (above >= (steps + 3 * unit)[:, None]).to(tl.int32) << 16
        count = tl.sum(reach, 1)
        enough = ((count & 255) >= M).to(tl.int32) + ((count >> 8 & 255) >= M).to(tl.int32) + (count >> 16 >= M)
        steps += unit * enough
    return lowest + (steps.to(tl.uint32) << shift)


@triton.jit
def _slots(keep):
    """Place of each kept key of [A,L,G] in its list, in no order that matters."""
    kept = keep.to(tl.int32)
    of_group = tl.sum(kept, 0)
    return (tl.cumsum(of_group, 1) - of_group)[None, :, :] + tl.cumsum(kept, 0) - kept


@triton.jit
def _rank(packed):
    """How many of a list of [L,SLOTS] are better, each."""
    return tl.sum((packed[:, :, None] > packed[:, None, :]).to(tl.int32), 1)


@triton.jit
def topk_kernel(
    row,
    col,
    u,
    t,
    cores,
    found,
    chosen,
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
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
    SLOTS: tl.constexpr,
    FLOOR_BITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ROW_SHIFT: tl.constexpr,
    COLUMN_SHIFT: tl.constexpr,
):
    """The K best cells of a pair, best first: S rows and columns of each tail, their cells rescored.

    Scratch of a pair: `found` [L+1,SLOTS] int64, the shortlists and, in their place, the chosen positions best first;
    `chosen` [L,R,S] float32, the scores there, those of rows times the summed core.
    Bytes: 2 R N * itemsize read once, K (8 + C * itemsize) written; scratch comes from L1 and L2.
    """
    LISTS: tl.constexpr = 2 * TAILS  # list = tail * 2 + side
    LOWEST: tl.constexpr = -9223372036854775808
    pair = tl.program_id(0).to(tl.int64)
    head = tl.program_id(0) % H
    row += pair * (R * N)
    col += pair * (R * N)
    u += head * R
    t += head * R
    cores += head * (C * R * R)
    found += pair * ((LISTS + 1) * SLOTS)
    chosen += pair * (LISTS * R * S)
    a = tl.arange(0, SLOTS)[None, :]
    area = tl.arange(0, LISTS)[:, None] * SLOTS
    tl.store(found + area + a, tl.full([LISTS, SLOTS], LOWEST, tl.int64))
    tl.store(found + LISTS * SLOTS + a, tl.full([1, SLOTS], LOWEST, tl.int64))

    # Both sides at once, [CHUNKS, 2, GROUPS, VECTOR] scores, VECTOR of them side by side in memory.
    side = tl.arange(0, 2)[None, :, None, None]
    chunk = tl.arange(0, CHUNKS)[:, None, None, None]
    group = tl.arange(0, GROUPS)[None, None, :, None]
    i = (chunk * GROUPS + group) * VECTOR + tl.arange(0, VECTOR)[None, None, None, :] + side * 0
    x = tl.zeros([CHUNKS, 2, GROUPS, VECTOR], tl.float32)
    for r in tl.static_range(R):
        at = tl.where(side == 0, row, col) + (r * N + i)
        if N % VECTOR == 0:
            at = tl.max_contiguous(tl.multiple_of(at, [1, 1, 1, 16]), [1, 1, 1, VECTOR])
        score = tl.load(at, mask=i < N, other=0.0).to(tl.float32)
        if not ADDITIVE:
            score *= tl.load(tl.where(side == 0, u, t) + r).to(tl.float32)
        x += score
    ordered = tl.where(i < N, ordered_key(x), 0)
    ordered = tl.reshape(tl.permute(ordered, (3, 0, 1, 2)), [VECTOR * CHUNKS, 2, GROUPS])
    # The same positions in that shape: a thread keeps its keys, and stores of theirs need no exchange between threads.
    side = tl.arange(0, 2)[None, :, None]
    group = tl.arange(0, GROUPS)[None, None, :]
    place = tl.arange(0, VECTOR * CHUNKS)[:, None, None]
    i = (place % CHUNKS * GROUPS + group) * VECTOR + place // CHUNKS + side * 0
    position = i.to(tl.uint32)
    tl.debug_barrier()  # the scratch is empty
    for tail in range(TAILS):
        key = ordered
        if TAILS == 2:  # the smallest are the largest of the complement, which is 0 for NaN
            key = tl.where(i < N, tl.maximum(ordered ^ tl.where(tail == 1, 0xFFFFFFFF, 0).to(tl.uint32), 1), 0)
        floor = _floor(key, S, FLOOR_BITS)
        if tl.max(_count(key >= floor[None, :, None])) > SLOTS:
            floor = _threshold(key, tl.full([2], S, tl.int32))
            key = _without(key, position, floor, S)
        keep = key >= floor[None, :, None]
        to = found + (tail * 2 + side) * SLOTS + _slots(keep)
        tl.store(to, packed_key(key, position), mask=keep)
    tl.debug_barrier()

    mine = tl.load(found + area + a)
    rank = _rank(mine)
    at_kept = packed_address(mine)
    real = mine != LOWEST
    is_row = (area // SLOTS) % 2 == 0
    tl.debug_barrier()  # all shortlists are read
    tl.store(found + area + rank, at_kept, mask=rank < S)
    for s in tl.static_range(R):
        value = tl.load(tl.where(is_row, row, col) + (s * N + at_kept), mask=real, other=0.0).to(tl.float32)
        if not ADDITIVE:
            left = tl.zeros([LISTS, SLOTS], tl.float32)
            for r in tl.static_range(R):
                weight = tl.load(cores + r * R + s).to(tl.float32)
                for c in tl.static_range(1, C):
                    weight += tl.load(cores + (c * R + r) * R + s).to(tl.float32)
                left += weight * tl.load(row + (r * N + at_kept), mask=real & is_row, other=0.0).to(tl.float32)
            value = tl.where(is_row, left, value)
        tl.store(chosen + ((area // SLOTS) * R + s) * S + rank, value, mask=rank < S)
    tl.debug_barrier()

    # Cells, [BLOCKS, 1, GROUPS]: a block has one cell of each group.
    BLOCK_ROWS: tl.constexpr = GROUPS // BLOCK_COLUMNS
    DOWN: tl.constexpr = (S + BLOCK_ROWS - 1) // BLOCK_ROWS
    RIGHT: tl.constexpr = (S + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    block = tl.arange(0, BLOCKS)[:, None, None]
    right = block % RIGHT
    down = block // RIGHT % DOWN
    tail_list = block // (RIGHT * DOWN) * 2
    i = down * BLOCK_ROWS + (group // BLOCK_COLUMNS + ROW_SHIFT * right) % BLOCK_ROWS
    j = right * BLOCK_COLUMNS + (group % BLOCK_COLUMNS + COLUMN_SHIFT * down) % BLOCK_COLUMNS
    valid = (i < S) & (j < S) & (tail_list < LISTS)
    score = tl.zeros([BLOCKS, 1, GROUPS], tl.float32)
    for s in tl.static_range(R):
        of_row = tl.load(chosen + (tail_list * R + s) * S + i, mask=valid, other=0.0)
        of_col = tl.load(chosen + ((tail_list + 1) * R + s) * S + j, mask=valid, other=0.0)
        score += of_row + of_col if ADDITIVE else of_row * of_col
    row_at = found + tail_list * SLOTS + i
    col_at = found + (tail_list + 1) * SLOTS + j
    if OVERLAP:  # a cell of both tails counts once
        row_position = tl.load(row_at, mask=valid, other=0)
        col_position = tl.load(col_at, mask=valid, other=0)
        row_twice = row_position < 0
        col_twice = col_position < 0
        for s in range(S):
            row_twice = row_twice | (row_position == tl.load(found + s))
            col_twice = col_twice | (col_position == tl.load(found + SLOTS + s))
        valid = valid & ((tail_list == 0) | ~(row_twice & col_twice))
    key = tl.where(valid, ordered_key(score), 0)
    floor = _floor(key, K, FLOOR_BITS)
    if tl.max(_count(key >= floor[None, :, None])) > SLOTS:
        address = tl.load(row_at, mask=valid, other=0) * N + tl.load(col_at, mask=valid, other=0)
        floor = _threshold(key, tl.full([1], K, tl.int32))
        key = _without(key, address.to(tl.uint32), floor, K)
    keep = key >= floor[None, :, None]
    address = tl.load(row_at, mask=keep, other=0) * N + tl.load(col_at, mask=keep, other=0)
    tl.store(found + LISTS * SLOTS + _slots(keep), packed_key(key, address.to(tl.uint32)), mask=keep)
    tl.debug_barrier()

    mine = tl.load(found + LISTS * SLOTS + a)
    rank = _rank(mine)
    kept = packed_address(mine)
    i_kept = tl.where(rank < K, kept // N, 0)
    j_kept = tl.where(rank < K, kept % N, 0)
    out = pair * K + rank
    tl.store(addresses + out, kept, mask=rank < K)
    for c in tl.static_range(C):
        if ADDITIVE:
            total = tl.load(row + i_kept).to(tl.float32) + tl.load(col + j_kept).to(tl.float32)
        else:
            total = tl.zeros([1, SLOTS], tl.float32)
            for r in tl.static_range(R):
                x = tl.load(row + r * N + i_kept).to(tl.float32)
                for s in tl.static_range(R):
                    y = tl.load(col + s * N + j_kept).to(tl.float32)
                    total += tl.load(cores + (c * R + r) * R + s).to(tl.float32) * x * y
        tl.store(scores + out * C + c, total.to(scores.dtype.element_ty), mask=rank < K)


def topk_launch(n: int, r: int, c: int, k: int, *, candidates: str, additive: bool, itemsize: int) -> dict[str, Any]:
    """Constants and warps of the kernel."""
    size, tails = tail_size(k, candidates), num_tails(candidates)
    groups, vector = max(MIN_GROUPS, next_power_of_2(2 * k)), LOAD_BYTES // itemsize
    chunks = next_power_of_2(triton.cdiv(n, groups * vector))
    # Of keys in random order, -G log(1 - K/G) reach the K-th largest of G maxima.
    expected = -groups * math.log1p(-k / groups)
    columns = BLOCK_COLUMNS[groups]
    return {
        "N": n,
        "R": r,
        "C": c,
        "K": k,
        "S": size,
        "TAILS": tails,
        "ADDITIVE": additive,
        "OVERLAP": tails == 2 and 2 * size > n,
        "CHUNKS": chunks,
        "GROUPS": groups,
        "VECTOR": vector,
        "SLOTS": next_power_of_2(math.ceil(SHORTLIST_ROOM * expected)),
        "FLOOR_BITS": FLOOR_BITS,
        "BLOCKS": next_power_of_2(tails * triton.cdiv(size, groups // columns) * triton.cdiv(size, columns)),
        "BLOCK_COLUMNS": columns,
        "ROW_SHIFT": ROW_SHIFT,
        "COLUMN_SHIFT": COLUMN_SHIFT,
        "num_warps": 2 * groups // 32,
    }


def product_topk(row_THN: Tensor, col_THN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    refuse_float64(row_scores_THN=row_THN)
    t, h, _ = row_THN.shape
    scores_THK = row_THN.new_empty(t, h, k)
    # The kernels' arguments for cores and singular vectors are unread where there are none.
    addresses_THK = _launch_forward(row_THN, col_THN, row_THN, row_THN, row_THN, scores_THK, (1, 1, k, "one_tailed"))
    return scores_THK, addresses_THK


def tucker_topk(
    row_THRN: Tensor, col_THRN: Tensor, cores_HCRR: Tensor, u_HR: Tensor, t_HR: Tensor, k: int, candidates: str
) -> tuple[Tensor, Tensor]:
    refuse_float64(row_scores_THRN=row_THRN, cores_HCRR=cores_HCRR, u_HR=u_HR, t_HR=t_HR)
    t, h, r, _ = row_THRN.shape
    c = cores_HCRR.shape[1]
    scores_THKC = row_THRN.new_empty(t, h, k, c)
    sizes = (int(r), int(c), k, candidates)
    addresses_THK = _launch_forward(row_THRN, col_THRN, cores_HCRR, u_HR, t_HR, scores_THKC, sizes)
    return scores_THKC, addresses_THK


def _launch_forward(
    row: Tensor,
    col: Tensor,
    cores: Tensor,
    u: Tensor,
    t: Tensor,
    scores: Tensor,
    sizes: tuple[int, int, int, str],
) -> Tensor:
    """Write `scores` [T,H,K(,C)]; return addresses [T,H,K]."""
    r, c, k, candidates = sizes
    additive = scores.ndim == 3
    tokens, heads, n = row.shape[0], int(row.shape[1]), int(row.shape[-1])
    addresses = row.new_empty(tokens, heads, k, dtype=torch.int64)
    pairs = tokens * heads
    if not fits_one_launch(n, k):
        two_launches.launch(row, col, cores, u, t, scores, addresses, candidates)
        return addresses
    launch = topk_launch(n, r, c, k, candidates=candidates, additive=additive, itemsize=row.element_size())
    if pairs == 0:
        return addresses
    lists = 2 * launch["TAILS"]
    found = row.new_empty(pairs, lists + 1, launch["SLOTS"], dtype=torch.int64)
    chosen = row.new_empty(pairs, lists, r, launch["S"], dtype=torch.float32)
    wrap_triton(topk_kernel)[(pairs,)](row, col, u, t, cores, found, chosen, scores, addresses, heads, **launch)
    return addresses


def fits_one_launch(n: int, k: int) -> bool:
    return k <= MAX_K and n <= MAX_N
