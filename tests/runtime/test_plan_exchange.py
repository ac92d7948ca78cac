"""Formulas against the layers themselves, run on a fake process group of 8, 64 and 1024 ranks, their bytes counted.

Nothing arrives on a fake group. So what other ranks would have sent is made up where it matters: all of them ask this
one for as many rows as it asks of itself, and for the first row. What this rank asks for is chosen by its own layer,
and uneven.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from kept import kept_for_backward
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from ultramem import MemoryConfig, UltraMemLayer, build_model, preset
from ultramem.config.pkm import PKM_SWITCHES
from ultramem.graph import sharded_table
from ultramem.graph.table_shard import TableShard
from ultramem.ops.exchange import ALL_TO_ALL
from ultramem.runtime.distributed.gradients import reduce_gradients
from ultramem.runtime.distributed.ranks import Ranks
from ultramem.runtime.distributed.sharded_loss import ShardedLoss
from ultramem.runtime.plan import Wire, columns, lookup_shape, replicate, rows_at_home, rows_at_owner
from ultramem.runtime.plan.count_bytes import CountBytes
from ultramem.runtime.plan.dense_share import dense_share
from ultramem.runtime.plan.exchange_memory import kept_bytes
from ultramem.runtime.plan.memory import dense_parameters
from ultramem.runtime.plan.options import PlanOptions

# torch 2.13 has a new name for what 2.11 calls all_gather_into_tensor.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

TOKENS = 2, 8
MEMORY = MemoryConfig(hidden_size=32, num_layers=2, value_dim=1024, key_dim=8, knum=64, top_m=8)
NARROW = replace(MEMORY, value_dim=16)
"""Pooled at the owner every rank makes P times the tokens: rows of 1024 would take gigabytes."""
EXPERTS = replace(NARROW, value_dim=64, expert_dim=128, expert_project=True)
PKM = replace(MEMORY, **{**PKM_SWITCHES, "value_dim": 32, "expansion": 1})
BF16 = {"exchange_dtype": torch.bfloat16}
FULL = Wire(row_bytes=4, score_bytes=4, gradient_bytes=4, score_gradient_bytes=4)


@pytest.fixture(params=[8, 64, 1024])
def mesh(request):
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield init_device_mesh("cpu", (request.param,))
    dist.destroy_process_group()


class Asked:
    """What the layer asked of other ranks in its last request, and what they would ask of it."""

    distinct_rows = 0
    elsewhere = 0
    answered = 0


@pytest.fixture
def asked(monkeypatch):
    """Makes up what a fake group does not deliver, after the collective was called as ever."""
    seen = Asked()
    real = sharded_table.exchange

    def exchange(tensor, way):
        came = real(tensor, way)
        if came.is_floating_point():
            return came
        if way.kind == ALL_TO_ALL and way.send is None:  # counts: others ask as many of this rank as it does itself
            seen.distinct_rows, own = int(tensor.sum()), int(tensor[0])
            made_up = max(1, own)  # a fake group, unlike gloo, refuses to send nothing to whoever expects something
            seen.elsewhere, seen.answered = seen.distinct_rows - own, (way.size - 1) * made_up
            return torch.full_like(came, made_up)
        return torch.zeros_like(came)

    monkeypatch.setattr(sharded_table, "exchange", exchange)
    return seen


def counted(config, mesh, **shard):
    """Bytes by kind of collective that a layer of a rank sends in its forward, and in its backward."""
    torch.manual_seed(0)
    layer = UltraMemLayer(config, shard=TableShard(mesh=mesh, **shard))
    hidden_BSD = torch.randn(*TOKENS, config.hidden_size, requires_grad=True)
    with CountBytes() as count:
        output_BSD = layer(hidden_BSD)
        forward = count.by_kind()
        count.take()
        output_BSD.sum().backward()
    assert layer.table.values_NV.grad is not None
    return forward, count.by_kind()


def formula(volume):
    found = {"forward": {}, "backward": {}}
    for each in volume.collectives:
        found[each.phase][each.kind] = found[each.phase].get(each.kind, 0) + each.sent_bytes
    return found["forward"], found["backward"]


def shape_of(config):
    return lookup_shape(config, TOKENS[0] * TOKENS[1])


@pytest.mark.parametrize("deduplicate", [True, False])
def test_rows_pooled_at_home(mesh, asked, deduplicate):
    found = counted(MEMORY, mesh, placement="rows", deduplicate=deduplicate, **BF16)
    shape = shape_of(MEMORY)
    if deduplicate:
        assert asked.distinct_rows < shape.reads
    else:
        assert asked.distinct_rows == shape.reads
    volume = rows_at_home(
        shape,
        mesh.size(),
        Wire(),
        distinct_rows=asked.distinct_rows if deduplicate else None,
        asked=asked.elsewhere,
        answered=asked.answered,
    )
    assert found == formula(volume)


@pytest.mark.parametrize("config", [MEMORY, PKM], ids=["ultramem", "pkm"])
def test_columns(mesh, asked, config):
    if config.value_dim % mesh.size():
        config = replace(config, value_dim=mesh.size(), hidden_size=mesh.size())
    assert counted(config, mesh, placement="columns", **BF16) == formula(columns(shape_of(config), mesh.size(), Wire()))


def test_rows_pooled_at_the_owner(mesh, asked):
    found = counted(NARROW, mesh, placement="rows", pool="owner", **BF16)
    assert found == formula(rows_at_owner(shape_of(NARROW), mesh.size(), Wire()))


@pytest.mark.parametrize("mesh", [8, 64], indirect=True)
def test_float32_tables_travel_in_float32(mesh, asked):
    """Where no other type is asked for."""
    assert counted(NARROW, mesh, placement="rows", pool="owner") == formula(
        rows_at_owner(shape_of(NARROW), mesh.size(), FULL)
    )
    config = replace(MEMORY, value_dim=64)
    assert counted(config, mesh, placement="columns") == formula(columns(shape_of(config), mesh.size(), FULL))


@pytest.mark.parametrize("mesh", [8, 64], indirect=True)
def test_many_rows_have_wide_numbers(mesh, asked, monkeypatch):
    """As if 4096 rows, and 16384 virtual ones, were too many for 4 bytes."""
    monkeypatch.setattr(sharded_table, "_INT32_ROWS", 4095)
    wide = Wire(index_bytes=8)
    config = replace(MEMORY, value_dim=64)
    assert counted(config, mesh, placement="columns", **BF16) == formula(columns(shape_of(config), mesh.size(), wide))
    found = counted(config, mesh, placement="rows", **BF16)
    volume = rows_at_home(
        shape_of(config), mesh.size(), wide,
        distinct_rows=asked.distinct_rows, asked=asked.elsewhere, answered=asked.answered,
    )  # fmt: skip
    assert found == formula(volume)


@pytest.mark.parametrize("mesh", [8, 64], indirect=True)
def test_experts(mesh, asked):
    """Input rows of experts travel by themselves, or their products do."""
    ranks, shape = mesh.size(), shape_of(EXPERTS)
    assert counted(EXPERTS, mesh, placement="columns") == formula(columns(shape, ranks, FULL))
    found = counted(EXPERTS, mesh, placement="rows")
    volume = rows_at_home(
        shape, ranks, FULL, distinct_rows=asked.distinct_rows, asked=asked.elsewhere, answered=asked.answered
    )
    assert found == formula(volume)


@pytest.mark.parametrize("mesh", [8], indirect=True)
@pytest.mark.parametrize("way", ["home", "owner", "columns"])
def test_what_travels_is_what_a_layer_does_not_wait_for(mesh, asked, monkeypatch, way):
    """Started in the first half of a lookup and awaited in the second, where the model has other layers between."""
    config = replace(MEMORY, value_dim=64)
    shard = {"placement": "columns"} if way == "columns" else {"placement": "rows", "pool": way}
    real, flights = sharded_table.start, []

    def start(tensor, way):
        with CountBytes() as count:
            flight = real(tensor, way)
        flights.append(count.total_bytes)
        return flight

    monkeypatch.setattr(sharded_table, "start", start)
    counted(config, mesh, **shard, **BF16)
    shape = shape_of(config)
    if way == "home":
        rows = {"distinct_rows": asked.distinct_rows, "asked": asked.elsewhere, "answered": asked.answered}
        volume = rows_at_home(shape, 8, Wire(), **rows)
    else:
        volume = (columns if way == "columns" else rows_at_owner)(shape, 8, Wire())
    assert flights == [each.sent_bytes for each in volume.collectives if each.travels and each.phase == "forward"]


@pytest.mark.parametrize("mesh", [8, 64], indirect=True)
@pytest.mark.parametrize("placement", ["rows", "columns"])
def test_memory_that_an_exchange_keeps(mesh, asked, placement):
    """What autograd keeps of a sharded layer, more than of one with its whole table; some tensors are of few bytes."""
    config = replace(MEMORY, value_dim=64, permutation="none")
    hidden_BSD = torch.randn(*TOKENS, config.hidden_size, requires_grad=True)

    def kept(shard):
        torch.manual_seed(0)
        layer = UltraMemLayer(config, shard=shard)
        return kept_for_backward(layer, lambda: layer(hidden_BSD))

    whole, part = kept(None), kept(TableShard(mesh=mesh, placement=placement, **BF16))
    tokens = TOKENS[0] * TOKENS[1]
    options = PlanOptions(ranks=mesh.size(), tokens_per_rank=tokens, sequence_length=tokens)
    if placement == "rows":  # the layer chose its own rows, and others ask this rank for others
        options = replace(options, distinct_rows=asked.distinct_rows)
        requests = asked.answered + asked.distinct_rows - asked.elsewhere
        whole += (requests - asked.distinct_rows) * 12
    counted = kept_bytes(config, options, placement, "home" if placement == "rows" else None)
    assert part - whole == pytest.approx(counted, abs=64)


def counts_as_here(gather, output, sent, group=None):
    """An all-gather that delivers this rank's integers, as if all ranks had the same."""
    gather(output, sent, group=group)
    if not sent.is_floating_point():
        output.copy_(sent.repeat(output.numel() // sent.numel()))


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_that_replicas_add_up(mesh, sparse, monkeypatch):
    """What training does after a backward with a table on every rank, as if all had touched as many rows."""
    shape = replace(shape_of(NARROW), table_rows=256, value_dim=4)
    table = nn.Module()
    table.rows = nn.Parameter(torch.zeros(256, 4))
    rows_U = torch.arange(0, 256, 8)
    gradient = torch.sparse_coo_tensor(rows_U[None], torch.ones(32, 4), (256, 4), check_invariants=False)
    table.rows.grad = gradient.coalesce() if sparse else torch.ones(256, 4)
    for name in ("all_gather_into_tensor", "all_gather_single"):  # the latter is torch 2.13's name for the same
        gather = getattr(dist, name, None)
        if gather is not None:
            monkeypatch.setattr(dist, name, partial(counts_as_here, gather))
    ranks = Ranks(size=mesh.size(), mesh=init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("copies", "shards")))
    with CountBytes() as count:
        reduce_gradients(table, ranks)
    assert count.by_kind() == formula(replicate(shape, mesh.size(), Wire(), distinct_rows=32 if sparse else None))[1]


@pytest.mark.parametrize("mesh", [8], indirect=True)
def test_dense_weights_are_gathered_and_their_gradients_scattered(mesh):
    """FSDP2 as training has it: every weight that is no table, in float32, once each way."""
    config = replace(preset("ultramem-tiny"), vocab_size=64)
    named = init_device_mesh("cpu", (1, 8), mesh_dim_names=("copies", "shards"))
    model = build_model(config).train()
    ranks = Ranks(size=8, mesh=named)
    loss = ShardedLoss(model, lambda inputs, _: (model(inputs).logits.float().mean(), inputs), ranks)
    with CountBytes() as count:
        loss(torch.randint(0, 64, (1, 16)), torch.zeros(1, 16))[0].backward()
    sent = 4 * 7 * dense_share(config, 8)
    assert count.by_kind() == {"all_gather": sent, "reduce_scatter": sent}
    assert sent < 1.01 * 4 * dense_parameters(config) * 7 / 8  # keys of two heads are not padded to those of eight
