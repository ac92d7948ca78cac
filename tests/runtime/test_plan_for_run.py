"""What `--table-placement auto` chooses, and what it leaves as it was asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from ultramem import preset
from ultramem.config import MoEConfig, ParallelConfig, TrainConfig
from ultramem.runtime.distributed.placement import choose
from ultramem.runtime.distributed.ranks import ALONE, Ranks
from ultramem.runtime.plan.for_run import settle_placement

MODEL = preset("ultramem-tiny")
TRAIN = TrainConfig(batch_size=64, sequence_length=64, table_optimizer="lazy_adamw")
LITTLE, PLENTY = 10**6, 10**12


def settled(parallel=None, *, model=MODEL, train=TRAIN, ranks=8, memory_bytes=LITTLE, half=False):
    return settle_placement(
        model, train, parallel or ParallelConfig(), ranks=ranks, memory_bytes=memory_bytes, half=half
    )


def test_auto_is_what_sends_least_and_says_why():
    parallel, reasons = settled()
    assert (parallel.table_placement, parallel.pool) == ("columns", "home")
    assert reasons[0].startswith("Replicating is not possible: it takes ")
    assert reasons[-2].startswith("So: columns; ")
    parallel, reasons = settled(ParallelConfig(deduplicate=False), ranks=5)
    assert (parallel.table_placement, parallel.pool) == ("rows", "owner")
    assert "Columns are not possible: value_dim 96 is no multiple of 5 ranks." in reasons
    assert settled(ranks=64, train=replace(TRAIN, batch_size=1024))[0].table_placement == "rows"


def test_tables_that_fit_are_copied_where_their_gradient_is_less():
    """A step of many micro-batches exchanges in each, and adds up gradients once."""
    long = replace(TRAIN, batch_size=8 * 256, accumulate=256)
    assert settled(train=long, memory_bytes=PLENTY)[0].table_placement == "replicate"
    assert settled(train=long)[0].table_placement == "columns"
    assert settled(train=long, memory_bytes=None)[0].table_placement == "columns"


def test_what_is_settled_stays():
    for placement in ("replicate", "rows", "columns"):
        parallel, _ = settled(ParallelConfig(table_placement=placement, pool="home"))
        assert (parallel.table_placement, parallel.pool) == (placement, "home")
    assert settled(ParallelConfig(pool="home"), ranks=5)[0].pool == "home"
    parallel, reasons = settled(ParallelConfig(table_placement="rows"), ranks=2)
    assert parallel.pool == "owner"
    assert reasons == [reasons[0]]
    assert reasons[0].startswith("Rows are pooled at owner: a rank sends a step and table at home ")
    assert settled(ParallelConfig(table_placement="columns"))[1] == []


def test_types_on_the_wire_are_the_runs():
    """Half the bytes of rows, where values travel in bfloat16; gradients of copies stay as the table."""
    copies = ParallelConfig(table_copies=2)
    told = [settled(replace(copies, exchange_dtype=name))[1][1] for name in ("table", "bfloat16")]
    assert told[0] != told[1]
    assert all(each.startswith("Columns: each rank sends ") for each in told)


def test_a_row_accumulator_wants_whole_rows():
    parallel, reasons = settled(train=replace(TRAIN, table_optimizer="row_adagrad"))
    assert parallel.table_placement == "rows"
    assert any("row_adagrad" in each for each in reasons)


def test_experts_beside_memory_layers_leave_replicas_out():
    """Nobody counts what they keep, so nobody says that copies fit."""
    model = replace(MODEL, moe=MoEConfig(num_experts=4))
    parallel, reasons = settled(model=model, memory_bytes=PLENTY)
    assert parallel.table_placement == "columns"
    assert "nobody says what a rank has" in reasons[0]


@pytest.fixture
def ranks():
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    mesh = init_device_mesh("cpu", (1, 8), mesh_dim_names=("copies", "shards"))
    yield Ranks(size=8, device=torch.device("cpu"), mesh=mesh, parallel=ParallelConfig())
    dist.destroy_process_group()


def test_ranks_of_a_run_get_a_shard_of_what_is_chosen(ranks):
    chosen, reasons = choose(ranks, MODEL, TRAIN)
    assert chosen.parallel.table_placement in ("replicate", "columns")
    assert reasons[-1].startswith(f"So: {chosen.parallel.table_placement}")
    rows, _ = choose(replace(ranks, parallel=ParallelConfig(table_placement="rows", pool="home")), MODEL, TRAIN)
    shard = rows.table_shard()
    assert (shard.placement, shard.pool, shard.ranks) == ("rows", "home", 8)


def test_one_process_and_dense_models_have_nothing_to_choose(ranks):
    for chosen, reasons in (choose(ALONE, MODEL, TRAIN), choose(ranks, preset("dense-tiny"), TRAIN)):
        assert (chosen.parallel.table_placement, reasons) == ("replicate", [])
