"""Formulas against collectives: each exchange written out plainly, run on a fake process group, its bytes counted.

Nothing arrives on a fake group, so that counts of rows cannot be exchanged: reads are spread evenly over the owners, as
the formulas take them. Shapes: T tokens, K slots, C cores, E blocks, V value dim, U distinct rows, P ranks.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch.testing._internal.distributed.fake_pg import FakeStore

from ultramem.runtime.plan import LookupShape, Wire, columns, replicate, rows_at_home, rows_at_owner
from ultramem.runtime.plan.count_bytes import CountBytes

# torch 2.13 has new names for two functional collectives; the old ones are those that 2.11 has as well.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

TOKENS, SLOTS, CORES, BLOCKS = 16, 64, 2, 4
DTYPE = torch.bfloat16
WIRE = Wire(count_bytes=0)


@pytest.fixture(params=[8, 64, 1024])
def group(request):
    dist.init_process_group("fake", rank=1, world_size=request.param, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def shape_for(ranks, value_dim=None):
    return LookupShape(
        tokens=TOKENS,
        slots=SLOTS,
        cores=CORES,
        blocks=BLOCKS,
        value_dim=value_dim or ranks,
        table_rows=ranks * 256,
    )


def even_rows_of(shape, ranks, distinct_rows):
    """Row numbers [T,K], `distinct_rows` different ones, of which every rank owns as many."""
    each = distinct_rows // ranks
    owners = torch.arange(ranks).repeat_interleave(each) * (shape.table_rows // ranks)
    distinct_U = owners + torch.arange(each).repeat(ranks)
    return distinct_U.repeat(shape.reads // distinct_rows).view(TOKENS, SLOTS)


def scores_of():
    return torch.rand(TOKENS, SLOTS, CORES, dtype=DTYPE, requires_grad=True)


def counted(lookup):
    """Bytes by kind that the lookup sends in its forward, and in its backward."""
    with CountBytes() as count:
        output = lookup()
        forward = count.by_kind()
        count.take()
        output.float().sum().backward()
    return forward, count.by_kind()


def formula(volume):
    found = {"forward": {}, "backward": {}}
    for each in volume.collectives:
        found[each.phase][each.kind] = found[each.phase].get(each.kind, 0) + each.sent_bytes
    return found["forward"], found["backward"]


def exchanged(sent, parts, group):
    """An all-to-all of equal parts, with a gradient where there is one to take."""
    splits = [len(sent) // parts] * parts
    if sent.requires_grad:
        return collectives.all_to_all_single_autograd(sent, splits, splits, group)
    return torch.ops._c10d_functional.wait_tensor(collectives.all_to_all_single(sent, splits, splits, group))


@pytest.mark.parametrize("distinct_rows", [None, 1024])
def test_rows_pooled_at_home(group, distinct_rows):
    """Each distinct row is asked for once, and comes back once; so does its gradient. 1024 rows read by 1024 slots
    repeat none; without deduplication the same rows are asked for slot by slot."""
    ranks = group.size()
    shape = shape_for(ranks)
    rows_TK = even_rows_of(shape, ranks, 1024)
    table_NV = torch.rand(shape.table_rows // ranks, shape.value_dim, dtype=DTYPE, requires_grad=True)
    scores_TKC = scores_of()

    def lookup():
        asked, place = rows_TK.flatten(), torch.arange(shape.reads)
        if distinct_rows is not None:
            asked, place = asked.unique(return_inverse=True)
        here = exchanged(asked.int(), ranks, group) % len(table_NV)
        rows_UV = exchanged(table_NV[here], ranks, group)
        rows_TKCV = rows_UV[place].view(TOKENS, SLOTS, CORES, -1)
        return torch.einsum("tkc,tkcv->tcv", scores_TKC, rows_TKCV)

    assert counted(lookup) == formula(rows_at_home(shape, ranks, WIRE, distinct_rows=distinct_rows))


@pytest.mark.parametrize("group", [8, 64], indirect=True)
def test_deduplication_sends_what_is_distinct(group):
    """256 rows for 1024 slots: a quarter of the bytes."""
    ranks = group.size()
    shape = shape_for(ranks)
    rows_TK = even_rows_of(shape, ranks, 256)
    table_NV = torch.rand(shape.table_rows // ranks, shape.value_dim, dtype=DTYPE, requires_grad=True)

    def lookup():
        distinct_U, place = rows_TK.flatten().unique(return_inverse=True)
        here = exchanged(distinct_U.int(), ranks, group) % len(table_NV)
        return exchanged(table_NV[here], ranks, group)[place].view(TOKENS, SLOTS, -1).sum(1)

    found = counted(lookup)
    assert found == formula(rows_at_home(shape, ranks, WIRE, distinct_rows=256))
    every = formula(rows_at_home(shape, ranks, WIRE))
    assert [4 * phase["all_to_all"] for phase in found] == [phase["all_to_all"] for phase in every]


def test_rows_pooled_at_the_owner(group):
    """All ranks' indices and scores are gathered; each pools its rows for all tokens, and the sums are scattered."""
    ranks = group.size()
    shape = shape_for(ranks, value_dim=8)
    rows_TK, scores_TKC = even_rows_of(shape, ranks, 1024), scores_of()
    table_NV = torch.rand(shape.table_rows // ranks, shape.value_dim, dtype=DTYPE, requires_grad=True)

    def lookup():
        pooled = pooled_for_all(table_NV, *gathered(rows_TK, scores_TKC, group))
        return collectives.reduce_scatter_tensor_autograd(pooled, "sum", 0, group)

    assert counted(lookup) == formula(rows_at_owner(shape, ranks, WIRE))


def test_columns(group):
    """All ranks' indices and scores are gathered; each sends the columns that it pooled to whose tokens they are."""
    ranks = group.size()
    shape = shape_for(ranks)
    rows_TK, scores_TKC = even_rows_of(shape, ranks, 1024), scores_of()
    table_NV = torch.rand(shape.table_rows, shape.value_dim // ranks, dtype=DTYPE, requires_grad=True)

    def lookup():
        return exchanged(pooled_for_all(table_NV, *gathered(rows_TK, scores_TKC, group)), ranks, group)

    assert counted(lookup) == formula(columns(shape, ranks, WIRE))


def gathered(rows_TK, scores_TKC, group):
    """Rows and scores of the tokens of all ranks."""
    rows = torch.ops._c10d_functional.wait_tensor(collectives.all_gather_tensor(rows_TK.int(), 0, group))
    return rows.long(), collectives.all_gather_tensor_autograd(scores_TKC, 0, group)


def pooled_for_all(table_NV, rows, scores):
    """Rows pooled for every token, as many blocks as there are with the same in each."""
    pooled = torch.nn.functional.embedding_bag(
        rows % len(table_NV), table_NV, per_sample_weights=scores[..., 0].contiguous(), mode="sum"
    )
    return pooled.unsqueeze(1).expand(-1, BLOCKS, -1).contiguous()


def test_replicas(group):
    """The gradient of a table, dense, and of touched rows."""
    ranks = group.size()
    shape = shape_for(ranks, value_dim=4)
    gradient_NV = torch.ones(shape.table_rows, 4, dtype=DTYPE)
    with CountBytes() as count:
        dist.all_reduce(gradient_NV)
        assert count.by_kind() == formula(replicate(shape, ranks, WIRE))[1]
        count.take()
        dist.all_gather_into_tensor(torch.empty(ranks * 32, dtype=torch.int32), torch.ones(32, dtype=torch.int32))
        dist.all_gather_into_tensor(torch.empty(ranks * 32, 4, dtype=DTYPE), gradient_NV[:32])
    assert count.by_kind() == formula(replicate(shape, ranks, WIRE, distinct_rows=32))[1]
