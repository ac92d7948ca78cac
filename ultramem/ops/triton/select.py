"""Kernel of product_topk and tucker_topk: candidates of both sides, their rescoring and the final top-k in one launch.

Shapes: P = T*H pairs of token and head, R ranks, N the side of the grid, C cores, K kept slots, S rows (and columns) a
tail, L lists to select from, G groups of a list.

Rows, columns and cells are selected alike, in the rounds of `_select_rounds.py`.

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
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.library import wrap_triton

from ultramem.ops.triton import select_two_launches as two_launches
from ultramem.ops.triton._launch import cdiv, next_power_of_2, refuse_float64
from ultramem.ops.triton._order import ordered_key, packed_address, packed_key
from ultramem.ops.triton._select_rounds import ROUNDS, candidate_of, lowest_mark, next_round, num_marks, reaches
from ultramem.ops.triton.select_two_launches import num_tails, tail_size

# One launch serves what fits: a group is one thread's, and a bit of 64 marks each of its keys.
MAX_K = 64
MAX_N = 8192
WIDE_N = 4096
LOAD_BYTES = 16
MIN_GROUPS = 64
# Cells are dealt out in blocks that have one cell for each group: rows (of blocks) below.
BLOCK_COLUMNS = {64: 8, 128: 16}
# Shifts between blocks. Good cells lie along the first rows and columns, K / i of them in the i-th best row, so equal
# places in neighbouring blocks would fall into one group. Of the shifts up to 7 these let the fewest cells through.
ROW_SHIFT, COLUMN_SHIFT = 3, 7
# The shortlist holds this many times the keys that are expected to reach the floor: 3 to 6 standard deviations more.
SHORTLIST_ROOM = 1.2
MIN_SLOTS = 32
# Maxima span about 2^24 ordered integers, a few octaves of floats: 12 bits tell them apart to a thousandth.
FLOOR_BITS = 12
# Up to which a program has twice the warps: by then, on an H100, every processor has a program of its own.
FEW_TOKENS = 128


@triton.jit
def _cell(
    down,
    right,
    half,
    group,
    S: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ROW_SHIFT: tl.constexpr,
    COLUMN_SHIFT: tl.constexpr,
):
    """Tail, row and column, both by rank, of a group's cell; some are past the S rows or columns.

    `down` counts pairs of blocks, one below the other, and goes on into the next tail; `right` counts blocks.
    """
    BLOCK_ROWS: tl.constexpr = GROUPS // BLOCK_COLUMNS
    PAIRS: tl.constexpr = (S + 2 * BLOCK_ROWS - 1) // (2 * BLOCK_ROWS)
    block = down % PAIRS * 2 + half
    i = block * BLOCK_ROWS + (group // BLOCK_COLUMNS + ROW_SHIFT * right) % BLOCK_ROWS
    j = right * BLOCK_COLUMNS + (group % BLOCK_COLUMNS + COLUMN_SHIFT * block) % BLOCK_COLUMNS
    return down // PAIRS, i, j


@triton.jit
def _cell_score(row_at, col_at, mask, S: tl.constexpr, R: tl.constexpr, ADDITIVE: tl.constexpr):
    """Scores of cells by the summed core, from what was kept of their rows and columns."""
    score = tl.load(row_at, mask=mask, other=0.0)
    if ADDITIVE:
        score += tl.load(col_at, mask=mask, other=0.0)
    else:
        score *= tl.load(col_at, mask=mask, other=0.0)
        for r in tl.static_range(1, R):
            of_row = tl.load(row_at + r * S, mask=mask, other=0.0)
            score = tl.fma(of_row, tl.load(col_at + r * S, mask=mask, other=0.0), score)
    return score


@triton.jit
def _position(at, mask, S: tl.constexpr, R: tl.constexpr):
    """Positions of kept rows or columns, which lie behind their scores."""
    return tl.load(at + R * S, mask=mask, other=0.0).to(tl.int32, bitcast=True)


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
    """The K best cells of a pair, best first: S rows and columns of each tail, their cells rescored.

    Scratch of a pair: `found` [L+1,SLOTS] int64, the shortlists; `chosen` [L,R+1,S] float32, of the chosen rows and
    columns, best first, the scores (those of rows times the summed core) and, as bits, the positions. Here L is
    2 * TAILS, and list = tail * 2 + side.
    Bytes: 2 R N * itemsize read once, K (8 + C * itemsize) written; scratch comes from L1 and L2.
    """
    LISTS: tl.constexpr = 2 * TAILS
    pair = tl.program_id(0).to(tl.int64)
    head = tl.program_id(0) % H
    row += pair * (R * N)
    col += pair * (R * N)
    u += head * R
    t += head * R
    cores += head * (C * R * R)
    found += pair * ((LISTS + 1) * SLOTS)
    chosen += pair * (LISTS * (R + 1) * S)
    everywhere = tl.arange(0, 2 * LISTS * SLOTS)
    tl.store(found + everywhere, tl.zeros_like(everywhere).to(tl.int64), mask=everywhere < (LISTS + 1) * SLOTS)
    tl.debug_barrier()  # the shortlists are empty

    # Both sides at once, [2, GROUPS, VECTOR] scores a chunk, VECTOR of them side by side in memory.
    side = tl.arange(0, 2)[:, None]
    group = tl.arange(0, GROUPS)[None, :]
    scores_at = tl.where(side == 0, row, col)
    weights_at = tl.where(side == 0, u, t)
    lane = tl.arange(0, VECTOR)[None, None, :]
    MARKS: tl.constexpr = tl.uint32 if CHUNKS * VECTOR <= 32 else tl.uint64
    for tail in range(TAILS):
        flip = tl.where(tail == 1, 0xFFFFFFFF, 0).to(tl.uint32)  # the smallest are the largest of the complement
        limit = tl.zeros([2], tl.uint64)
        bit = tl.zeros([2], tl.int32)
        settled = tl.zeros([2], tl.int32)
        marks = tl.zeros([2, GROUPS], MARKS)
        round = 0
        while round < ROUNDS:
            candidate = candidate_of(limit, bit, settled, round)
            best = tl.zeros([2, GROUPS], tl.uint32)
            marks = tl.zeros([2, GROUPS], MARKS)
            for first in range(0, CHUNKS, UNROLL):
                for more in tl.static_range(UNROLL):
                    chunk = first + more
                    place = chunk * (GROUPS * VECTOR) + lane
                    i = (group * VECTOR)[:, :, None] + place + side[:, :, None] * 0
                    x = tl.zeros([2, GROUPS, VECTOR], tl.float32)
                    for r in tl.static_range(R):
                        at = scores_at[:, :, None] + (r * N + i)
                        if N % VECTOR == 0:
                            at = tl.max_contiguous(tl.multiple_of(at, [1, 1, 16]), [1, 1, VECTOR])
                        score = tl.load(at, mask=i < N, other=0.0).to(tl.float32)
                        if ADDITIVE:
                            x += score
                        else:
                            x = tl.fma(score, tl.load(weights_at + r)[:, :, None].to(tl.float32), x)
                    # NaN has the largest key, of which the complement is 0, as no key may be.
                    key = tl.where(i < N, tl.maximum(ordered_key(x) ^ flip, 1), 0)
                    best = tl.maximum(best, tl.max(key, 2))
                    reached = reaches(key, candidate[:, None, None], place, (group * VECTOR)[:, :, None])
                    mark_bit = tl.full([], 1, MARKS) << (chunk * VECTOR + lane).to(MARKS)
                    marks += tl.sum(tl.where(reached, mark_bit, 0), 2)
            round, limit, bit, settled = next_round(
                round, limit, bit, settled, candidate, best, marks, S, SLOTS, FLOOR_BITS, SIDE_BITS
            )
        count = num_marks(marks)
        to = found + (tail * 2 + side) * SLOTS + tl.cumsum(count, 1) - count
        for e in range(tl.max(count)):
            mark, marks = lowest_mark(marks)
            listed = ((mark // VECTOR) * GROUPS + group) * VECTOR + mark % VECTOR
            some = e < count
            y = tl.zeros([2, GROUPS], tl.float32)
            for r in tl.static_range(R):
                listed_score = tl.load(scores_at + (r * N + listed), mask=some, other=0.0).to(tl.float32)
                if ADDITIVE:
                    y += listed_score
                else:
                    y = tl.fma(listed_score, tl.load(weights_at + r).to(tl.float32), y)
            tl.store(to + e, packed_key(ordered_key(y) ^ flip, listed.to(tl.uint32)), mask=some)
    tl.debug_barrier()  # slots were written by other threads

    # The rank of a key is how many of its list are better.
    a = tl.arange(0, SLOTS)[None, :]
    area = tl.arange(0, LISTS)[:, None] * SLOTS
    mine = tl.load(found + area + a).to(tl.uint64)
    better = tl.zeros([LISTS, RIVALS, SLOTS], tl.int32)
    for first in range(0, SLOTS, RIVALS):
        rival = tl.load(found + area + first + tl.arange(0, RIVALS)[None, :]).to(tl.uint64)
        better += (rival[:, :, None] > mine[:, None, :]).to(tl.int32)
    rank = tl.sum(better, 1)
    at_kept = packed_address(mine)
    is_row = (area // SLOTS) % 2 == 0
    chosen_at = chosen + (area // SLOTS) * ((R + 1) * S) + rank
    tl.store(chosen_at + R * S, at_kept.to(tl.int32).to(tl.float32, bitcast=True), mask=rank < S)
    for s in tl.static_range(R):
        value = tl.load(tl.where(is_row, row, col) + (s * N + at_kept), mask=rank < S, other=0.0).to(tl.float32)
        if not ADDITIVE:
            left = tl.zeros([LISTS, SLOTS], tl.float32)
            for r in tl.static_range(R):
                weight = tl.load(cores + r * R + s).to(tl.float32)
                for c in tl.static_range(1, C):
                    weight += tl.load(cores + (c * R + r) * R + s).to(tl.float32)
                left += weight * tl.load(row + (r * N + at_kept), mask=(rank < S) & is_row, other=0.0).to(tl.float32)
            value = tl.where(is_row, left, value)
        tl.store(chosen_at + s * S, value, mask=rank < S)
    tl.debug_barrier()

    # Cells, those of two blocks a turn: [1, 2 * GROUPS].
    CELL_MARKS: tl.constexpr = tl.uint32 if DOWN * RIGHT <= 32 else tl.uint64
    half = tl.arange(0, 2 * GROUPS)[None, :] // GROUPS
    group = tl.arange(0, 2 * GROUPS)[None, :] % GROUPS
    limit = tl.zeros([1], tl.uint64)
    bit = tl.zeros([1], tl.int32)
    settled = tl.zeros([1], tl.int32)
    marks = tl.zeros([1, 2 * GROUPS], CELL_MARKS)
    round = 0
    while round < ROUNDS:
        candidate = candidate_of(limit, bit, settled, round)
        best = tl.zeros([1, 2 * GROUPS], tl.uint32)
        marks = tl.zeros([1, 2 * GROUPS], CELL_MARKS)
        for down in range(DOWN):
            for right in tl.static_range(RIGHT):
                of_tail, i_rank, j_rank = _cell(
                    down, right, half, group, S, GROUPS, BLOCK_COLUMNS, ROW_SHIFT, COLUMN_SHIFT
                )
                valid = (i_rank < S) & (j_rank < S)
                row_at = chosen + of_tail * (2 * (R + 1) * S) + i_rank
                col_at = chosen + (of_tail * 2 + 1) * ((R + 1) * S) + j_rank
                if OVERLAP:  # a cell of both tails counts once
                    row_twice = i_rank < 0
                    col_twice = j_rank < 0
                    for high in range(S):
                        high_row = tl.load(chosen + R * S + high).to(tl.int32, bitcast=True)
                        high_col = tl.load(chosen + (2 * R + 1) * S + high).to(tl.int32, bitcast=True)
                        row_twice = row_twice | (_position(row_at, valid, S, R) == high_row)
                        col_twice = col_twice | (_position(col_at, valid, S, R) == high_col)
                    valid = valid & ((of_tail == 0) | ~(row_twice & col_twice))
                cell_score = _cell_score(row_at, col_at, valid, S, R, ADDITIVE)
                cell_key = tl.where(valid, ordered_key(cell_score), 0)
                best = tl.maximum(best, cell_key)
                tied = valid & (i_rank * 0 + round >= 2)  # addresses matter
                place = _position(row_at, tied, S, R) * N + _position(col_at, tied, S, R)
                reached = packed_key(cell_key, place.to(tl.uint32)) >= candidate[:, None]
                marks += tl.where(reached, tl.full([], 1, CELL_MARKS) << (down * RIGHT + right), 0)
        round, limit, bit, settled = next_round(
            round, limit, bit, settled, candidate, best, marks, K, SLOTS, FLOOR_BITS, 2 * SIDE_BITS
        )
    count = num_marks(marks)
    to = found + LISTS * SLOTS + tl.cumsum(count, 1) - count
    for e in range(tl.max(count)):
        mark, marks = lowest_mark(marks)
        down, right = mark // RIGHT, mark % RIGHT
        of_tail, i_rank, j_rank = _cell(down, right, half, group, S, GROUPS, BLOCK_COLUMNS, ROW_SHIFT, COLUMN_SHIFT)
        some = e < count
        row_at = chosen + of_tail * (2 * (R + 1) * S) + i_rank
        col_at = chosen + (of_tail * 2 + 1) * ((R + 1) * S) + j_rank
        cell_score = _cell_score(row_at, col_at, some, S, R, ADDITIVE)
        place = _position(row_at, some, S, R) * N + _position(col_at, some, S, R)
        tl.store(to + e, packed_key(ordered_key(cell_score), place.to(tl.uint32)), mask=some)
    tl.debug_barrier()

    mine = tl.load(found + LISTS * SLOTS + a).to(tl.uint64)
    better = tl.zeros([1, RIVALS, SLOTS], tl.int32)
    for first in range(0, SLOTS, RIVALS):
        rival = tl.load(found + LISTS * SLOTS + first + tl.arange(0, RIVALS)[None, :]).to(tl.uint64)
        better += (rival[:, :, None] > mine[:, None, :]).to(tl.int32)
    rank = tl.sum(better, 1)
    kept = packed_address(mine)
    out = pair * K + rank
    tl.store(addresses + out, kept, mask=rank < K)
    for c in tl.static_range(C):
        total = tl.zeros([1, SLOTS], tl.float32)
        for r in tl.static_range(R):
            x_kept = tl.load(row + r * N + kept // N, mask=rank < K, other=0.0).to(tl.float32)
            for s in tl.static_range(R):
                y_kept = tl.load(col + s * N + kept % N, mask=rank < K, other=0.0).to(tl.float32)
                if ADDITIVE:
                    total += x_kept + y_kept
                else:
                    total += tl.load(cores + (c * R + r) * R + s).to(tl.float32) * x_kept * y_kept
        tl.store(scores + out * C + c, total.to(scores.dtype.element_ty), mask=rank < K)


def in_flight(n: int, *, tails: int, additive: bool, few: bool) -> tuple[int, int]:
    """Loads of a round that are in flight together, each of R * 16 bytes a lane, and comparisons of a thread at once.

    As many as registers hold on every architecture of the static table, by what ptxas made of the candidates.
    """
    if n > WIDE_N:
        return {1: (2, 8), 2: (4, 8)}[tails] if few else {1: (8, 8), 2: (3, 8)}[tails]
    return (2, 8) if additive and few else (8, 8)


def num_groups(k: int) -> int:
    return max(MIN_GROUPS, next_power_of_2(2 * k))


def scratch_sizes(k: int, candidates: str) -> tuple[int, int, int]:
    """TAILS, S and SLOTS, which the scratch memory of a pair is made of."""
    groups = num_groups(k)
    # Of keys in random order, -G log(1 - K/G) reach the K-th largest of G maxima.
    expected = -groups * math.log1p(-k / groups)
    slots = max(MIN_SLOTS, next_power_of_2(math.ceil(SHORTLIST_ROOM * expected)))
    return num_tails(candidates), tail_size(k, candidates), slots


def topk_launch(
    tokens: Any, n: int, r: int, c: int, k: int, *, candidates: str, additive: bool, itemsize: int
) -> dict[str, Any]:
    """Constants and warps of the kernel; a number of tokens that a compiler leaves open counts as many."""
    groups, vector = num_groups(k), LOAD_BYTES // itemsize
    tails, size, slots = scratch_sizes(k, candidates)
    chunks = cdiv(n, groups * vector)
    columns = BLOCK_COLUMNS[groups]
    # A thread for each group of both sides where programs leave processors idle, half as many where they do not.
    few = statically_known_true(tokens <= FEW_TOKENS)
    warps = 2 * groups // (32 if few else 64)
    loads, comparisons = in_flight(n, tails=tails, additive=additive, few=few)
    return {
        "N": n,
        "R": r,
        "C": c,
        "K": k,
        "S": size,
        "TAILS": tails,
        "ADDITIVE": additive,
        "OVERLAP": tails == 2 and 2 * size > n,
        "GROUPS": groups,
        "VECTOR": vector,
        "CHUNKS": chunks,
        "UNROLL": cdiv(chunks, cdiv(chunks, loads)),
        "SLOTS": slots,
        "RIVALS": min(slots, comparisons * 32 * warps // (2 * tails * slots)),
        "FLOOR_BITS": FLOOR_BITS,
        "SIDE_BITS": max(1, (n - 1).bit_length()),
        "DOWN": tails * cdiv(size, 2 * groups // columns),
        "RIGHT": cdiv(size, columns),
        "BLOCK_COLUMNS": columns,
        "ROW_SHIFT": ROW_SHIFT,
        "COLUMN_SHIFT": COLUMN_SHIFT,
        "num_warps": warps,
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
    launch = topk_launch(tokens, n, r, c, k, candidates=candidates, additive=additive, itemsize=row.element_size())
    if pairs == 0:
        return addresses
    lists = 2 * launch["TAILS"]
    found = row.new_empty(pairs, lists + 1, launch["SLOTS"], dtype=torch.int64)
    chosen = row.new_empty(pairs, lists, r + 1, launch["S"], dtype=torch.float32)
    wrap_triton(topk_kernel)[(pairs,)](row, col, u, t, cores, found, chosen, scores, addresses, heads, **launch)
    return addresses


def fits_one_launch(n: int, k: int) -> bool:
    return k <= MAX_K and n <= MAX_N
