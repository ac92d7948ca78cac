"""Bytes of the sharded lookups: SPEC's formulas with values worked by hand, what each term follows, crossings."""

from __future__ import annotations

import dataclasses

import pytest

from ultramem.presets import preset
from ultramem.runtime.plan import (
    PAPER_WIRE,
    LookupShape,
    Wire,
    columns,
    equal_value_dim,
    lookup_shape,
    replicate,
    rows_at_home,
    rows_at_owner,
)

PAPER = LookupShape(tokens=2048, slots=84, value_dim=1024, table_rows=1792**2)
"""The paper's formulas have neither cores nor blocks."""
SMALL = LookupShape(tokens=6, slots=8, value_dim=16, table_rows=1000, cores=2, blocks=4)


def parts(volume, phase="forward"):
    return {each.payload: each.sent_bytes for each in volume.collectives if each.phase == phase}


def test_the_papers_rows_by_hand():
    """4 T K (P-1)/P and 2 T K Dv (P-1)/P with T 2048, K 84, P 64, Dv 1024: 172032 slots, of which 169344 elsewhere."""
    volume = rows_at_home(PAPER, 64, PAPER_WIRE)
    assert parts(volume) == {"indices of rows": 4 * 169344, "rows": 2 * 169344 * 1024}
    assert volume.forward_bytes == 677_376 + 346_816_512


def test_the_papers_columns_by_hand():
    """4 T K (P-1), 2 T K (P-1) and 2 T Dv (P-1)/P."""
    volume = columns(PAPER, 64, PAPER_WIRE)
    assert parts(volume) == {
        "indices": 43_352_064,  # 4 * 172032 * 63
        "scores": 21_676_032,
        "pooled columns": 4_128_768,  # 2 * 2048 * 1024 * 63 / 64
    }
    # Times the cores for scores, times the blocks for what was pooled.
    both = columns(dataclasses.replace(PAPER, cores=2, blocks=4), 64, PAPER_WIRE)
    assert parts(both) == {"indices": 43_352_064, "scores": 2 * 21_676_032, "pooled columns": 4 * 4_128_768}


def test_backward_by_hand():
    """48 slots, 36 of them elsewhere; 6 tokens of 4 blocks of 16 columns, of 2 bytes."""
    wire = Wire(gradient_bytes=4, score_gradient_bytes=4)
    assert parts(rows_at_home(SMALL, 4, wire), "backward") == {"gradients of rows": 36 * 16 * 4}
    assert parts(columns(SMALL, 4, wire), "backward") == {
        "gradients of pooled columns": 6 * 4 * 12 * 4,
        "gradients of scores": 48 * 3 * 2 * 4,
    }
    assert parts(rows_at_owner(SMALL, 4, wire), "backward") == {
        "gradients of pooled rows": 6 * 4 * 16 * 3 * 4,
        "gradients of scores": 48 * 3 * 2 * 4,
    }


def test_pooling_at_the_owner_by_hand():
    assert parts(rows_at_owner(SMALL, 4, Wire())) == {
        "indices": 48 * 3 * 4,
        "scores": 48 * 3 * 2 * 2,
        "pooled rows": 6 * 4 * 16 * 3 * 2,
    }


def test_columns_send_less_than_rows_pooled_at_their_owner():
    """Whatever the shape: the same indices and scores, and a P-th of what was pooled."""
    for ranks in (2, 8, 64):
        assert columns(SMALL, ranks, Wire()).total_bytes < rows_at_owner(SMALL, ranks, Wire()).total_bytes


def test_replicas_send_their_gradient_alone():
    dense = replicate(SMALL, 4, Wire())
    assert dense.forward_bytes == 0
    assert dense.total_bytes == 2 * 1000 * 16 * 4 * 3 // 4
    half = replicate(SMALL, 4, Wire(replica_gradient_bytes=2), distinct_rows=40)
    assert parts(half, "backward") == {
        "counts of touched rows": 24,
        "numbers of touched rows": 40 * 3 * 8,
        "gradients of touched rows": 40 * 16 * 3 * 2,
    }
    experts = replicate(dataclasses.replace(SMALL, expert_dim=8), 4, Wire(), distinct_rows=40)
    assert parts(experts, "backward") == {
        "counts of touched rows": 48,
        "numbers of touched rows": 2 * 40 * 3 * 8,
        "gradients of touched rows": 40 * 24 * 3 * 4,
    }


@pytest.mark.parametrize(
    ("rows", "blocks", "size", "virtual"),
    [(2**29, 4, 4, 4), (2**29 + 1, 4, 4, 8), (2**31, 1, 4, 4), (2**31 + 1, 1, 8, 8)],
)
def test_indices_are_as_narrow_as_their_number_allows(rows, blocks, size, virtual):
    """Who pools elsewhere is told blocks too, so numbers of virtual rows."""
    shape = dataclasses.replace(SMALL, table_rows=rows, blocks=blocks)
    assert parts(rows_at_home(shape, 4, Wire()))["indices of rows"] == 36 * size
    assert parts(columns(shape, 4, Wire()))["indices"] == 48 * 3 * virtual
    assert parts(rows_at_owner(shape, 4, Wire()))["indices"] == 48 * 3 * virtual


def test_deduplication_sends_each_row_once():
    every, distinct = rows_at_home(SMALL, 4, Wire()), rows_at_home(SMALL, 4, Wire(), distinct_rows=24)
    for phase in ("forward", "backward"):
        for payload, sent in parts(every, phase).items():
            share = 1 if payload == "counts of rows" else 2
            assert sent == share * parts(distinct, phase)[payload]


def test_uneven_owners_are_counted_as_they_are():
    """A rank that asks for 40 of its rows elsewhere and answers 10."""
    volume = rows_at_home(SMALL, 4, Wire(), asked=40, answered=10)
    assert parts(volume) == {"counts of rows": 24, "indices of rows": 160, "rows": 320}
    assert parts(volume, "backward") == {"gradients of rows": 40 * 32}


def test_experts_by_hand():
    """Input rows of 8 columns go home by themselves; with columns, queries go to the columns and products come back."""
    shape, wire = dataclasses.replace(SMALL, expert_dim=8), Wire(gradient_bytes=4)
    inputs = {"counts of input rows": 24, "indices of input rows": 144, "input rows": 36 * 8 * 2}
    by_rows, at_owner = rows_at_home(shape, 4, wire), rows_at_owner(shape, 4, wire)
    assert parts(by_rows) == inputs | parts(rows_at_home(SMALL, 4, wire))
    assert parts(at_owner) == inputs | parts(rows_at_owner(SMALL, 4, wire))
    assert parts(by_rows, "backward")["gradients of input rows"] == 36 * 8 * 4
    by_columns = columns(shape, 4, wire)
    assert parts(by_columns) == parts(columns(SMALL, 4, wire)) | {
        "columns of queries": 6 * 6 * 2,
        "indices of input rows": 48 * 3 * 4,
        "products": 48 * 3 * 2,
    }
    assert parts(by_columns, "backward")["gradients of queries"] == 6 * 6 * 4
    assert parts(by_columns, "backward")["gradients of products"] == 48 * 3 * 2


@pytest.mark.parametrize("make", [rows_at_home, rows_at_owner, columns, replicate])
def test_one_rank_sends_nothing(make):
    assert make(SMALL, 1, Wire()).total_bytes == 0


@pytest.mark.parametrize("make", [rows_at_home, rows_at_owner, columns, replicate])
def test_more_ranks_never_send_less(make):
    sent = [make(PAPER, ranks, Wire()).total_bytes for ranks in (1, 2, 4, 8, 64, 1024)]
    assert sent == sorted(sent)
    assert sent[0] < sent[1]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("ranks", [2, 8, 64, 1024])
def test_volumes_cross_at_the_equal_width(training, ranks):
    """Just below it rows send less, just above it columns do."""
    memory = preset("ultramem-1.6b-x12").memory
    shape = lookup_shape(memory, 4096)
    wire = Wire(count_bytes=0)
    equal = equal_value_dim(shape, ranks, wire, training=training)
    for value_dim, columns_win in ((int(equal * 0.97), False), (int(equal * 1.03) + 1, True)):
        wide = dataclasses.replace(shape, value_dim=max(1, value_dim))
        by_rows, by_columns = rows_at_home(wide, ranks, wire), columns(wide, ranks, wire)
        if training:
            assert (by_columns.total_bytes < by_rows.total_bytes) == columns_win
        else:
            assert (by_columns.forward_bytes < by_rows.forward_bytes) == columns_win


def test_the_papers_crossing_is_a_third_of_the_width():
    """Without cores and blocks: 4 K + 2 K Dv = 6 K P + 2 Dv, so P is about Dv / 3 where K is large."""
    shape = dataclasses.replace(PAPER, slots=10**6)
    assert equal_value_dim(shape, 300, PAPER_WIRE) == pytest.approx(3 * 300 - 2, rel=1e-4)
    assert equal_value_dim(dataclasses.replace(SMALL, slots=4), 8, Wire()) is None  # K <= E: pooling saves nothing


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rows_at_home(SMALL, 0, Wire()), r"ranks must be at least 1, got 0"),
        (lambda: rows_at_home(SMALL, 4, Wire(), distinct_rows=49), r"distinct_rows must be in 1\.\.48 .*, got 49"),
        (lambda: rows_at_home(SMALL, 4, Wire(), asked=49), r"asked must be in 0\.\.48 .*, got 49 and 49"),
        (lambda: rows_at_home(SMALL, 4, Wire(), answered=-1), r"answered at least 0, got 36 and -1"),
        (lambda: dataclasses.replace(SMALL, tokens=0), r"tokens must be at least 1, got 0"),
        (lambda: Wire(index_bytes=2), r"index_bytes must be 4, 8 or None, got 2"),
        (lambda: Wire(row_bytes=0), r"row_bytes must be at least 1, got 0"),
    ],
)
def test_bad_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
