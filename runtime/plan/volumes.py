"""Bytes that a rank sends to others in one lookup of a sharded table (Appendix D), forward and backward.

Symbols: P ranks, T tokens of the rank, K slots a token, C cores, E blocks, N rows of Dv columns, Dp columns of an input
row where slots are experts; U distinct rows among the T*K; i, s, r bytes of an index, a score, a number of a row, s', r'
of their gradients, and g of a table's. A rank's share to itself is not counted. "Others' share" of n things spread evenly over P
owners is n - floor(n/P), that is n (P-1)/P.

| placement | forward | backward |
| --- | --- | --- |
| rows, pooled at home | all-to-all of indices `i TK (P-1)/P`, then of rows `r TK Dv (P-1)/P` | all-to-all of the rows' gradients `r' TK Dv (P-1)/P` |
| the same, deduplicated | U in the place of TK | U in the place of TK: gradients of one row are added up before |
| rows, pooled at the owner | all-gather of indices `i TK (P-1)` and scores `s C TK (P-1)`, reduce-scatter of pooled rows `r T E Dv (P-1)` | all-gather of their gradients `r' T E Dv (P-1)`, reduce-scatter of the scores' `s' C TK (P-1)` |
| columns | all-gather of indices `i TK (P-1)` and scores `s C TK (P-1)`, all-to-all of pooled columns `r T E Dv (P-1)/P` | all-to-all of their gradients `r' T E Dv (P-1)/P`, reduce-scatter of the scores' `s' C TK (P-1)` |
| replicate | nothing | all-reduce of the gradient `2 g N Dv (P-1)/P`, or all-gather of touched rows and their numbers `U (g Dv + 8) (P-1)` |

| where slots are experts, also | forward | backward |
| --- | --- | --- |
| rows | as rows pooled at home, with Dp in the place of Dv | the same |
| columns | all-to-all of the queries' columns `r T Dp (P-1)/P`, all-gather of indices, reduce-scatter of products `s TK (P-1)` | their gradients the same way back: all-to-all, and all-gather |

Rows at home are asked for after `8 (P-1)` bytes of counts, since a rank cannot know what it is asked for; touched rows are
gathered after as many, since ranks touch different numbers of them (and pad to the largest, which is not counted). Where pooling is
elsewhere an index is that of a virtual row, below N*E, since blocks are pooled apart; at home it is that of a row, below N.

Pooling at the owner answers every token with E whole rows from every rank, so it sends less than rows at home only while
P*E is below K or so. Columns send less still, always: it is for tables whose columns cannot be divided. Deduplication
helps neither: whoever pools needs a score for every slot.
An all-reduce is counted as a ring's, a reduce-scatter and an all-gather as P-1 chunks.
"""  # noqa: E501  # a table row is one line

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ultramem.runtime.plan.exchange import Collective, LookupShape, Phase, Volume, Wire

ROW_NUMBER_BYTES = 8
"""Of the number of a row in a sparse gradient."""


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
    requests = _requests(shape, ranks, wire, distinct_rows, asked, answered)
    return Volume("rows", "home", _sent(*requests.inputs, *requests.rows))


def rows_at_owner(shape: LookupShape, ranks: int, wire: Wire, *, distinct_rows: int | None = None) -> Volume:
    """The table is cut by rows; every rank pools its rows for the tokens of all, and the sums are added up at home.

    Args:
        shape: of the lookup.
        ranks: that the table is spread over.
        wire: bytes of what is sent.
        distinct_rows: of input rows, where slots are experts: these go home; else not looked at.

    Raises:
        ValueError: a count is out of range.
    """
    requests = _requests(shape, ranks, wire, distinct_rows, None, None)
    pooled = shape.tokens * shape.blocks * shape.value_dim * (ranks - 1)
    reads = shape.reads * (ranks - 1)
    return Volume(
        "rows",
        "owner",
        _sent(
            *requests.inputs,
            ("forward", "all_gather", "indices", reads * wire.index_bytes_for(shape, virtual=True)),
            ("forward", "all_gather", "scores", reads * shape.cores * wire.score_bytes),
            ("forward", "reduce_scatter", "pooled rows", pooled * wire.row_bytes),
            ("backward", "all_gather", "gradients of pooled rows", pooled * wire.gradient_bytes),
            ("backward", "reduce_scatter", "gradients of scores", reads * shape.cores * wire.score_gradient_bytes),
        ),
    )


def columns(shape: LookupShape, ranks: int, wire: Wire) -> Volume:
    """The table is cut by columns; every rank pools its columns for the tokens of all.

    Raises:
        ValueError: there are no ranks.
    """
    _require_ranks(ranks)
    pooled = others_share(shape.tokens * shape.blocks * shape.value_dim, ranks)
    reads = shape.reads * (ranks - 1)
    experts: tuple[_Sent, ...] = ()
    if shape.expert_dim:
        query = others_share(shape.tokens * shape.expert_dim, ranks)
        experts = (
            ("forward", "all_to_all", "columns of queries", query * wire.row_bytes),
            ("forward", "all_gather", "indices of input rows", reads * wire.index_bytes_for(shape)),
            ("forward", "reduce_scatter", "products", reads * wire.score_bytes),
            ("backward", "all_gather", "gradients of products", reads * wire.score_gradient_bytes),
            ("backward", "all_to_all", "gradients of queries", query * wire.gradient_bytes),
        )
    return Volume(
        "columns",
        None,
        _sent(
            *experts,
            ("forward", "all_gather", "indices", reads * wire.index_bytes_for(shape, virtual=True)),
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
    widths = (shape.value_dim, *((shape.expert_dim,) if shape.expert_dim else ()))
    return Volume("replicate", None, added_up(shape.table_rows, widths, ranks, wire, touched_rows=distinct_rows))


def added_up(
    rows: int, widths: Sequence[int], ranks: int, wire: Wire, *, touched_rows: int | None = None
) -> tuple[Collective, ...]:
    """What a rank sends where several have the same rows, and add up the gradients of a step.

    Args:
        rows: that they have.
        widths: of the rows: of value rows, and of input rows where there are any.
        ranks: that have them.
        wire: bytes of what is sent.
        touched_rows: that a rank has a gradient of; None: the gradient is dense.

    Raises:
        ValueError: there are no ranks.
    """
    _require_ranks(ranks)
    size = wire.replica_gradient_bytes
    if touched_rows is None:
        dense = 2 * sum(others_share(rows * width * size, ranks) for width in widths)
        return _sent(("backward", "all_reduce", "gradient of the table", dense))
    others = ranks - 1
    return _sent(
        ("backward", "all_gather", "counts of touched rows", others * len(widths) * wire.count_bytes),
        ("backward", "all_gather", "numbers of touched rows", others * len(widths) * touched_rows * ROW_NUMBER_BYTES),
        ("backward", "all_gather", "gradients of touched rows", others * sum(widths) * touched_rows * size),
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
    index, virtual = wire.index_bytes_for(shape), wire.index_bytes_for(shape, virtual=True)
    scores, row = shape.cores * wire.score_bytes, wire.row_bytes
    if training:
        scores += shape.cores * wire.score_gradient_bytes
        row += wire.gradient_bytes
    # K (i + r Dv) = (v + s) K P + r E Dv, after division by T (P-1)/P, with v bytes of a virtual index.
    per_column = row * (shape.slots - shape.blocks)
    if per_column <= 0:
        return None
    return shape.slots * ((virtual + scores) * ranks - index) / per_column


_Sent = tuple[Phase, str, str, int]


class _Requests(NamedTuple):
    """What is sent for rows that travel to their readers."""

    inputs: tuple[_Sent, ...]
    """Of input rows, where slots are experts."""
    rows: tuple[_Sent, ...]


def _requests(
    shape: LookupShape, ranks: int, wire: Wire, distinct_rows: int | None, asked: int | None, answered: int | None
) -> _Requests:
    _require_ranks(ranks)
    reads = shape.reads
    if distinct_rows is not None:
        most = min(reads, shape.table_rows)
        if not 1 <= distinct_rows <= most:
            raise ValueError(f"distinct_rows must be in 1..{most} (rows read, rows there are), got {distinct_rows}")
        reads = distinct_rows
    asked = others_share(reads, ranks) if asked is None else asked
    answered = asked if answered is None else answered
    if not 0 <= asked <= reads or answered < 0:
        raise ValueError(f"asked must be in 0..{reads} and answered at least 0, got {asked} and {answered}")

    def of(name: str, width: int) -> tuple[_Sent, ...]:
        return (
            ("forward", "all_to_all", f"counts of {name}", (ranks - 1) * wire.count_bytes),
            ("forward", "all_to_all", f"indices of {name}", asked * wire.index_bytes_for(shape)),
            ("forward", "all_to_all", name, answered * width * wire.row_bytes),
            ("backward", "all_to_all", f"gradients of {name}", asked * width * wire.gradient_bytes),
        )

    return _Requests(of("input rows", shape.expert_dim) if shape.expert_dim else (), of("rows", shape.value_dim))


def _sent(*collectives: _Sent) -> tuple[Collective, ...]:
    """Those that send anything."""
    return tuple(Collective(*each) for each in collectives if each[-1])  # type: ignore[arg-type]  # kinds are literals above


def _require_ranks(ranks: int) -> None:
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
