"""Bytes that a rank sends to others in one lookup of a sharded table (Appendix D), forward and backward.

Symbols: P ranks, T tokens of the rank, K slots a token, C cores, E blocks, N rows of Dv columns; U distinct rows among
the T*K; i, s, r bytes of an index, a score, a number of a row, and s', r' of their gradients. A rank's share to itself
is not counted. "Others' share" of n things spread evenly over P owners is n - floor(n/P), that is n (P-1)/P.

| placement | forward | backward |
| --- | --- | --- |
| rows, pooled at home | all-to-all of indices `i TK (P-1)/P`, then of rows `r TK Dv (P-1)/P` | all-to-all of the rows' gradients `r' TK Dv (P-1)/P` |
| the same, deduplicated | U in the place of TK | U in the place of TK: gradients of one row are added up before |
| rows, pooled at the owner | all-to-all of indices, tokens and scores `(i + t + s C) TK (P-1)/P`, then of partly pooled rows `r T E Dv (P-1)` | all-to-all of the pooled rows' gradients `r' T E Dv (P-1)`, then of the scores' `s' C TK (P-1)/P` |
| columns | all-gather of indices `i TK (P-1)` and scores `s C TK (P-1)`, all-to-all of pooled columns `r T E Dv (P-1)/P` | all-to-all of their gradients `r' T E Dv (P-1)/P`, reduce-scatter of the scores' `s' C TK (P-1)` |
| replicate | nothing | all-reduce of the gradient `2 r' N Dv (P-1)/P`, or all-gather of touched rows and their numbers `U (r' Dv + i) (P-1)` |

Both rows placements send `8 (P-1)` bytes of counts ahead, since a rank cannot know what it is asked for.
Pooling at the owner answers every token with E rows per owner, so it pays only while P*E is below K, and even then
columns send less, unless the rows are narrow: `(i + s C) K > (r + r') E Dv`, roughly. It is for tables whose columns
cannot be divided. Deduplication helps no other placement: an owner that pools needs a score for every slot, and so do
columns.
An all-reduce is counted as a ring's, a reduce-scatter and an all-gather as P-1 chunks; all are what any algorithm must
send at least, switches that add up apart.
"""  # noqa: E501  # a table row is one line

from __future__ import annotations

from ultramem.runtime.plan.exchange import Collective, LookupShape, Phase, Volume, Wire


def others_share(count: int, ranks: int) -> int:
    """Of `count` things spread evenly over the ranks, those that lie elsewhere; an uneven rest counts as elsewhere."""
    return count - count // ranks


def rows_at_home(
    shape: LookupShape,
    ranks: int,
    wire: Wire,
    *,
    distinct_rows: int | None = None,
    asked: int | None = None,
    answered: int | None = None,
) -> Volume:
    """The table is cut by rows; rows travel to the rank that reads them, and are pooled there.

    Args:
        shape: of the lookup.
        ranks: that the table is spread over.
        wire: bytes of what is sent.
        distinct_rows: different rows among those that the rank reads, each of which travels once; None: one row for
            every slot.
        asked: rows (as counted in `distinct_rows`) that this rank asks others for; None: as if spread evenly.
        answered: rows that others ask this rank for; None: as many as it asks for itself.

    Raises:
        ValueError: a count is out of range.
    """
    _require_ranks(ranks)
    reads = shape.reads
    if distinct_rows is not None:
        if not 1 <= distinct_rows <= min(reads, shape.table_rows):
            most = min(reads, shape.table_rows)
            raise ValueError(f"distinct_rows must be in 1..{most} (rows read, rows there are), got {distinct_rows}")
        reads = distinct_rows
    asked = others_share(reads, ranks) if asked is None else asked
    answered = asked if answered is None else answered
    if not 0 <= asked <= reads or answered < 0:
        raise ValueError(f"asked must be in 0..{reads} and answered at least 0, got {asked} and {answered}")
    width = shape.value_dim + shape.expert_dim
    return Volume(
        "rows",
        "home",
        _sent(
            ("forward", "all_to_all", "counts", (ranks - 1) * wire.count_bytes),
            ("forward", "all_to_all", "indices", asked * wire.index_bytes_for(shape)),
            ("forward", "all_to_all", "rows", answered * width * wire.row_bytes),
            ("backward", "all_to_all", "gradients of rows", asked * width * wire.gradient_bytes),
        ),
    )


def rows_at_owner(
    shape: LookupShape, ranks: int, wire: Wire, *, asked: int | None = None, answered: int | None = None
) -> Volume:
    """The table is cut by rows; scores travel to the rows, and every owner sends a token's E partly pooled rows back.

    Args:
        shape: of the lookup.
        ranks: that the table is spread over.
        wire: bytes of what is sent.
        asked: slots of this rank whose rows others own; None: as if spread evenly.
        answered: slots of others whose rows this rank owns; None: as many.

    Raises:
        ValueError: a count is out of range, or slots are experts.
    """
    _require_ranks(ranks)
    _require_no_experts(shape, "rows pooled at the owner")
    asked = others_share(shape.reads, ranks) if asked is None else asked
    answered = asked if answered is None else answered
    if not 0 <= asked <= shape.reads or answered < 0:
        raise ValueError(f"asked must be in 0..{shape.reads} and answered at least 0, got {asked} and {answered}")
    pooled = shape.tokens * shape.blocks * shape.value_dim * (ranks - 1)
    return Volume(
        "rows",
        "owner",
        _sent(
            ("forward", "all_to_all", "counts", (ranks - 1) * wire.count_bytes),
            ("forward", "all_to_all", "indices", asked * wire.index_bytes_for(shape)),
            ("forward", "all_to_all", "tokens", asked * wire.token_bytes),
            ("forward", "all_to_all", "scores", asked * shape.cores * wire.score_bytes),
            ("forward", "all_to_all", "pooled rows", pooled * wire.row_bytes),
            ("backward", "all_to_all", "gradients of pooled rows", pooled * wire.gradient_bytes),
            ("backward", "all_to_all", "gradients of scores", answered * shape.cores * wire.score_gradient_bytes),
        ),
    )


def columns(shape: LookupShape, ranks: int, wire: Wire) -> Volume:
    """The table is cut by columns; every rank pools its columns for the tokens of all.

    Raises:
        ValueError: there are no ranks, or slots are experts.
    """
    _require_ranks(ranks)
    _require_no_experts(shape, "columns")
    pooled = others_share(shape.tokens * shape.blocks * shape.value_dim, ranks)
    reads = shape.reads * (ranks - 1)
    return Volume(
        "columns",
        None,
        _sent(
            ("forward", "all_gather", "indices", reads * wire.index_bytes_for(shape)),
            ("forward", "all_gather", "scores", reads * shape.cores * wire.score_bytes),
            ("forward", "all_to_all", "pooled columns", pooled * wire.row_bytes),
            ("backward", "all_to_all", "gradients of pooled columns", pooled * wire.gradient_bytes),
            ("backward", "reduce_scatter", "gradients of scores", reads * shape.cores * wire.score_gradient_bytes),
        ),
    )


def replicate(shape: LookupShape, ranks: int, wire: Wire, *, distinct_rows: int | None = None) -> Volume:
    """Every rank has the whole table, and the ranks add up its gradient.

    Args:
        shape: of the lookup.
        ranks: that have the table.
        wire: bytes of what is sent.
        distinct_rows: rows that this rank's tokens touched, where the gradient is one of touched rows; None: it is
            dense.

    Raises:
        ValueError: there are no ranks.
    """
    _require_ranks(ranks)
    width = shape.value_dim + shape.expert_dim
    if distinct_rows is None:
        dense = 2 * others_share(shape.table_rows * width * wire.gradient_bytes, ranks)
        return Volume("replicate", None, _sent(("backward", "all_reduce", "gradient of the table", dense)))
    touched = distinct_rows * (ranks - 1)
    return Volume(
        "replicate",
        None,
        _sent(
            ("backward", "all_gather", "numbers of touched rows", touched * wire.index_bytes_for(shape)),
            ("backward", "all_gather", "gradients of touched rows", touched * width * wire.gradient_bytes),
        ),
    )


def equal_value_dim(shape: LookupShape, ranks: int, wire: Wire, *, training: bool = False) -> float | None:
    """The value dim at which rows (pooled at home, not deduplicated) and columns send the same; wider: columns less.

    In the limit of many tokens, so counts apart. None where rows send less at any width.

    Args:
        shape: of the lookup; its `value_dim` is not looked at.
        ranks: that the table is spread over.
        wire: bytes of what is sent.
        training: forward and backward; else the forward alone, as in the paper.
    """
    index, scores, row = wire.index_bytes_for(shape), shape.cores * wire.score_bytes, wire.row_bytes
    if training:
        scores += shape.cores * wire.score_gradient_bytes
        row += wire.gradient_bytes
    # K (i + r Dv) = (i + s) K P + r E Dv, after division by T (P-1)/P.
    per_column = row * (shape.slots - shape.blocks)
    if per_column <= 0:
        return None
    return shape.slots * ((index + scores) * ranks - index) / per_column


def _sent(*collectives: tuple[Phase, str, str, int]) -> tuple[Collective, ...]:
    """Those that send anything."""
    return tuple(Collective(*each) for each in collectives if each[-1])  # type: ignore[arg-type]  # kinds are literals above


def _require_ranks(ranks: int) -> None:
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")


def _require_no_experts(shape: LookupShape, what: str) -> None:
    if shape.expert_dim:
        raise ValueError(
            f"expert_dim must be 0 with {what}: the product with a whole input row comes before its scores, "
            f"got {shape.expert_dim}"
        )
