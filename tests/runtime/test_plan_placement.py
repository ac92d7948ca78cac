"""The placement of a table: what decides, what rules a placement out, and what is said."""

from __future__ import annotations

import dataclasses

import pytest

from ultramem.presets import preset
from ultramem.runtime.plan import LookupShape, Wire, choose_placement, equal_value_dim, lookup_shape

SHAPE = lookup_shape(preset("ultramem-1.6b-x12").memory, 8192)
TOO_LARGE = {"replica_bytes": 10**12, "free_bytes": 10**10}


def chosen(shape=SHAPE, ranks=64, **options):
    return choose_placement(shape, ranks, **(TOO_LARGE | options))


def test_the_choice_flips_where_the_volumes_cross():
    """In training as in inference: wide rows by columns, narrow ones by rows."""
    for training in (True, False):
        equal = equal_value_dim(SHAPE, 64, Wire(count_bytes=0), training=training)
        assert 64 < equal < 960
        below, above = 64 * int(equal // 64), 64 * (int(equal // 64) + 1)
        for value_dim, placement in ((below, "rows"), (above, "columns")):
            shape = dataclasses.replace(SHAPE, value_dim=value_dim)
            choice = chosen(shape, training=training)
            assert choice.placement == placement
            possible = [each for each in choice.candidates if each.refused is None]
            sent = choice.volume.total_bytes if training else choice.volume.forward_bytes
            assert sent == min(each.step_bytes for each in possible)


def test_many_ranks_turn_columns_to_rows():
    assert [chosen(ranks=ranks).placement for ranks in (2, 8, 64, 1024)] == ["columns", "columns", "columns", "rows"]


def test_columns_must_divide():
    choice = chosen(ranks=48)
    assert choice.placement == "rows"
    assert "Columns are not possible: value_dim 1024 is no multiple of 48 ranks." in choice.reasons
    assert chosen(dataclasses.replace(SHAPE, value_dim=960), ranks=48).placement == "columns"


def test_where_columns_do_not_divide_few_ranks_pool_at_the_owner():
    """While P * E is below K."""
    odd = dataclasses.replace(SHAPE, value_dim=1022)
    assert [(chosen(odd, ranks=ranks).placement, chosen(odd, ranks=ranks).pooling) for ranks in (3, 12, 48)] == [
        ("rows", "owner"),
        ("rows", "owner"),
        ("rows", "home"),
    ]


def test_deduplication_can_turn_the_choice():
    """A rank whose slots are mostly the same rows sends fewer rows than all its pooled columns."""
    assert chosen().placement == "columns"
    assert chosen(distinct_rows=SHAPE.reads // 16).placement == "rows"


def test_a_table_that_fits_may_be_replicated():
    """It is, where its gradient is less than an exchange: few rows, many tokens."""
    small = dataclasses.replace(SHAPE, table_rows=1000)
    fits = {"replica_bytes": 10**6, "free_bytes": 10**10}
    assert chosen(small, **fits).placement == "replicate"
    assert chosen(small, replica_bytes=10**11).placement != "replicate"
    assert chosen(**fits).placement != "replicate"  # 3.2 M rows: their dense gradient is more than the exchange
    assert chosen(training=False, **fits).placement == "replicate"  # nothing is sent without gradients
    touched = chosen(**fits, touched_rows=1000)
    assert touched.candidates[0].volume.total_bytes == (1000 * (1024 * 4 + 8) + 8) * 63
    unknown = chosen(small, replica_bytes=10**6, free_bytes=None)
    assert unknown.placement != "replicate"
    assert "nobody says what a rank has" in unknown.reasons[0]


def test_replicas_reduce_once_a_step_where_lookups_exchange_each_time():
    """Layers that share a table, and micro-batches, make replicas cheaper."""
    fits = {"replica_bytes": 10**6, "free_bytes": 10**12}
    once, often = chosen(**fits), chosen(**fits, lookups=64)
    assert (once.placement, often.placement) == ("columns", "replicate")
    assert often.candidates[0].step_bytes == once.candidates[0].step_bytes
    assert often.candidates[1].step_bytes == 64 * once.candidates[1].step_bytes


def test_copies_of_a_cut_table_add_up_their_gradients():
    """A rank of 8 sends its rows' (or columns') gradients to three others that have them; lookups send the same."""
    one, four = chosen(ranks=8), chosen(ranks=8, copies=4, group_touched_rows=80_000)
    for alone, copied in zip(one.candidates[1:], four.candidates[1:], strict=True):
        assert copied.volume == alone.volume
        rows, width = (80_000, 128) if copied.volume.placement == "columns" else (10_000, 1024)
        added = 3 * (8 + rows * (8 + 4 * width))
        assert copied.step_bytes - alone.step_bytes == sum(each.sent_bytes for each in copied.copies) == added
    dense = chosen(ranks=8, copies=4).candidates[1].copies
    assert [each.sent_bytes for each in dense] == [2 * SHAPE.table_rows * 128 * 4 * 3 // 4]
    assert chosen(ranks=8, copies=4, training=False).candidates[1].copies == ()
    assert one.candidates[0].volume.total_bytes < four.candidates[0].volume.total_bytes  # replicas are on all ranks


def test_callers_may_rule_a_placement_out():
    choice = chosen(ruled_out={"columns": "Columns are not possible today."})
    assert choice.placement == "rows"
    assert "Columns are not possible today." in choice.reasons


def test_one_rank_has_the_whole_table():
    choice = chosen(ranks=1)
    assert choice.placement == "replicate"
    assert choice.reasons[-1].startswith("So: replicate")


def test_columns_of_input_rows_must_divide_too():
    assert chosen(dataclasses.replace(SHAPE, expert_dim=64)).placement == "columns"
    choice = chosen(dataclasses.replace(SHAPE, expert_dim=32))
    assert (choice.placement, choice.pooling) == ("rows", "home")
    assert "Columns are not possible: expert_dim 32 is no multiple of 64 ranks." in choice.reasons


def test_reasons_name_bytes_and_what_is_short():
    reasons = chosen(replica_bytes=10**12, free_bytes=10**10).reasons
    assert reasons[0] == ("Replicating is not possible: it takes 1.00 TB on each rank, which has 10.0 GB for tables.")
    assert reasons[1].startswith("Columns: each rank sends ")
    assert reasons[2].startswith("Rows, pooled at home: each rank sends ")
    assert reasons[-2].startswith("So: columns; rows, pooled at home would send ")
    assert reasons[-1].startswith("Even so a rank's part takes 15.6 GB of 10.0 GB")


def test_nothing_is_chosen_where_nothing_fits():
    tiny = LookupShape(tokens=4, slots=2, value_dim=3, table_rows=4)
    with pytest.raises(ValueError, match=r"ranks must be so few that each has some of the 4 rows, .*, got 5"):
        chosen(tiny, ranks=5)
    with pytest.raises(ValueError, match=r"at least 0, got -1 and"):
        chosen(replica_bytes=-1)
