"""Memory that an exchange takes on a rank, by arithmetic: what it keeps for the backward, and what passes through.

Symbols: P ranks that share a copy of a table, T tokens of the rank, K slots, C cores, E blocks, N rows of w columns (input rows of experts among
them), Dv of them values; U distinct rows of a lookup, b bytes of a table's number, e of one on the wire; c cores that a
rank's columns belong to, M slots of a token that one rank owns at most, u rows of a rank that all tokens read.

| placement | kept by every memory layer | passing, once |
| --- | --- | --- |
| rows at home | U rows `w b`, the requests of as many `8 + b`, where the T K slots find them `8` | U rows sent and as many received, `w e` |
| rows at the owner | P T M slots `17 + 2 b C`, u rows `w b` | P T E Dv pooled `b`, sent `e`; T E Dv received `e` |
| columns | P T K slots `8 + b c` | T E Dv pooled `b`, sent and received `e` |

Less the T K C scores of 4 bytes that a lookup at home would keep, where tokens are pooled elsewhere. Rows are taken to be
spread evenly over ranks and, as far as they are counted, chosen by chance.
"""  # noqa: E501  # a table row is one line

from __future__ import annotations

import math

from ultramem.config import MemoryConfig
from ultramem.runtime.figures.expected import expected_distinct
from ultramem.runtime.plan.exchange import Placement, Pooling
from ultramem.runtime.plan.options import TABLE_BYTES, PlanOptions


def kept_bytes(memory: MemoryConfig, options: PlanOptions, placement: Placement, pooling: Pooling | None) -> int:
    """That one memory layer keeps from its exchange until its backward."""
    if placement == "replicate" or options.table_ranks == 1:
        return 0
    size, cores, ranks = TABLE_BYTES[options.table_dtype], memory.num_cores, options.table_ranks
    reads, width = options.tokens_per_rank * memory.num_slots, memory.value_dim + memory.expert_dim
    if placement == "columns":
        return ranks * reads * (8 + size * cores_of_columns(memory, ranks)) - 4 * cores * reads
    if pooling == "owner":
        tokens = ranks * options.tokens_per_rank
        slots = tokens * most_own_slots(memory.num_slots, ranks, tokens)
        rows = round(expected_distinct(ranks * reads, memory.table_rows) / ranks)
        return slots * (17 + 2 * size * cores) + rows * width * size - 4 * cores * reads
    rows = distinct_rows(memory, options) or reads
    return rows * (width * size + 8 + size) + 8 * reads


def passing_bytes(memory: MemoryConfig, options: PlanOptions, placement: Placement, pooling: Pooling | None) -> int:
    """That one exchange takes for as long as it lasts."""
    if placement == "replicate" or options.table_ranks == 1:
        return 0
    size, wire = TABLE_BYTES[options.table_dtype], options.element_bytes
    pooled = options.tokens_per_rank * memory.expansion * memory.value_dim
    if placement == "columns":
        return pooled * (size + 2 * wire)
    if pooling == "owner":
        return pooled * (options.table_ranks * (size + wire) + wire)
    rows = distinct_rows(memory, options) or options.tokens_per_rank * memory.num_slots
    return 2 * rows * (memory.value_dim + memory.expert_dim) * wire


def distinct_rows(memory: MemoryConfig, options: PlanOptions) -> int | None:
    """Rows that a rank's lookup asks for if each is asked for once; None if repeated ones are asked for again.

    Raises:
        ValueError: there are more than are read, or than there are.
    """
    reads = options.tokens_per_rank * memory.num_slots
    most = min(reads, memory.table_rows)
    if options.distinct_rows is None:
        return round(expected_distinct(reads, memory.num_values)) if options.deduplicate else None
    if options.distinct_rows > most:
        raise ValueError(f"distinct_rows must be in 1..{most} (rows read, rows there are), got {options.distinct_rows}")
    return options.distinct_rows if options.deduplicate else None


def cores_of_columns(memory: MemoryConfig, ranks: int) -> int:
    """Pieces of a rank's columns, cut where a core ends: each is weighted by scores of its own."""
    width = memory.value_dim // ranks
    return width // math.gcd(memory.value_dim // memory.num_cores, width) if width else 1


def most_own_slots(slots: int, ranks: int, tokens: int) -> int:
    """The least number of a token's slots that fewer than one of `tokens` is expected to exceed on one rank.

    Each slot's row is one of the rank's with probability 1/ranks.
    """
    beyond, share = 1.0, 1 / ranks
    for most in range(slots):
        beyond -= math.comb(slots, most) * share**most * (1 - share) ** (slots - most)
        if tokens * beyond < 1:
            return most
    return slots
